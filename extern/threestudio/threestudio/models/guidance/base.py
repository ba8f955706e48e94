"""What guidances share: their common keys, their schedules, and how they load a frozen prior."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threestudio.models.guidance.noise_schedule import FlowSchedule, NoiseSchedule
from threestudio.models.guidance.score_distillation import (
    classifier_free_guidance,
    score_distillation_loss,
)
from threestudio.utils import rng
from threestudio.utils.base import BaseObject
from threestudio.utils.misc import C, get_rank
from threestudio.utils.pretrained import RequiredModel

PRIOR_COMPONENTS = ("unet", "vae", "scheduler")


class DiffusionGuidance(BaseObject):
    """A frozen diffusion prior that scores images; subclasses make the model call.

    Schedules are pure functions of the step: `update_step` may be called for any step in any order.
    """

    @dataclass
    class Config(BaseObject.Config):
        """Keys that all guidances of the contract know."""

        pretrained_model_name_or_path: str | None = None
        """Folder, hub id or ``embedded://name`` of the prior."""
        revision: str | None = None
        """Commit of a hub id; None is unverified."""
        enable_memory_efficient_attention: bool = False
        """Accepted for upstream's configs; torch's fused attention is always used."""
        enable_sequential_cpu_offload: bool = False
        """Not provided; true is refused."""
        enable_attention_slicing: bool = False
        """Accepted for upstream's configs; torch's fused attention is always used."""
        enable_channels_last_format: bool = False
        """Keep the U-Net's weights in channels-last layout."""
        guidance_scale: Any = 7.5
        """Scale of classifier-free guidance; a number or a schedule."""
        grad_clip: Any | None = None
        """Largest absolute gradient of a latent; a number, a schedule or None."""
        half_precision_weights: bool = True
        """Load the prior in fp16 on CUDA; the CPU always computes in fp32."""
        min_step_percent: Any = 0.02
        """Lowest noise, as a fraction of the training steps; a number or a schedule."""
        max_step_percent: Any = 0.98
        """Highest noise, likewise."""
        view_dependent_prompting: bool = True
        """Look text embeddings up by the camera's direction."""

    cfg: Config
    schedule: NoiseSchedule | FlowSchedule

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the models that a guidance of this configuration will load."""
        name = cfg.get("pretrained_model_name_or_path") or cls.Config.pretrained_model_name_or_path
        return [RequiredModel(name, PRIOR_COMPONENTS, cfg.get("revision"))]

    def setup_schedule(self, schedule: NoiseSchedule | FlowSchedule) -> None:
        """Take over a prior's schedule and set everything that depends on the step to step 0."""
        if self.cfg.enable_sequential_cpu_offload:
            raise ValueError(
                "enable_sequential_cpu_offload is true; expected false, since layers are not moved "
                "during a step. Choose half_precision_weights=true or a smaller model."
            )
        self.schedule = schedule
        self.num_train_timesteps = schedule.num_train_timesteps
        if isinstance(schedule, NoiseSchedule):
            self.alphas_cumprod = schedule.alphas_cumprod.to(self.device)
        self.update_step(0, 0)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Evaluate every scheduled key at a step."""
        self._step = global_step
        self.guidance_scale = float(C(self.cfg.guidance_scale, epoch, global_step))
        clip = self.cfg.grad_clip
        self.grad_clip_val = None if clip is None else float(C(clip, epoch, global_step))
        self.set_min_max_steps(
            C(self.cfg.min_step_percent, epoch, global_step),
            C(self.cfg.max_step_percent, epoch, global_step),
        )

    def set_min_max_steps(
        self, min_step_percent: float = 0.02, max_step_percent: float = 0.98
    ) -> None:
        """Set the range of timesteps from two fractions of the training steps.

        Raises:
            ValueError: unless 0 <= min_step_percent <= max_step_percent <= 1.
        """
        if not 0.0 <= min_step_percent <= max_step_percent <= 1.0:
            raise ValueError(
                f"min_step_percent is {min_step_percent} and max_step_percent {max_step_percent} "
                f"at step {self._step}; expected 0 <= min_step_percent <= max_step_percent <= 1."
            )
        last = self.num_train_timesteps - 1
        self.min_step = min(int(self.num_train_timesteps * min_step_percent), last)
        self.max_step = min(int(self.num_train_timesteps * max_step_percent), last)

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name what the guidance's own losses train; a frozen prior has nothing.

        A system with `strict_optimizer_groups` refuses to start while one of them is in no group
        of the optimizer.
        """
        return {}

    def weights_dtype_for(self, device: torch.device) -> torch.dtype:
        """Return fp16 on an accelerator where the config asks for it, else fp32."""
        half = self.cfg.half_precision_weights and device.type != "cpu"
        return torch.float16 if half else torch.float32

    def guided_prediction(
        self,
        predict: Callable[[int, Float[Tensor, "n l d"]], Float[Tensor, "n ..."]],
        text_embeddings: Float[Tensor, "two_b l d"],
        needs_cond: bool = False,
        convention: str = "standard",
    ) -> tuple[Float[Tensor, "b ..."] | None, Float[Tensor, "b ..."]]:
        """Return (conditional, guided) predictions in fp32 at the step's guidance scale.

        A half that nobody reads is not computed; the conditional one may then be None unless
        ``needs_cond``. Not differentiable.

        Args:
            predict: (halves, text) -> the model's prediction for its inputs ``halves`` times over,
                one row of text each; called once.
            text_embeddings: conditional rows first, then as many unconditional ones.
            needs_cond: compute the conditional half in any case.
            convention: meaning of the scale, see `classifier_free_guidance`.
        """
        batch, scale = len(text_embeddings) // 2, self.guidance_scale
        standard = convention == "standard"
        uses_cond = needs_cond or not standard or scale != 0.0
        uses_uncond = scale != (1.0 if standard else 0.0)
        text = text_embeddings[0 if uses_cond else batch : None if uses_uncond else batch]
        halves = len(text) // batch
        # Inference mode spares a network's many small operations their bookkeeping, about a
        # twentieth of its time on a CPU; the clone leaves it, so that autograd may keep the result.
        with torch.inference_mode():
            output = predict(halves, text).float()
        output = output.clone()
        if halves == 1:
            return (output if uses_cond else None), output
        cond, uncond = output.chunk(2)
        return cond, classifier_free_guidance(cond, uncond, scale, convention)

    def distillation(
        self,
        loss_name: str,
        latents: Float[Tensor, "b ..."],
        gradient: Float[Tensor, "b ..."],
    ) -> dict[str, Any]:
        """Return what a guidance answers: the loss with this gradient, and facts of the step.

        Args:
            loss_name: key of the loss.
            latents: what the loss is differentiable in.
            gradient: of the loss by the latents, before ``grad_clip``.

        Returns:
            the loss; ``grad_norm``, a tensor, of the gradient after clipping; ``min_step`` and
            ``max_step``, the range of timesteps.
        """
        loss, used = score_distillation_loss(latents, gradient, self.grad_clip_val)
        return {
            loss_name: loss,
            "grad_norm": used.norm(),
            "min_step": self.min_step,
            "max_step": self.max_step,
        }

    def draw_timesteps(self, role: str, batch: int, shared: bool) -> Int[Tensor, "b"]:
        """Draw uniformly from [min_step, max_step] for the current step.

        Args:
            role: name of the random stream.
            batch: how many items.
            shared: one draw for all items of all ranks, rather than one for each item.
        """
        span = self.max_step + 1 - self.min_step
        if shared:
            stream = rng.generator(role, self._step)
            value = torch.rand((1,), generator=stream).expand(batch)
        else:
            value = rng.rand_items((batch,), role, self._step, first_item=get_rank() * batch)
        # U[0, 1) in fp32 times the span can round up to the span itself.
        offset = (value * span).long().clamp_max(span - 1)
        return (self.min_step + offset).to(self.device)

    def draw_noise(self, role: str, shape: tuple[int, ...]) -> Float[Tensor, "b ..."]:
        """Draw N(0, 1) for the current step, each item from its own stream, on this device."""
        first_item = get_rank() * shape[0]
        return rng.randn_items(shape, role, self._step, first_item=first_item, device=self.device)
