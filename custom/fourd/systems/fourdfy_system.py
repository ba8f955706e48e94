"""4D-fy (Bahmani et al. 2024): text to a scene by hybrid score distillation, `fourdfy-system`.

Every training step draws one guidance. The data module says which: view groups go to the
multi-view prior (`guidance_multi_view`), single images to `guidance`. The scene is rendered, the
guidance turns renders into a loss, and opacity is regularised; one optimizer step follows.

Evaluation renders the test views over white, writes a turntable video, a contact sheet and
`metrics.json`; where the prompt is a sentence of the procedural world, against its truth.
No diffusion model is loaded for that.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import threestudio
import torch
from threestudio.launcher.progress import memory_gb
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.misc import get_rank
from torch import Tensor

from custom.fourd.losses.opacity import (
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)
from custom.fourd.renderers.scene import Scene, SceneImages

from .world_evaluation import WorldEvaluation, scene_of_prompt

CONTACT_SHEET_VIEWS = 16
VIDEO_FPS = 15


@threestudio.register("fourdfy-system")
class FourdfySystem(BaseLift3DSystem):
    """One stage of 4D-fy; stages differ in their configuration only."""

    strict_optimizer_groups = True

    @dataclass
    class Config(BaseLift3DSystem.Config):
        stage: str = "coarse"
        """Upstream's label of the stage; only `coarse` (a radiance field) exists."""
        prob_multi_view: float | None = None
        """Share of multi-view steps, the data module's key; null means none."""
        prompt_processor_type_multi_view: str = ""
        """Registered name of the prompt processor of the multi-view prior."""
        prompt_processor_multi_view: dict = field(default_factory=dict)
        """Its configuration; its prompt is replaced by `prompt_processor.prompt`."""
        guidance_type_multi_view: str = ""
        """Registered name of the multi-view guidance."""
        guidance_multi_view: dict = field(default_factory=dict)
        """Its configuration."""
        prompt_processor_type_video: str = ""
        """Registered name of the prompt processor of the video prior."""
        prompt_processor_video: dict = field(default_factory=dict)
        """Its configuration; its prompt is replaced by `prompt_processor.prompt`."""
        guidance_type_video: str = ""
        """Registered name of the video guidance."""
        guidance_video: dict = field(default_factory=dict)
        """Its configuration."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        if self.cfg.stage != "coarse":
            raise ValueError(
                f"system.stage is '{self.cfg.stage}'; fourdfy-system has the stage 'coarse' only."
            )
        if not str(self.prompt).strip():
            raise ValueError(
                "system.prompt_processor.prompt is empty; expected the words to make a scene from, "
                "such as system.prompt_processor.prompt='a red cube'."
            )
        self._train_seconds = 0.0
        self._fit_started: float | None = None
        self._truth = scene_of_prompt(str(self.prompt))

    @property
    def prompt(self) -> str:
        """The words that the scene is made from."""
        return self.cfg.prompt_processor.get("prompt", "")

    @property
    def scene(self) -> Scene:
        """The scene as it stands."""
        return Scene(self.geometry, self.material, self.background, self.renderer)

    # Guidance

    def setup(self, stage: str | None = None) -> None:
        """Build what training needs, before optimizers and before weights are restored."""
        if stage == "fit" and not hasattr(self, "_guidance"):
            self._build_guidance()

    def _build_guidance(self) -> None:
        """Only the priors that a step can draw; the others would hold memory for nothing."""
        multi_view_share = self.cfg.prob_multi_view or 0.0
        self._guidance: dict[str, Any] = {}
        self._prompt_utils: dict[str, Any] = {}
        if multi_view_share > 0:
            self._add_guidance("multi_view", "_multi_view", multi_view_share)
        if multi_view_share < 1:
            self._add_guidance("single_view", "", 1 - multi_view_share)

    def _add_guidance(self, kind: str, suffix: str, share: float) -> None:
        names = (f"prompt_processor_type{suffix}", f"guidance_type{suffix}")
        for name in names:
            if not getattr(self.cfg, name):
                raise ValueError(
                    f"system.{name} is empty, but {share:.0%} of the steps draw this guidance; "
                    "name one, or change data.prob_multi_view."
                )
        processor_cfg = {**getattr(self.cfg, f"prompt_processor{suffix}"), "prompt": self.prompt}
        processor = threestudio.find(getattr(self.cfg, names[0]))(processor_cfg)
        guidance = threestudio.find(getattr(self.cfg, names[1]))(
            getattr(self.cfg, f"guidance{suffix}")
        )
        # Plain attributes, so that upstream's paths hold; frozen weights are in no checkpoint.
        setattr(self, f"guidance_{kind}", guidance)
        self._guidance[kind] = guidance
        self._prompt_utils[kind] = processor()

    # Training

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Render the batch's cameras."""
        return self.renderer(**batch)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._fit_started = time.monotonic()

    def on_fit_end(self) -> None:
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._train_seconds = self._seconds_so_far()
        self._fit_started = None

    def _seconds_so_far(self) -> float:
        running = 0.0 if self._fit_started is None else time.monotonic() - self._fit_started
        return self._train_seconds + running

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One distillation step; returns the weighted loss."""
        kind = "single_view" if batch.get("single_view", False) else "multi_view"
        out = self(batch)
        guided = self._guidance[kind](
            out["comp_rgb"], self._prompt_utils[kind], **batch, rgb_as_latents=False
        )
        terms = {name: value for name, value in guided.items() if name.startswith("loss_")}
        for name, value in guided.items():
            if not name.startswith("loss_") and isinstance(value, (Tensor, int, float)):
                self.log(f"train/{name}", value)
        terms.update(self._regularisers(out))
        loss = 0.0
        for name, value in terms.items():
            self.log(f"train/{name}", value)
            loss = loss + value * self.C(self.cfg.loss[name.replace("loss_", "lambda_")])
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss}

    def _regularisers(self, out: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms whose weight is not zero at this step."""
        terms = {}
        if self._weight("lambda_orient") > 0:
            if "normal" not in out:
                raise ValueError(
                    "system.loss.lambda_orient needs normals; use a material that requires them."
                )
            terms["loss_orient"] = orientation_loss(
                out["weights"], out["normal"], out["t_dirs"], out["opacity"]
            )
        if self._weight("lambda_sparsity") > 0:
            terms["loss_sparsity"] = sparsity_loss(out["opacity"])
        if self._weight("lambda_opaque") > 0:
            terms["loss_opaque"] = opaque_loss(out["opacity"])
        if self._weight("lambda_z_variance") > 0:
            terms["loss_z_variance"] = z_variance_loss(out["z_variance"], out["opacity"])
        return terms

    def _weight(self, name: str) -> float:
        return self.C(self.cfg.loss.get(name, 0.0))

    # Evaluation

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
        metrics |= {
            "truth": self._evaluation is not None,
            "prompt": self.prompt,
            "steps": step,
            "seconds": round(self._train_seconds, 2),
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

    # What a checkpoint keeps besides weights

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["train_seconds"] = self._seconds_so_far()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._train_seconds = float(checkpoint.get("train_seconds", 0.0))


def _view_of(batch: dict[str, Any]) -> tuple[Tensor, Tensor, int, int, Tensor | None]:
    times = batch.get("frame_times")
    return batch["c2w"], batch["fovy"], int(batch["height"]), int(batch["width"]), times


def _picture(kind: str, image: Tensor) -> dict:
    kwargs = {"data_format": "HWC"} if kind == "rgb" else {"cmap": None, "data_range": (0, 1)}
    return {"type": kind, "img": image, "kwargs": kwargs}
