"""What the systems of time and view control share: the loss of a step, and sampling with controls.

Of a pair (frame i by camera a) -> (frame j by camera b) the denoiser is shown noisy latents of the
target, the prompt with the mappers' words, and, where an IP-Adapter is loaded, the condition frame.
Only the mappers learn; the denoiser, its autoencoder and its text encoder are frozen, and gradients
pass through them.

Dimensions: ``b`` pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from threestudio.models.guidance.score_distillation import add_noise, diffusion_scales
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.misc import get_rank
from threestudio.utils.rng import rand_items, randn_items
from torch import Tensor, nn

from custom.fourd.data.pair_places import drawn_places
from custom.fourd.diffusion.layer_contexts import LayerContexts, unet_arguments
from custom.fourd.mappers.composition import without_control
from custom.fourd.mappers.control_inputs import control_values
from custom.fourd.mappers.mapper import exempt_from_decay, nested_cuts
from custom.fourd.mappers.prompt_templates import drawn_templates, fill_template
from custom.fourd.mappers.text_injection import PlaceholderPrompts

from .mapper_evaluation import MapperEvaluation
from .mapper_setup import MapperSetup
from .training_clock import TrainingClock

RANGE_PAIRS = 1024
"""Pairs that the ranges of a mapper's axes are taken from."""


class MapperTraining(MapperEvaluation, TrainingClock, MapperSetup):
    """Trains the mappers of `MapperSetup`."""

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The denoiser's own loss on noisy targets, seen through the mappers' words.

        Random, per pair: noise, noise level, and whether control and image are dropped, from the
        roles "mapper-noise", "mapper-timesteps", "mapper-drop"; the template of its prompt, from
        "mapper-template".
        """
        latents = batch.get("target_latents")
        if latents is None:
            latents = self.prior.encode(batch["target_rgb"])
        n, step = len(latents), int(batch.get("step", self.true_global_step))
        first = get_rank() * n
        schedule, device = self.prior.schedule, latents.device
        noise = randn_items(latents.shape, "mapper-noise", step, first, device)
        unit = rand_items((n,), "mapper-timesteps", step, first, device)
        timesteps = (unit * schedule.num_train_timesteps).long()
        scales = diffusion_scales(schedule.alphas_cumprod.to(device), timesteps)
        noisy = add_noise(latents, noise, *scales)
        drops = rand_items((n, 2), "mapper-drop", step, first, device)
        contexts = self._training_contexts(batch, timesteps, step, first, drops[:, 0])
        predicted = self.prior.unet(
            noisy.to(self.prior.unet.dtype),
            timesteps,
            **unet_arguments(contexts),
            **self.model.image_prompt(batch, drops[:, 1] >= self.cfg.drop_image),
            **self.prior.camera_arguments(batch["camera_a"]),
        ).sample.float()
        target = noise
        if schedule.prediction_type == "v_prediction":
            # v = a * noise - s * clean is what adding noise to the noise's own place gives.
            target = add_noise(noise, -latents, *scales)
        loss = self._mean_loss((predicted - target).square(), batch)
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss}

    def _training_contexts(self, batch, timesteps, step, first, drop) -> LayerContexts:
        levels = timesteps / self.prior.schedule.num_train_timesteps
        cuts = {
            kind: nested_cuts(mapper.config, len(timesteps), step, first)
            for kind, mapper in self.mappers.items()
        }
        prompts = self._training_prompts(batch["caption"], step, first)
        batch = self.model.with_scene_features(batch, self.mappers)
        words = self.model.words(self.mappers, batch, levels, cuts)
        contexts = self.model.injection.contexts(prompts, words)
        dropped = drop < self.cfg.drop_control
        if not bool(dropped.any()):
            return contexts
        neutral = without_control(self.model.injection, prompts, len(self.model.table))
        where = dropped.view(1, -1, 1, 1)
        return LayerContexts(
            torch.where(where, neutral.keys, contexts.keys),
            torch.where(where, neutral.values, contexts.values),
        )

    def _training_prompts(self, captions: list[str], step: int, first: int) -> PlaceholderPrompts:
        unit = rand_items((len(captions),), "mapper-template", step, first)
        drawn = drawn_templates(self.training_templates, unit)
        return self.model.prompts([fill_template(*pair) for pair in zip(drawn, captions)])

    def _mean_loss(self, errors: Float[Tensor, "b c h w"], batch: Mapping) -> Tensor:
        if not self.cfg.foreground_weight or "target_alpha" not in batch:
            return errors.mean()
        alpha = batch["target_alpha"].permute(0, 3, 1, 2)
        alpha = nn.functional.interpolate(alpha, errors.shape[-2:], mode="area")
        weights = (1 + self.cfg.foreground_weight * alpha).expand_as(errors)
        return (errors * weights).sum() / weights.sum()

    def configure_optimizers(self) -> dict[str, Any]:
        """As every system's, without weight decay for norms and biases.

        Where training starts from `mapper_weights`, rates are multiplied by `mapper_weights_lr`.
        """
        optimizer = parse_optimizer(self.cfg.optimizer, self)
        if self._loaded_kinds:
            for group in optimizer.param_groups:
                group["lr"] *= self.cfg.mapper_weights_lr
        exempt_from_decay(optimizer)
        result: dict[str, Any] = {"optimizer": optimizer}
        if self.cfg.scheduler is not None:
            result["lr_scheduler"] = parse_scheduler(self.cfg.scheduler, optimizer)
        return result

    def on_fit_start(self) -> None:
        """Give fresh mappers the ranges of the training pairs' controls."""
        super().on_fit_start()
        if self.resumed or self.cfg.weights:
            return
        batch = drawn_places(self.trainer.datamodule.train_dataset, RANGE_PAIRS)
        for kind, mapper in self.mappers.items():
            if kind not in self._loaded_kinds:
                values = control_values(mapper.axes, batch)
                mapper.set_ranges(values.to(mapper.axis_low))

    @torch.no_grad()
    def generate(
        self, batch: Mapping[str, Any], noise: Float[Tensor, "b c lh lw"]
    ) -> Float[Tensor, "b h w 3"]:
        """Images of the targets that a batch asks for, from its condition frames.

        Args:
            batch: ``cond_rgb``, ``caption``, the times and cameras of the pairs.
            noise: where sampling starts; shared noise gives cells of a grid the same details.
        """
        return self.steering.sample(batch, noise)
