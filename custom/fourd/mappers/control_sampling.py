"""Sampling with controls: the predictions that a composition needs, weighed into one.

Dimensions: ``b`` images, ``c lh lw`` latents, ``h w`` pixels, ``l`` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from threestudio.models.guidance.score_distillation import diffusion_scales, split_prediction
from torch import Tensor

from custom.fourd.diffusion.ip_adapter import image_arguments
from custom.fourd.diffusion.layer_contexts import (
    Contexts,
    LayerContexts,
    joined_along_batch,
    unet_arguments,
)
from custom.fourd.diffusion.samplers import denoise_ddim, trailing_timesteps

from .composition import guidance_weights, without_control
from .control_inputs import neutral_batch
from .controlled_prior import ControlledPrior
from .mapper import Mapper, MapperOutput
from .text_injection import PlaceholderPrompts

Speech = Callable[[Float[Tensor, "b"]], Mapping[str, MapperOutput]]
"""Words by placeholder, of noise levels in [0, 1]."""
_SMALLEST_WEIGHT = 1e-9


@dataclass(frozen=True)
class SamplingOptions:
    """How images are sampled."""

    steps: int = 20
    """Calls of the denoiser (for each prediction that guidance needs)."""
    image_scale: float = 3.0
    """Guidance by the image prompt; 1 adds no emphasis."""
    control_scale: float = 4.5
    """Guidance by the controls; 1 with an image_scale of 1 needs a single prediction."""


@dataclass(frozen=True)
class _Branch:
    weight: float
    contexts: Contexts
    sees_image: bool


@torch.no_grad()
def sample_controlled(
    model: ControlledPrior,
    batch: Mapping[str, Any],
    texts: list[str],
    noise: Float[Tensor, "b c lh lw"],
    speech: Speech | None,
    at_rest: Speech | None = None,
    options: SamplingOptions | None = None,
    with_image: bool = True,
) -> Float[Tensor, "b h w 3"]:
    """Images in [0, 1], by deterministic DDIM from ``noise``.

    Args:
        model: the frozen model.
        batch: ``cond_rgb`` [b h w 3] or ``cond_features``, and ``camera_a``.
        texts: what follows the placeholders, one for each image.
        noise: where sampling starts.
        speech: what stands for the placeholders; None leaves the super-categories: no control.
        at_rest: the same with controls at rest, where the composition joins separate texts.
        options: steps and scales.
        with_image: False drops the image prompt.
    """
    options = options or SamplingOptions()
    prior, n = model.prior, len(noise)
    schedule = prior.schedule
    abar = schedule.alphas_cumprod.to(noise.device)
    prompts = model.prompts(texts)
    neutral = without_control(model.injection, prompts, len(model.table))
    features = _features(model, batch, with_image)
    camera = prior.camera_arguments(batch["camera_a"])

    def predict(latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        now = torch.full((n,), step, device=latents.device)
        levels = now / schedule.num_train_timesteps
        told = _told(model, prompts, levels, speech, at_rest)
        branches = _branches(model, told, neutral, features["image"] is not None, options)
        guided: Any = 0
        for part in _calls(branches):
            outputs = _call(prior, latents, now, part, features, camera)
            guided = guided + sum(
                branch.weight * output for branch, output in zip(part, outputs, strict=True)
            )
        scales = diffusion_scales(abar, now)
        return split_prediction(guided, latents, *scales, schedule.prediction_type)

    steps = trailing_timesteps(len(abar), options.steps)
    return prior.decode(denoise_ddim(predict, noise, abar, steps))


def mapper_speech(
    model: ControlledPrior, mappers: Mapping[str, Mapper], batch: Mapping[str, Any]
) -> tuple[Speech, Speech]:
    """What mappers say of a batch's targets, and what they say with each control at rest."""
    resting = neutral_batch(neutral_batch(batch, "time"), "view")
    return (
        lambda levels: model.words(mappers, batch, levels),
        lambda levels: model.words(mappers, resting, levels),
    )


def _told(
    model: ControlledPrior,
    prompts: PlaceholderPrompts,
    levels: Tensor,
    speech: Speech | None,
    at_rest: Speech | None,
) -> dict[str, Contexts]:
    """Texts of the predictions that see a control, by the name of their control."""
    if speech is None:
        return {}
    words = speech(levels)
    if model.composition.mode in ("tokens", "joint_token"):
        # A single mapper may speak; the other placeholder keeps its super-category.
        return {"control": model.injection.contexts(prompts, words)}
    rest = at_rest(levels) if at_rest is not None else {}
    return model.composition.branches(model.injection, prompts, words, rest)


def _branches(
    model: ControlledPrior,
    told: Mapping[str, Contexts],
    neutral: LayerContexts,
    has_image: bool,
    options: SamplingOptions,
) -> list[_Branch]:
    controls = {name: 1.0 if name == "control" else model.composition.weight(name) for name in told}
    weights = guidance_weights(controls, has_image, options.image_scale, options.control_scale)
    found = [
        _Branch(weight, told.get(name, neutral), has_image and name != "nothing")
        for name, weight in weights.items()
    ]
    return [branch for branch in found if abs(branch.weight) > _SMALLEST_WEIGHT]


def _calls(branches: list[_Branch]) -> list[list[_Branch]]:
    """Branches that one call of the denoiser serves together: those with a single text each."""
    single = [branch for branch in branches if isinstance(branch.contexts, LayerContexts)]
    others = [[branch] for branch in branches if not isinstance(branch.contexts, LayerContexts)]
    return ([single] if single else []) + others


def _call(prior, latents, now, part, features, camera) -> tuple[Tensor, ...]:
    count = len(part)
    contexts = part[0].contexts
    if isinstance(contexts, LayerContexts):
        contexts = joined_along_batch([branch.contexts for branch in part])
    call = {key: value.repeat(count, *[1] * (value.ndim - 1)) for key, value in camera.items()}
    if features["nothing"] is not None:
        seen = [features["image" if branch.sees_image else "nothing"] for branch in part]
        call |= image_arguments(torch.cat(seen))
    output = prior.unet(
        latents.to(prior.unet.dtype).repeat(count, 1, 1, 1),
        now.repeat(count),
        **unet_arguments(contexts),
        **call,
    ).sample
    return output.float().chunk(count)


def _features(
    model: ControlledPrior, batch: Mapping[str, Any], with_image: bool
) -> dict[str, Tensor | None]:
    """Vision features of no image prompt and of the batch's; None without an adapter."""
    if model.adapter_kind is None:
        return {"nothing": None, "image": None}
    none_kept = torch.zeros(len(batch["cond_rgb"]), dtype=torch.bool, device=model.device)
    return {
        "nothing": model.image_features(batch, none_kept),
        "image": model.image_features(batch) if with_image else None,
    }
