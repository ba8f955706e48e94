"""Validation and test of `fourdfy-system`: pictures, a video and figures against the truth.

The test views are rendered over white and written as a turntable video, a contact sheet and
`metrics.json`; where the prompt is a sentence of the procedural world, against its truth.
No diffusion model is loaded for that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from threestudio.launcher.progress import memory_gb
from threestudio.utils.misc import get_rank
from torch import Tensor

from custom.fourd.renderers.scene import SceneImages

from .world_evaluation import WorldEvaluation

CONTACT_SHEET_VIEWS = 16
VIDEO_FPS = 15


@dataclass
class EvaluationConfig:
    """Keys of the system that evaluation reads."""


class FourdfyEvaluation:
    """Mixin of `FourdfySystem` with what it does outside of training.

    Uses of the system: `scene`, `prompt`, the savers, its clock, and the truth's scene `_truth`.
    """

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep one view for the grid that `on_validation_epoch_end` writes."""
        images = self._render_view(batch)
        self._shown = [*getattr(self, "_shown", []), (images, batch)]

    def on_validation_epoch_end(self) -> None:
        """Write `it{N}-0.png`: rows of colour, opacity and, where it is known, the truth."""
        rows: list[list[dict]] = [[], []]
        truth = [] if self._truth else None
        for images, batch in getattr(self, "_shown", []):
            rows[0].append(_picture("rgb", images.rgb[0]))
            rows[1].append(_picture("grayscale", images.alpha[0, ..., 0]))
            if truth is not None:
                true = WorldEvaluation(self._truth).truth(*_view_of(batch))
                truth.append(_picture("rgb", true.rgb[0]))
        self._shown = []
        if rows[0] and get_rank() == 0:
            self.save_image_grid(
                f"it{self.true_global_step}-0.png",
                rows + ([truth] if truth else []),
                name="validation_step",
                step=self.true_global_step,
            )

    def on_test_start(self) -> None:
        super().on_test_start()
        # An interrupted training is tested without having reached its end.
        self._stop_clock()
        self._evaluation = WorldEvaluation(self._truth) if self._truth else None
        self._test_views: list[Tensor] = []
        self._test_truth: list[Tensor] = []
        self._test_started = time.monotonic()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Render one view over white, write it, and compare it with the truth if there is one."""
        images = self._render_view(batch)
        if self._evaluation:
            c2w, fovy, _, _, frame_times = _view_of(batch)
            self._test_truth.append(self._evaluation.add(images, c2w, fovy, frame_times)[0])
        self._test_views.append(images.rgb[0].cpu())
        self.save_image_grid(
            f"it{self.true_global_step}-test/{int(batch['index'][0])}.png",
            [_picture("rgb", images.rgb[0])],
            name="test_step",
            step=self.true_global_step,
        )

    def on_test_epoch_end(self) -> None:
        """Write the video, the contact sheet and `metrics.json`."""
        if get_rank() != 0:
            return
        step = self.true_global_step
        self.save_img_sequence(
            f"it{step}-test", f"it{step}-test", r"(\d+)\.png", save_format="mp4", fps=VIDEO_FPS,
            name="test", step=step,
        )
        self._save_contact_sheet(f"it{step}-test-sheet.png")
        metrics = self._evaluation.summary() if self._evaluation else {}
        seconds = self.training_seconds
        metrics |= {
            "truth": self._evaluation is not None,
            "prompt": self.prompt,
            "steps": step,
            "seconds": None if seconds is None else round(seconds, 2),
            "evaluation_seconds": round(time.monotonic() - self._test_started, 2),
            "peak_memory_gb": round(memory_gb(self.device), 3),
            "profile": self.profile,
            "views": len(self._test_views),
            "height": int(self._test_views[0].shape[0]),
            "width": int(self._test_views[0].shape[1]),
        }
        self.save_json("metrics.json", metrics)
        if self._evaluation:
            threestudio.info(
                "against the truth: PSNR %.2f dB (an empty white image: %.2f), silhouette IoU %.3f",
                metrics["psnr"], metrics["psnr_white"], metrics["alpha_iou"],
            )

    def _save_contact_sheet(self, name: str) -> None:
        """Evenly spaced views, eight in a row, each row of renders above its row of truth."""
        count = min(CONTACT_SHEET_VIEWS, len(self._test_views))
        chosen = [round(i * len(self._test_views) / count) for i in range(count)]
        rows = []
        for first in range(0, count, 8):
            part = chosen[first : first + 8]
            rows.append([_picture("rgb", self._test_views[i]) for i in part])
            if self._test_truth:
                rows.append([_picture("rgb", self._test_truth[i]) for i in part])
        self.save_image_grid(name, rows, name="contact_sheet", step=self.true_global_step)

    def _render_view(self, batch: dict[str, Any]) -> SceneImages:
        c2w, fovy, height, width, frame_times = _view_of(batch)
        white = torch.ones(3, device=c2w.device)
        return self.scene.render(c2w, fovy, height, width, frame_times, background=white)


def _view_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    times = batch.get("frame_times")
    return batch["c2w"], batch["fovy"], int(batch["height"]), int(batch["width"]), times


def _picture(kind: str, image: Tensor) -> dict:
    kwargs = {"data_format": "HWC"} if kind == "rgb" else {"cmap": None, "data_range": (0, 1)}
    return {"type": kind, "img": image, "kwargs": kwargs}
