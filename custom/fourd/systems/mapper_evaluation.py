"""Validation and test of time and view control: images against the renders that they stand for.

Figures are means over the pairs of each kind (fixed view and varying time, varying view and fixed
time, both), of the generated image and of the condition frame left as it is (`copy`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import threestudio
from jaxtyping import Float
from threestudio.utils.misc import get_rank
from threestudio.utils.rng import randn_items
from torch import Tensor

from custom.fourd.data.pair_sampling import KINDS
from custom.fourd.metrics.image_quality import dilated_union, psnr, ssim

SHEET_COLUMNS = 8


@dataclass
class PairScores:
    """Figures of generated images, by kind of pair, and the images for a sheet."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    shown: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Condition, truth and generated image of each pair, on the CPU."""

    def add(self, images: Float[Tensor, "b h w 3"], batch: dict[str, Any]) -> None:
        """Compare generated images, and the condition frames, with the targets."""
        images = images.cpu()
        source, truth = batch["cond_rgb"].cpu(), batch["target_rgb"].cpu()
        alpha = batch["target_alpha"].cpu()
        mask = dilated_union(alpha, batch["cond_alpha"].cpu())
        figures = {}
        for name, candidate in (("", images), ("copy_", source)):
            figures[f"{name}psnr"] = psnr(candidate, truth)
            figures[f"{name}psnr_masked"] = psnr(candidate, truth, mask)
            figures[f"{name}ssim"] = ssim(candidate, truth)
        for row, kind in enumerate(batch["pair_kind"].tolist()):
            of_kind = self.values.setdefault(KINDS[kind], {})
            for name, values in figures.items():
                of_kind.setdefault(name, []).append(float(values[row]))
            self.shown.append((source[row], truth[row], images[row]))

    def summary(self) -> dict[str, Any]:
        """Means by kind, with the number of pairs."""
        return {
            kind: {
                "pairs": len(next(iter(figures.values()))),
                **{name: sum(values) / len(values) for name, values in figures.items()},
            }
            for kind, figures in self.values.items()
        }


class MapperEvaluation:
    """Mixin of `MapperTraining` with what it does outside of training.

    Uses of the system: `prior`, `generate`, `save_mappers`, the savers, its clock.
    """

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Generate the targets of a batch for the picture of this validation."""
        self._validated = getattr(self, "_validated", None) or PairScores()
        self._validated.add(self.generate(batch, self._starting_noise(batch)), batch)

    def on_validation_epoch_end(self) -> None:
        """Write `it{N}-0.png`: columns of pairs, rows of condition, truth and generated image."""
        scores, self._validated = getattr(self, "_validated", None), None
        if scores is None or get_rank() != 0:
            return
        step = self.true_global_step
        self.save_image_grid(
            f"it{step}-0.png", _rows(scores.shown), name="validation_step", step=step
        )
        for kind, figures in scores.summary().items():
            self.log(f"val/psnr_{kind}", figures["psnr"])

    def on_test_start(self) -> None:
        """Begin to collect figures."""
        self._stop_clock()
        self._tested = PairScores()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Generate the targets of a batch and compare them with the truth."""
        self._tested.add(self.generate(batch, self._starting_noise(batch)), batch)

    def on_test_epoch_end(self) -> None:
        """Write the contact sheet and `metrics.json`."""
        if get_rank() != 0:
            return
        step, shown = self.true_global_step, self._tested.shown
        self.save_image_grid(
            f"it{step}-test-sheet.png",
            _rows(shown[:SHEET_COLUMNS]),
            name="contact_sheet",
            step=step,
        )
        protocols = self._tested.summary()
        self.save_json(
            "metrics.json",
            {
                "protocols": protocols,
                "steps": step,
                "seconds": self.training_seconds,
                "profile": self.profile,
            },
        )
        for kind, figures in protocols.items():
            threestudio.info(
                "%s: PSNR %.2f dB over %d pairs; the source left as it is has %.2f",
                kind, figures["psnr"], figures["pairs"], figures["copy_psnr"],
            )  # fmt: skip

    def on_fit_end(self) -> None:
        """Write the mappers beside the pictures, unless this very step's are there already."""
        super().on_fit_end()
        if get_rank() != 0 or self._save_dir is None:
            return
        try:
            written = self.save_mappers(self.get_save_dir())
        except FileExistsError as error:
            threestudio.info("the mappers of this step are kept as they are: %s", error)
            return
        threestudio.info("wrote %s", ", ".join(str(path) for path in written))

    def _starting_noise(self, batch: dict[str, Any]) -> Float[Tensor, "b c lh lw"]:
        """The same noise for every pair, so that images differ by their controls alone.

        Random from the role "mapper-sample".
        """
        n = len(batch["cond_rgb"])
        shape = self.prior.encode(batch["cond_rgb"][:1]).shape
        noise = randn_items(shape, "mapper-sample", 0, 0, batch["cond_rgb"].device)
        return noise.expand(n, *shape[1:])


def _rows(shown: list[tuple[Tensor, Tensor, Tensor]]) -> list[list[dict]]:
    rgb = {"type": "rgb", "kwargs": {"data_format": "HWC"}}
    return [[{**rgb, "img": pair[place]} for pair in shown] for place in range(3)]
