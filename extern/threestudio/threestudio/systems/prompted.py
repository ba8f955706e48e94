"""Base of the systems that make a scene at rest from one prompt with one guidance.

A step renders the batch's cameras, asks the guidance about the images, adds the regularisers and
makes one optimizer step. Systems built on this differ in their configuration's keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from threestudio.systems.distillation import Distillation
from threestudio.utils.misc import get_rank

VIDEO_FPS = 30
FREQUENCIES = ("guidance_eval",)


class PromptedSystem(Distillation, BaseLift3DSystem):
    """A scene, a prompt processor and a guidance.

    Prompt processor and guidance are built when a training begins, before its optimizer: evaluation
    and export load no diffusion model. A guidance that trains is a module, stored under its name.

    Attributes:
        guidance: the guidance, in training only.
        prompt_processor: its prompts, likewise.
        prompt_utils: what the prompt processor has returned, likewise.
    """

    late_modules = ("guidance",)

    @dataclass
    class Config(BaseLift3DSystem.Config):
        freq: dict = field(default_factory=dict)
        """``guidance_eval``: steps between two pictures of what the guidance makes of the renders;
        absent or 0, none are made."""

    cfg: Config

    def configure(self) -> None:
        """Build the scene.

        Raises:
            ValueError: the prompt is empty, or `freq` has a key that nothing reads.
        """
        super().configure()
        self.require_prompt()
        unknown = sorted(set(self.cfg.freq) - set(FREQUENCIES))
        if unknown:
            raise ValueError(
                f"system.freq has the keys {unknown}; expected {', '.join(FREQUENCIES)} only."
            )
        self._warned_of_no_pictures = False

    # Training

    def setup(self, stage: str | None = None) -> None:
        """Build what only training needs; before optimizers are made and weights are restored."""
        if stage == "fit" and not hasattr(self, "guidance"):
            self._build_guidance()
            if not self.resumed:
                self.load_late_weights()
        super().setup(stage)

    def _build_guidance(self) -> None:
        for key in ("prompt_processor_type", "guidance_type"):
            if not getattr(self.cfg, key):
                raise ValueError(
                    f"system.{key} is empty; expected a registered name, such as "
                    f"stable-diffusion-{key.removesuffix('_type').replace('_', '-')}."
                )
        processor = threestudio.find(self.cfg.prompt_processor_type)(self.cfg.prompt_processor)
        self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)
        self.prompt_processor = processor
        self.prompt_utils = processor()

    def on_fit_start(self) -> None:
        """Let a geometry that can start from a shape do so, unless it continues another run."""
        super().on_fit_start()
        start = getattr(self.geometry, "initialize_shape", None)
        continued = self.resumed or self.cfg.weights or self.cfg.geometry_convert_from
        if callable(start) and not continued:
            start()

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Render the batch's cameras."""
        return self.renderer(**batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One distillation step; returns the weighted loss."""
        out = self(batch)
        terms = self.guidance_terms(self._ask_guidance(out["comp_rgb"], batch))
        terms.update(self._regularisers(out))
        if "inv_std" in out:
            self.log("train/inv_std", out["inv_std"], prog_bar=True)
        self.log_weights()
        return {"loss": self.weighted_loss(terms)}

    def _ask_guidance(self, comp_rgb: Tensor, batch: dict[str, Any]) -> dict[str, Any]:
        """Ask the guidance; where pictures are due, write ``it{N}-train.png``."""
        interval = int(self.cfg.freq.get("guidance_eval") or 0)
        due = interval > 0 and self.true_global_step % interval == 0
        keys = {"guidance_eval": True} if due else {}
        guided = dict(
            self.guidance(comp_rgb, self.prompt_utils, **batch, rgb_as_latents=False, **keys)
        )
        pictures = guided.pop("eval", None)
        if due and pictures is None and not self._warned_of_no_pictures:
            self._warned_of_no_pictures = True
            threestudio.warn(
                "system.freq.guidance_eval is %d, but %s makes no such pictures.",
                interval,
                self.cfg.guidance_type,
            )
        if pictures is not None and get_rank() == 0:
            self.guidance_evaluation_save(comp_rgb.detach(), pictures)
        return guided

    # Evaluation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write ``it{N}-{index}.png``: colour, normals where there are any, opacity."""
        self._save_view(f"it{self.true_global_step}", "-", batch, "validation_step")

    def on_validation_epoch_end(self) -> None:
        """Nothing is left to do: each view was written by itself."""

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Write ``it{N}-test/{index}.png``, like a validation's picture."""
        self._save_view(f"it{self.true_global_step}-test", "/", batch, "test_step")

    def on_test_epoch_end(self) -> None:
        """Join the test's pictures to ``it{N}-test.mp4``."""
        if get_rank() != 0:
            return
        folder = f"it{self.true_global_step}-test"
        self.save_img_sequence(
            folder, folder, r"(\d+)\.png", save_format="mp4", fps=VIDEO_FPS, name="test",
            step=self.true_global_step,
        )  # fmt: skip

    def _save_view(self, prefix: str, joint: str, batch: dict[str, Any], name: str) -> None:
        out = self(batch)
        row = [{"type": "rgb", "img": out["comp_rgb"][0], "kwargs": {"data_format": "HWC"}}]
        if "comp_normal" in out:
            normals = {"data_format": "HWC", "data_range": (0, 1)}
            row.append({"type": "rgb", "img": out["comp_normal"][0], "kwargs": normals})
        grey = {"cmap": None, "data_range": (0, 1)}
        row.append({"type": "grayscale", "img": out["opacity"][0, :, :, 0], "kwargs": grey})
        path = f"{prefix}{joint}{int(batch['index'][0])}.png"
        self.save_image_grid(path, row, name=name, step=self.true_global_step)
