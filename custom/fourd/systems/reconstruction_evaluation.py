"""Validation and test of a field that was fitted to videos: held-out cameras over all times.

The test renders every held-out frame (or all frames, where none is held out), and writes them
beside the true ones as pictures, a video, a contact sheet and `metrics.json`. Figures are means
over frames; where the data says which pixels may be compared (`mask`), only those count in PSNR.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from threestudio.utils.misc import get_rank
from torch import Tensor

from custom.fourd.metrics.image_quality import psnr, ssim
from custom.fourd.renderers.scene import SceneImages

from .timed_evaluation import TimedEvaluation

SHEET_COLUMNS = 8
VIDEO_FPS = 8


@dataclass
class FrameScores:
    """Figures of renders against held-out frames, and the frames for a sheet."""

    values: dict[str, list[float]] = field(default_factory=dict)
    cameras: list[int] = field(default_factory=list)
    shown: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Render, truth and depth of every frame, on the CPU."""

    def add(self, images: SceneImages, batch: dict[str, Any]) -> None:
        """Compare one frame with what the batch says it should show."""
        rgb, truth = images.rgb.cpu(), batch["rgb"].cpu()
        mask = batch["mask"][..., 0].cpu() > 0 if "mask" in batch else None
        scores = {"psnr": psnr(rgb, truth, mask), "ssim": ssim(rgb, truth)}
        if "depth" in batch:
            scores["depth_error"] = _depth_error(images, batch["depth"].to(images.depth))
        for name, value in scores.items():
            self.values.setdefault(name, []).extend(value.tolist())
        self.cameras.append(int(batch["camera_id"]))
        self.shown.append((rgb[0], truth[0], images.depth[0, ..., 0].cpu()))

    def summary(self) -> dict[str, Any]:
        """Means, the lowest PSNR, PSNR by camera, and that of the best picture that stands still.

        `psnr_best_static` is what each camera's mean frame would get, a bound for any field that
        does not move; moving cameras make it meaningless.
        """
        means: dict[str, Any] = {
            name: _mean(value for value in values if value == value)
            for name, values in self.values.items()
        }
        means["psnr_min"] = min(self.values["psnr"])
        by_camera: dict[int, list[int]] = {}
        for place, camera in enumerate(self.cameras):
            by_camera.setdefault(camera, []).append(place)
        means["psnr_by_camera"] = {
            str(camera): _mean(self.values["psnr"][place] for place in places)
            for camera, places in by_camera.items()
        }
        still = []
        for places in by_camera.values():
            truth = torch.stack([self.shown[place][1] for place in places])
            still.extend(psnr(truth.mean(dim=0, keepdim=True).expand_as(truth), truth).tolist())
        means["psnr_best_static"] = _mean(still)
        return means


class ReconstructionEvaluation(TimedEvaluation):
    """Mixin of `VideoReconstruction` with what it does outside of training.

    Uses of the system: `scene`, the savers, its clock.
    """

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep a held-out frame for the picture that `on_validation_epoch_end` writes."""
        self._validated = getattr(self, "_validated", None) or FrameScores()
        self._validated.add(self._render_frame(batch), batch)

    def on_validation_epoch_end(self) -> None:
        """Write `it{N}-0.png`: columns of frames, rows of renders, truth and depth."""
        scores, self._validated = getattr(self, "_validated", None), None
        if scores is None or get_rank() != 0:
            return
        step = self.true_global_step
        self.save_image_grid(
            f"it{step}-0.png", _rows(scores.shown), name="validation_step", step=step
        )
        self.log("val/psnr", _mean(scores.values["psnr"]))

    # Test

    def _begin_test(self) -> None:
        super()._begin_test()
        self._tested = FrameScores()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Render a held-out frame, compare it, and write it with the truth and its depth."""
        self._tested.add(self._render_frame(batch), batch)
        step = self.true_global_step
        self.save_image_grid(
            f"it{step}-test/{int(batch['index'][0])}.png",
            [[row[0] for row in _rows(self._tested.shown[-1:])]],
            name="test_step",
            step=step,
        )

    def on_test_epoch_end(self) -> None:
        """Write the video, the contact sheet and `metrics.json`."""
        if get_rank() != 0:
            return
        step, shown = self.true_global_step, self._tested.shown
        self.save_img_sequence(
            f"it{step}-test", f"it{step}-test", r"(\d+)\.png", save_format="mp4", fps=VIDEO_FPS,
            name="test", step=step,
        )  # fmt: skip
        count = min(2 * SHEET_COLUMNS, len(shown))
        chosen = [shown[round(i * (len(shown) - 1) / max(1, count - 1))] for i in range(count)]
        sheet = [
            row
            for first in range(0, count, SHEET_COLUMNS)
            for row in _rows(chosen[first : first + SHEET_COLUMNS])
        ]
        self.save_image_grid(f"it{step}-test-sheet.png", sheet, name="contact_sheet", step=step)
        metrics = self._metrics() | self._circumstances()
        self.save_json("metrics.json", metrics)
        self._tell(metrics)

    def _metrics(self) -> dict[str, Any]:
        """Figures of the tested frames."""
        return self._tested.summary()

    def _tell(self, metrics: dict[str, Any]) -> None:
        threestudio.info(
            "held-out frames: PSNR %.2f dB (lowest %.2f; the best still picture: %.2f), SSIM %.3f",
            metrics["psnr"], metrics["psnr_min"], metrics["psnr_best_static"], metrics["ssim"],
        )  # fmt: skip

    def _circumstances(self) -> dict[str, Any]:
        return self._facts_of_run([rgb for rgb, _, _ in self._tested.shown])

    def _render_frame(self, batch: dict[str, Any]) -> SceneImages:
        """Render by the batch's own intrinsics, so that no principal point is lost."""
        return self.scene.film(
            batch["c2w"], batch["intrinsics"], batch["height"], batch["width"],
            batch["frame_times"],
        )  # fmt: skip


def _depth_error(
    images: SceneImages, truth: Float[Tensor, "b h w 1"], least_alpha: float = 0.5
) -> Float[Tensor, "b"]:
    """Mean |depth / truth - 1| where truth is known and the render opaque; NaN if nowhere."""
    known = ((truth > 0) & (images.alpha > least_alpha)).float().flatten(1)
    error = (images.depth / truth.clamp_min(1e-6) - 1).abs().flatten(1)
    return (error * known).sum(dim=1) / known.sum(dim=1)


def _rows(shown: list[tuple[Tensor, Tensor, Tensor]]) -> list[list[dict]]:
    """Rows of renders, truth and depth, one column per frame."""
    farthest = max(float(depth.max()) for _, _, depth in shown) or 1.0
    present = [float(depth[depth > 0].min()) for _, _, depth in shown if bool((depth > 0).any())]
    limits = (min(present, default=0.0) * 0.95, farthest)
    rgb = {"type": "rgb", "kwargs": {"data_format": "HWC"}}
    grey = {"type": "grayscale", "kwargs": {"cmap": "magma", "data_range": limits}}
    kinds = (rgb, rgb, grey)
    return [[{**kind, "img": frame[place]} for frame in shown] for place, kind in enumerate(kinds)]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else float("nan")
