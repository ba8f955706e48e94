"""Figures of generated pairs: how near to the truth, and whether time and view were followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from custom.fourd.data.pair_sampling import KINDS
from custom.fourd.metrics.control_accuracy import FULL_TURN_DEG, followed
from custom.fourd.metrics.image_quality import dilated_union, psnr, ssim

from .mapper_truth import SceneTruth

MOVES = {"time": ("time", "both"), "view": ("view", "both")}
"""Kinds of pair in which the time, or the view, is another than the source's."""


def prefixed(method: str, name: str) -> str:
    """Name of a figure of a method; "ours" has no prefix."""
    return name if method == "ours" else f"{method}_{name}"


@dataclass
class PairScores:
    """Figures of images of pairs, by method and kind of pair, and the images for a sheet."""

    values: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    """Method, then kind, then figure."""
    asked: dict[str, dict[str, list[tuple[float, float, float | None]]]] = field(
        default_factory=dict
    )
    """Method, then "time" or "view": requested and recovered value, and the period."""
    shown: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Condition, truth and generated image of each pair, on the CPU."""

    def add(
        self, images: Float[Tensor, "b h w 3"], batch: dict[str, Any], method: str = "ours"
    ) -> None:
        """Compare a method's images with the targets; those of "ours" are shown."""
        images = images.cpu()
        source, truth = batch["cond_rgb"].cpu(), batch["target_rgb"].cpu()
        mask = dilated_union(batch["target_alpha"].cpu(), batch["cond_alpha"].cpu())
        figures = {
            "psnr": psnr(images, truth),
            "psnr_masked": psnr(images, truth, mask),
            "ssim": ssim(images, truth),
            "ssim_masked": ssim(images, truth, mask),
        }
        for row, kind in enumerate(batch["pair_kind"].tolist()):
            for name, values in figures.items():
                self._note(method, KINDS[kind], name, float(values[row]))
            if method == "ours":
                self.shown.append((source[row], truth[row], images[row]))

    def follow(
        self,
        images: Float[Tensor, "b h w 3"],
        batch: dict[str, Any],
        truths: Sequence[SceneTruth],
        method: str = "ours",
    ) -> None:
        """Find the time and the view that a method's images show.

        Args:
            truths: of the scenes, by their places.
        """
        for row, kind in enumerate(batch["pair_kind"].tolist()):
            truth = truths[int(batch["scene_index"][row])]
            time_id, camera_id = int(batch["index_j"][row]), int(batch["index_b"][row])
            features = truth.features(images[row : row + 1]).cpu()[0]
            times, cameras = truth.source.frame_times, truth.source.cameras
            if len(times) > 1:
                place, error = truth.times(camera_id).find(features, time_id)
                self._note(method, KINDS[kind], "time_error_frames", error)
                if KINDS[kind] in MOVES["time"]:
                    period = 1.0 if truth.source.loops else None
                    self._ask(method, "time", times[time_id], times[place], period)
            level = truth.level_cameras(camera_id)
            if len(level) > 1:
                wanted = level.index(camera_id)
                place, error = truth.views(time_id, camera_id).find(features, wanted)
                self._note(method, KINDS[kind], "angle_error_deg", error)
                if KINDS[kind] in MOVES["view"]:
                    azimuths = cameras.azimuth[level]
                    self._ask(method, "view", azimuths[wanted], azimuths[place], FULL_TURN_DEG)

    def _note(self, method: str, kind: str, name: str, value: float) -> None:
        of_kind = self.values.setdefault(method, {}).setdefault(kind, {})
        of_kind.setdefault(name, []).append(value)

    def _ask(
        self, method: str, control: str, requested: Any, recovered: Any, period: float | None
    ) -> None:
        row = (float(requested), float(recovered), period)
        self.asked.setdefault(method, {}).setdefault(control, []).append(row)

    def summary(self) -> dict[str, Any]:
        """Means by kind, with the number of pairs; other methods' names stand before theirs."""
        found: dict[str, Any] = {}
        for method, kinds in self.values.items():
            for kind, figures in kinds.items():
                row = found.setdefault(kind, {})
                if method == "ours" or "pairs" not in row:
                    row["pairs"] = len(figures.get("psnr", ()))
                for name, values in figures.items():
                    row[prefixed(method, name)] = mean(values)
        return found

    def control(self) -> dict[str, Any]:
        """Errors over all pairs whose time (view) varies, and how values follow what was asked."""
        found: dict[str, Any] = {}
        for method, kinds in self.values.items():
            for control, name in (("time", "time_error_frames"), ("view", "angle_error_deg")):
                errors = [e for kind in MOVES[control] for e in kinds.get(kind, {}).get(name, ())]
                if errors:
                    found[prefixed(method, name)] = mean(errors)
                asked = self.asked.get(method, {}).get(control, ())
                if asked:
                    found[prefixed(method, f"{control}_correlation")] = _correlation(asked)
        return found


def _correlation(asked: Sequence[tuple[float, float, float | None]]) -> float | None:
    """Mean over the scenes that loop and those that do not, weighted by their pairs."""
    groups: dict[float | None, list] = {}
    for requested, recovered, period in asked:
        groups.setdefault(period, []).append((requested, recovered))
    parts = [
        (len(rows), followed(*zip(*rows, strict=True), period=period))
        for period, rows in groups.items()
    ]
    known = [(count, value) for count, value in parts if value is not None]
    total = sum(count for count, _ in known)
    return sum(count * value for count, value in known) / total if total else None


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one number."""
    return sum(values) / len(values)


def method_table(protocols: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    """One figure of every method by protocol, as a table of methods reads it."""
    methods: dict[str, dict[str, Any]] = {}
    for kind, figures in protocols.items():
        for key, value in figures.items():
            if key == name or key.endswith(f"_{name}"):
                method = key.removesuffix(name).rstrip("_") or "ours"
                methods.setdefault(method, {})[kind] = value
    return methods


def spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the values, evenly from the first."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]
