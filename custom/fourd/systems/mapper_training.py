"""What the systems of time and view control share: the loss of a step, and sampling with controls.

Of a pair (frame i by camera a) -> (frame j by camera b) the denoiser is shown noisy latents of the
target, the prompt with the mappers' words, and, where an IP-Adapter is loaded, the condition frame.
Only the mappers learn; the denoiser, its autoencoder and its text encoder are frozen, and gradients
pass through them.

Dimensions: ``b`` pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from threestudio.models.guidance.score_distillation import (
    add_noise,
    diffusion_scales,
    split_prediction,
)
from threestudio.systems.base import BaseSystem
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.misc import get_device, get_rank
from threestudio.utils.pretrained import RequiredModel, resolve_checkpoint_file, resolve_pretrained
from threestudio.utils.rng import rand_items, randn_items
from torch import Tensor, nn

from custom.fourd.diffusion.image_prior import IMAGE_COMPONENTS, ImagePrior, load_image_prior
from custom.fourd.diffusion.ip_adapter import (
    clip_pixels,
    image_arguments,
    image_features,
    ip_adapter_kind,
    load_ip_adapter,
    without_image,
)
from custom.fourd.diffusion.layer_contexts import (
    LayerContexts,
    joined_along_batch,
    set_layer_contexts,
    unet_arguments,
)
from custom.fourd.diffusion.samplers import denoise_ddim, trailing_timesteps
from custom.fourd.mappers.checkpoint import MapperFacts, save_mapper
from custom.fourd.mappers.composition import (
    JOINT,
    TIME,
    VIEW,
    Composition,
    guided_by_image_and_control,
    without_control,
)
from custom.fourd.mappers.control_inputs import control_values
from custom.fourd.mappers.mapper import (
    Mapper,
    MapperConfig,
    MapperOutput,
    exempt_from_decay,
    nested_cuts,
)
from custom.fourd.mappers.text_injection import InjectionConfig, PlaceholderPrompts, TextInjection

from .mapper_evaluation import MapperEvaluation
from .training_clock import TrainingClock

PLACEHOLDERS = {"time": TIME, "view": VIEW, "joint": JOINT}


class MapperTraining(MapperEvaluation, TrainingClock, BaseSystem):
    """Trains the mappers named by `controls`; a registered system says which these are."""

    controls: tuple[str, ...] = ()
    strict_optimizer_groups = True

    @dataclass
    class Config(BaseSystem.Config):
        base_model: str = "embedded://multiview"
        """Frozen image model: id, folder or embedded://name"""
        revision: str | None = None
        """commit of base_model, if that is an id"""
        ip_adapter: dict | None = None
        """null, or {weights: file, image_encoder: folder or id, image_encoder_folder, scale}"""
        mapper: dict = field(default_factory=dict)
        """keys of `MapperConfig` but for kind, width and n_layers"""
        injection: dict = field(default_factory=dict)
        """keys of `InjectionConfig`"""
        prompt_template: str = "a photo of {caption}"
        """what follows the placeholders; {caption} is the pair's"""
        drop_control: float = 0.075
        """share of pairs that see the super-categories in place of the controls"""
        drop_image: float = 0.05
        """share of pairs that see no image prompt"""
        foreground_weight: float = 0.0
        """w: the loss of a latent counts 1 + w * alpha of the target"""
        sampling_steps: int = 20
        """calls of the denoiser for one image"""
        image_scale: float = 3.0
        """guidance by the image prompt"""
        control_scale: float = 4.5
        """guidance by the controls"""

    cfg: Config

    @classmethod
    def required_models(cls, cfg: Mapping[str, Any]) -> list[str]:
        """List the folders that a system of this configuration loads."""
        name = cfg.get("base_model") or cls.Config.base_model
        models = [RequiredModel(name, IMAGE_COMPONENTS, cfg.get("revision"))]
        adapter = cfg.get("ip_adapter")
        if adapter:
            part = adapter.get("image_encoder_folder") or "image_encoder"
            models += [adapter["weights"], RequiredModel(adapter["image_encoder"], (part,), None)]
        return models

    def configure(self) -> None:
        """Load the frozen model and build the mappers.

        Raises:
            ModelUnavailableError: a model cannot be had.
            ValueError: keys that do not fit the model.
        """
        cfg = self.cfg
        self.prior: ImagePrior = load_image_prior(cfg.base_model, cfg.revision, get_device())
        self._load_adapter()
        self.table = set_layer_contexts(self.prior.unet)
        self.composition = Composition("joint_token" if self.controls == ("joint",) else "tokens")
        self.injection = TextInjection(
            self.prior.text_encoder,
            self.prior.tokenizer,
            self.composition.super_categories,
            InjectionConfig(**cfg.injection),
        )
        self.mappers = nn.ModuleDict({kind: self._build_mapper(kind) for kind in self.controls})

    def _build_mapper(self, kind: str) -> Mapper:
        given = {**self.cfg.mapper}
        if "hidden" in given:
            given["hidden"] = tuple(given["hidden"])
        try:
            config = MapperConfig(
                kind=kind, width=self.injection.width, n_layers=len(self.table), **given
            )
        except TypeError as error:
            known = sorted(set(MapperConfig.__dataclass_fields__) - {"kind", "width", "n_layers"})
            raise ValueError(
                f"system.mapper has keys that do not fit ({error}); expected some of "
                f"{', '.join(known)}."
            ) from error
        return Mapper(config, self.injection.base_norm(PLACEHOLDERS[kind]))

    def _load_adapter(self) -> None:
        given = self.cfg.ip_adapter
        self.adapter_kind: str | None = None
        if not given:
            return
        from threestudio.utils.diffusers_folder import load_model

        path = Path(resolve_checkpoint_file(given["weights"]))
        load_ip_adapter(
            self.prior.unet,
            str(path.parent),
            given.get("scale", 0.5),
            weight_name=path.name,
        )
        self.adapter_kind = ip_adapter_kind(self.prior.unet)
        part = given.get("image_encoder_folder") or "image_encoder"
        root = resolve_pretrained(given["image_encoder"], None, components=(part,))
        # In a list, so that it is no submodule: checkpoints hold what was trained.
        self._vision = [load_model(root, part, get_device())]

    # What the denoiser is given

    def words(
        self,
        batch: Mapping[str, Any],
        noise_levels: Float[Tensor, "b"],
        cuts: Mapping[str, Int[Tensor, "l b"] | None] | None = None,
    ) -> dict[str, MapperOutput]:
        """What the mappers say of a batch's targets at these noise levels, by placeholder."""
        return {
            PLACEHOLDERS[kind]: mapper(
                noise_levels, control_values(mapper.axes, batch), cuts=(cuts or {}).get(kind)
            )
            for kind, mapper in self.mappers.items()
        }

    def prompts(self, captions: list[str]) -> PlaceholderPrompts:
        """The batch's prompts, with both placeholders in their places."""
        filled = [self.cfg.prompt_template.format(caption=caption) for caption in captions]
        return self.injection.tokenize([self.composition.prompt(text) for text in filled])

    def image_prompt(self, rgb: Float[Tensor, "b h w 3"], kept: Tensor | None = None) -> dict:
        """Arguments of the denoiser for condition frames; those not ``kept`` are no prompt."""
        if self.adapter_kind is None:
            return {}
        (vision,) = self._vision
        pixels = clip_pixels(rgb, vision.config.image_size).to(vision.dtype)
        features = image_features(vision, pixels, self.adapter_kind)
        if kept is not None:
            nothing = without_image(vision, pixels, self.adapter_kind)
            features = torch.where(kept.view(-1, *[1] * (features.ndim - 1)), features, nothing)
        return image_arguments(features)

    # Training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """The denoiser's own loss on noisy targets, seen through the mappers' words.

        Random, per pair: noise, noise level, and whether control and image are dropped, from the
        roles "mapper-noise", "mapper-timesteps", "mapper-drop".
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
            **self.image_prompt(batch["cond_rgb"], drops[:, 1] >= self.cfg.drop_image),
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
        prompts = self.prompts(batch["caption"])
        contexts = self.injection.contexts(prompts, self.words(batch, levels, cuts))
        dropped = drop < self.cfg.drop_control
        if not bool(dropped.any()):
            return contexts
        neutral = without_control(self.injection, prompts, len(self.table))
        where = dropped.view(1, -1, 1, 1)
        return LayerContexts(
            torch.where(where, neutral.keys, contexts.keys),
            torch.where(where, neutral.values, contexts.values),
        )

    def _mean_loss(self, errors: Float[Tensor, "b c h w"], batch: Mapping) -> Tensor:
        if not self.cfg.foreground_weight or "target_alpha" not in batch:
            return errors.mean()
        alpha = batch["target_alpha"].permute(0, 3, 1, 2)
        alpha = nn.functional.interpolate(alpha, errors.shape[-2:], mode="area")
        weights = (1 + self.cfg.foreground_weight * alpha).expand_as(errors)
        return (errors * weights).sum() / weights.sum()

    def configure_optimizers(self) -> dict[str, Any]:
        """As every system's, without weight decay for norms and biases."""
        optimizer = parse_optimizer(self.cfg.optimizer, self)
        exempt_from_decay(optimizer)
        result: dict[str, Any] = {"optimizer": optimizer}
        if self.cfg.scheduler is not None:
            result["lr_scheduler"] = parse_scheduler(self.cfg.scheduler, optimizer)
        return result

    # Sampling

    @torch.no_grad()
    def generate(
        self, batch: Mapping[str, Any], noise: Float[Tensor, "b c lh lw"]
    ) -> Float[Tensor, "b h w 3"]:
        """Images of the targets that a batch asks for, from its condition frames.

        Args:
            batch: ``cond_rgb``, ``caption``, the times and cameras of the pairs.
            noise: where sampling starts; shared noise gives cells of a grid the same details.
        """
        n, schedule = len(noise), self.prior.schedule
        abar = schedule.alphas_cumprod.to(noise.device)
        prompts = self.prompts(batch["caption"])
        neutral = without_control(self.injection, prompts, len(self.table))
        call = self._branches(batch)
        n_branches = 2 if self.adapter_kind is None else 3

        def predict(latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
            now = torch.full((n,), step, device=latents.device)
            words = self.words(batch, now / schedule.num_train_timesteps)
            told = self.injection.contexts(prompts, words)
            contexts = joined_along_batch([neutral] * (n_branches - 1) + [told])
            repeated = latents.to(self.prior.unet.dtype).repeat(n_branches, 1, 1, 1)
            output = self.prior.unet(
                repeated, now.repeat(n_branches), **unet_arguments(contexts), **call
            ).sample.float()
            parts = output.chunk(n_branches)
            guided = guided_by_image_and_control(
                parts[0], parts[-2], parts[-1], self.cfg.image_scale, self.cfg.control_scale
            )
            scales = diffusion_scales(abar, now)
            return split_prediction(guided, latents, *scales, schedule.prediction_type)

        steps = trailing_timesteps(len(abar), self.cfg.sampling_steps)
        return self.prior.decode(denoise_ddim(predict, noise, abar, steps))

    def _branches(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of all branches at once: nothing, image alone, image and control."""
        n_branches = 2 if self.adapter_kind is None else 3
        call = {
            key: value.repeat(n_branches, *[1] * (value.ndim - 1))
            for key, value in self.prior.camera_arguments(batch["camera_a"]).items()
        }
        if n_branches == 2:
            return call
        rgb = batch["cond_rgb"].repeat(3, 1, 1, 1)
        kept = torch.arange(len(rgb), device=rgb.device) >= len(batch["cond_rgb"])
        return {**call, **self.image_prompt(rgb, kept)}

    # Keeping the mappers

    def save_mappers(self, folder: str | Path) -> list[Path]:
        """Write each mapper as safetensors and JSON, with all that it needs to be used again."""
        adapter = self.cfg.ip_adapter or {}
        facts = MapperFacts(
            base_model=self.prior.name,
            base_revision=self.prior.revision,
            layer_table=self.table,
            injection=self.injection.config,
            prompt_template=self.composition.prompt(self.cfg.prompt_template),
            step=self.true_global_step,
            ip_adapter=adapter.get("weights"),
            ip_adapter_scale=adapter.get("scale"),
        )
        return [
            save_mapper(Path(folder) / f"{kind}-mapper-step-{facts.step}", mapper, facts)[0]
            for kind, mapper in self.mappers.items()
        ]
