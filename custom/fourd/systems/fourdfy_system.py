"""4D-fy (Bahmani et al. 2024): text to a scene by hybrid score distillation, `fourdfy-system`.

Every training step draws one guidance. The data module says which: view groups go to the
multi-view prior (`guidance_multi_view`), single images to `guidance`. The scene is rendered, the
guidance turns renders into a loss, and opacity is regularised; one optimizer step follows.

Evaluation is in `fourdfy_evaluation`; no diffusion model is loaded for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import threestudio
from threestudio.systems.base import BaseLift3DSystem
from torch import Tensor

from custom.fourd.losses.opacity import (
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)
from custom.fourd.renderers.scene import Scene

from .fourdfy_evaluation import EvaluationConfig, FourdfyEvaluation
from .training_clock import TrainingClock
from .world_evaluation import scene_of_prompt


@threestudio.register("fourdfy-system")
class FourdfySystem(FourdfyEvaluation, TrainingClock, BaseLift3DSystem):
    """One stage of 4D-fy; stages differ in their configuration only."""

    strict_optimizer_groups = True

    @dataclass
    class Config(EvaluationConfig, BaseLift3DSystem.Config):
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
