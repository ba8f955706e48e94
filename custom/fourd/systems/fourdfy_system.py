"""4D-fy (Bahmani et al. 2024): text to a scene by hybrid score distillation, `fourdfy-system`.

Every training step draws one guidance. The data module says which: view groups go to
`guidance_multi_view`, clips to `guidance_video`, single images to `guidance_single_view`
(configured by `guidance`). The scene is rendered, the guidance turns renders into a loss, and
opacity is regularised; one optimizer step follows.

A moving scene is the sum of a static and a moving part. The moving part trains on clips only:
images refine the scene as seen through the motion of one moment, which they leave bit-identical.

Evaluation is in `fourdfy_evaluation`; no diffusion model is loaded for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from threestudio.launcher.profiles import AS_WRITTEN
from threestudio.systems.base import BaseLift3DSystem
from threestudio.systems.distillation import Distillation
from threestudio.utils.rng import generator
from torch import Tensor

from custom.fourd.data.clip_batch import clip_batch, image_batch
from custom.fourd.losses.deformation import deformation_loss
from custom.fourd.renderers.scene import Scene

from .fourdfy_evaluation import EvaluationConfig, FourdfyEvaluation
from .hybrid_guidance import (
    HybridGuidance,
    HybridGuidanceConfig,
    guidance_kind,
    guidance_shares,
)
from .moving_parts import MovingParts
from .training_clock import TrainingClock
from .world_evaluation import scene_of_prompt


@threestudio.register("fourdfy-system")
class FourdfySystem(
    FourdfyEvaluation, HybridGuidance, Distillation, TrainingClock, BaseLift3DSystem
):
    """One stage of 4D-fy; stages differ in their configuration only."""

    @dataclass
    class Config(EvaluationConfig, HybridGuidanceConfig, BaseLift3DSystem.Config):
        stage: str = "coarse"
        """Upstream's label of the stage; only `coarse` (a radiance field) exists."""
        freeze_static_modules: bool = False
        """Train motion only, in all steps; the rest of the scene stays as it was loaded."""
        image_frame_time: float | None = None
        """Scene time of images and view groups of a moving scene; null draws one of the step's."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        if self.cfg.stage != "coarse":
            raise ValueError(
                f"system.stage is '{self.cfg.stage}'; fourdfy-system has the stage 'coarse' only."
            )
        self.require_prompt()
        frame_time = self.cfg.image_frame_time
        if frame_time is not None and not 0.0 <= frame_time <= 1.0:
            raise ValueError(
                f"system.image_frame_time is {frame_time}; expected a scene time in [0, 1], or "
                "null to draw one of each step's."
            )
        self._moving = MovingParts(self.geometry)
        self._truth = scene_of_prompt(str(self.prompt))

    @property
    def strict_optimizer_groups(self) -> bool:
        """Not of a config that may be foreign: upstream's list frozen groups, and lack some."""
        return self.profile != AS_WRITTEN and not self.profile_is_builtin

    @property
    def scene(self) -> Scene:
        """The scene as it stands."""
        return Scene(self.geometry, self.material, self.background, self.renderer)

    # Training

    def setup(self, stage: str | None = None) -> None:
        """Decide what trains, and build the priors; before optimizers are made."""
        if stage == "fit":
            if self.cfg.freeze_static_modules:
                parts = (self.geometry, self.material, self.background, self.renderer)
                self._moving.freeze_others(parts)
            elif self._moving:
                # Some encodings freeze their static part for good once the scene moves.
                self._moving.train(moves=True, is_video=True)
            self._check_clips()
        super().setup(stage)

    def _check_clips(self) -> None:
        dynamic = getattr(self.geometry, "is_dynamic", True)
        share = guidance_shares(self.cfg).get("video", 0.0)
        if share > 0 and not dynamic:
            raise ValueError(
                f"{share:.0%} of the steps show clips, but the geometry is static; expected "
                "system.geometry.pos_encoding_config.static=false, or "
                "data.single_view.prob_single_view_video=null."
            )

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Render the batch's cameras."""
        return self.renderer(**batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One distillation step; returns the weighted loss."""
        kind = guidance_kind(batch)
        guidance, prompt_utils = self.drawn_guidance(kind)
        is_video = kind == "video"
        self._moving.train(is_video or self.cfg.freeze_static_modules, is_video)
        batch = self.batch_in_time(batch)
        out = self(batch)
        guided = guidance(out["comp_rgb"], prompt_utils, **batch, rgb_as_latents=False)
        terms = self.guidance_terms(guided)
        terms.update(self._regularisers(out))
        if is_video and self._weight("lambda_deformation") > 0:
            terms["loss_deformation"] = self._deformation(out, batch["num_frames"])
        self.log_weights()
        return {"loss": self.weighted_loss(terms)}

    def batch_in_time(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with one scene time per image; a static scene's stays as it is.

        A clip gets a frame for each of its times. Images and view groups all show one time:
        `image_frame_time`, or by default one of the step's `frame_times`.

        Random: that time, role "image-time" of the step, shared by all ranks.
        """
        frame_times = batch.get("frame_times")
        if guidance_kind(batch) == "video":
            return clip_batch(batch, frame_times)
        if frame_times is None and not self._moving:
            return batch
        if self.cfg.image_frame_time is not None:
            return image_batch(batch, self.cfg.image_frame_time)
        if frame_times is None:
            return image_batch(batch, 0.0)
        frame_times = frame_times.reshape(-1)
        stream = generator("image-time", self.true_global_step)
        place = torch.randint(frame_times.numel(), (), generator=stream)
        return image_batch(batch, frame_times[int(place)])

    def _deformation(self, out: dict[str, Tensor], num_frames: int) -> Tensor:
        if "deformation" not in out:
            raise ValueError(
                "system.loss.lambda_deformation needs a geometry that displaces points; expected "
                "system.geometry.pos_encoding_config.otype=HashGridSpatialTimeDeform. Choose it, "
                "or set lambda_deformation to 0."
            )
        return deformation_loss(out["deformation"], num_frames)
