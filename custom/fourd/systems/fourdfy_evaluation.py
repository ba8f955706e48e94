"""Validation and test of `fourdfy-system`: pictures, a video and figures against the truth.

The test views are rendered over white and written as a video, a contact sheet and `metrics.json`;
where the prompt is a sentence of the procedural world, against its truth. A stage at rest shows a
turntable. In a moving stage time goes on while the camera walks around, and a grid of standing
cameras films the whole clip, which the sheet shows and the figures of motion come from; validation
writes a clip of its first view. No diffusion model is loaded for any of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import threestudio
import torch
from threestudio.utils.misc import get_rank
from torch import Tensor

from custom.fourd.renderers.scene import SceneImages

from .motion_evaluation import Clips, ViewTimeGrid, film, motion_metrics
from .timed_evaluation import TimedEvaluation
from .world_evaluation import WorldEvaluation

CONTACT_SHEET_VIEWS = 16
VIDEO_FPS = 15
CLIP_FPS = 8
LARGEST_GRID_SIZE_PX = 96


@dataclass
class EvaluationConfig:
    """Keys of the system that evaluation reads; all are of moving stages."""

    val_clip_times: int = 8
    """Scene times of the clip that validation writes; 0 writes none."""
    test_static: bool = False
    """Render each test view at time 0 as well, into `it{N}-test_static`, as upstream does."""
    test_grid_azimuths: int = 4
    """Standing cameras of the grid that the test measures motion with; 0 leaves it out."""
    test_grid_times: int = 8
    """Scene times that each of them films, evenly over [0, 1], ends included."""
    test_grid_size_px: int | None = None
    """Height and width of its images; null takes the test views' height, at most 96."""


class FourdfyEvaluation(TimedEvaluation):
    """Mixin of `FourdfySystem` with what it does outside of training.

    Uses of the system: `scene`, `prompt`, the savers, its clock, and the truth's scene `_truth`.
    """

    # Validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Keep one view for the grid that `on_validation_epoch_end` writes."""
        images = self._render_view(batch)
        self._shown = [*getattr(self, "_shown", []), (images, batch)]

    def on_validation_epoch_end(self) -> None:
        """Write `it{N}-0.png`: rows of colour, opacity and, where it is known, the truth.

        In a moving stage also `it{N}-clip.mp4`.
        """
        shown, self._shown = getattr(self, "_shown", []), []
        if not shown or get_rank() != 0:
            return
        rows: list[list[dict]] = [[], []]
        truth = [] if self._truth else None
        for images, batch in shown:
            rows[0].append(_picture("rgb", images.rgb[0]))
            rows[1].append(_picture("grayscale", images.alpha[0, ..., 0]))
            if truth is not None:
                true = WorldEvaluation(self._truth).truth(*_view_of(batch))
                truth.append(_picture("rgb", true.rgb[0]))
        self.save_image_grid(
            f"it{self.true_global_step}-0.png",
            rows + ([truth] if truth else []),
            name="validation_step",
            step=self.true_global_step,
        )
        if _is_moving(shown[0][1]) and self.cfg.val_clip_times > 0:
            self._save_clip(shown[0][1])

    def _save_clip(self, batch: dict[str, Any]) -> None:
        """Write `it{N}-clip.mp4`: one view over the clip, beside its truth where that is known."""
        step, paths = self.true_global_step, []
        for index, frame_time in enumerate(torch.linspace(0, 1, self.cfg.val_clip_times)):
            times = batch["frame_times"].new_full((1,), float(frame_time))
            view = {**batch, "frame_times": times}
            row = [_picture("rgb", self._render_view(view).rgb[0])]
            if self._truth:
                true = WorldEvaluation(self._truth).truth(*_view_of(view))
                row.append(_picture("rgb", true.rgb[0]))
            paths.append(self.save_image_grid(f"it{step}-clip/{index}.png", [row]))
        # A full disk has been reported by now; it stops no training.
        if all(Path(path).is_file() for path in paths):
            self._save_video(f"it{step}-clip", "validation_clip", fps=CLIP_FPS)

    # Test

    def _begin_test(self) -> None:
        super()._begin_test()
        self._evaluation = WorldEvaluation(self._truth) if self._truth else None
        self._test_views: list[Tensor] = []
        self._test_truth: list[Tensor] = []
        self._test_camera: dict[str, float] | None = None

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Render one view over white, write it, and compare it with the truth if there is one."""
        images = self._render_view(batch)
        if self._evaluation:
            c2w, fovy, _, _, frame_times = _view_of(batch)
            self._test_truth.append(self._evaluation.add(images, c2w, fovy, frame_times)[0])
        self._test_views.append(images.rgb[0].cpu())
        self._save_test_view("test", batch, images)
        if _is_moving(batch):
            self._test_camera = {
                "elevation_deg": float(batch["elevation"][0]),
                "distance": float(batch["camera_distances"][0]),
                "fovy_deg": math.degrees(float(batch["fovy"][0])),
            }
            if self.cfg.test_static:
                still = {**batch, "frame_times": torch.zeros_like(batch["frame_times"])}
                self._save_test_view("test_static", batch, self._render_view(still))

    def _save_test_view(self, what: str, batch: dict[str, Any], images: SceneImages) -> None:
        self.save_image_grid(
            f"it{self.true_global_step}-{what}/{int(batch['index'][0])}.png",
            [_picture("rgb", images.rgb[0])],
            name="test_step",
            step=self.true_global_step,
        )

    def on_test_epoch_end(self) -> None:
        """Write the videos, the contact sheet and `metrics.json`."""
        if get_rank() != 0:
            return
        step, moving = self.true_global_step, self._test_camera is not None
        self._save_video(f"it{step}-test", "test")
        if moving and self.cfg.test_static:
            self._save_video(f"it{step}-test_static", "test_static")
        metrics = self._evaluation.summary() if self._evaluation else {}
        if moving and self.cfg.test_grid_azimuths > 0:
            metrics |= self._film_grid(f"it{step}-test-sheet.png")
        else:
            self._save_contact_sheet(f"it{step}-test-sheet.png")
        metrics |= self._circumstances()
        self.save_json("metrics.json", metrics)
        if self._evaluation:
            threestudio.info(
                "against the truth: PSNR %.2f dB (an empty white image: %.2f), silhouette IoU %.3f",
                metrics["psnr"], metrics["psnr_white"], metrics["alpha_iou"],
            )
        if metrics.get("motion_correlation") is not None:
            threestudio.info(
                "motion against the truth: correlation %.2f, amplitude ratio %.2f, PSNR %.2f dB "
                "(the best static picture: %.2f)",
                metrics["motion_correlation"], metrics["motion_amplitude_ratio"],
                metrics["psnr_grid"], metrics["psnr_best_static"],
            )

    def _circumstances(self) -> dict[str, Any]:
        """What every scene's `metrics.json` says, moving or not, with truth or without."""
        facts = {"truth": self._evaluation is not None, "prompt": self.prompt}
        return facts | self._facts_of_run(self._test_views)

    def _film_grid(self, sheet: str) -> dict[str, Any]:
        """Film the scene with standing cameras; write the sheet, return the figures of motion."""
        size_px = self.cfg.test_grid_size_px
        if size_px is None:
            size_px = min(LARGEST_GRID_SIZE_PX, int(self._test_views[0].shape[0]))
        grid = ViewTimeGrid.around(
            self.cfg.test_grid_azimuths, self.cfg.test_grid_times, size_px, **self._test_camera
        )
        clips = film(self.scene, grid)
        truth = film(self._truth, grid) if self._truth else None
        self.save_image_grid(sheet, _clip_rows(clips, truth), name="contact_sheet",
                             step=self.true_global_step)
        facts = {"grid_azimuths": grid.shape[0], "grid_times": grid.shape[1],
                 "grid_size_px": size_px}  # fmt: skip
        return facts | (motion_metrics(self._truth, clips, truth) if truth else {})

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

    def _save_video(self, folder: str, name: str, fps: int = VIDEO_FPS) -> None:
        """Join the numbered pictures of a folder to the video of its name."""
        self.save_img_sequence(
            folder, folder, r"(\d+)\.png", save_format="mp4", fps=fps, name=name,
            step=self.true_global_step,
        )

    def _render_view(self, batch: dict[str, Any]) -> SceneImages:
        c2w, fovy, height, width, frame_times = _view_of(batch)
        white = torch.ones(3, device=c2w.device)
        return self.scene.render(c2w, fovy, height, width, frame_times, background=white)


def _is_moving(batch: dict[str, Any]) -> bool:
    return batch.get("frame_times") is not None


def _view_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    times = batch.get("frame_times")
    return batch["c2w"], batch["fovy"], int(batch["height"]), int(batch["width"]), times


def _clip_rows(clips: Clips, truth: Clips | None) -> list[list[dict]]:
    """One row per camera, time going to the right; under it the row of its truth."""
    rows = []
    for view in range(len(clips.rgb)):
        for source in (clips, truth):
            if source is not None:
                rows.append([_picture("rgb", image) for image in source.rgb[view]])
    return rows


def _picture(kind: str, image: Tensor) -> dict:
    kwargs = {"data_format": "HWC"} if kind == "rgb" else {"cmap": None, "data_range": (0, 1)}
    return {"type": kind, "img": image, "kwargs": kwargs}
