"""The oracle of a test: tokens fitted to one target each, an upper bound of what a token can say.

Dimensions: ``b`` targets, ``l`` layers, ``d`` width of the text encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from threestudio.models.guidance.score_distillation import add_noise, diffusion_scales
from threestudio.utils.rng import rand_items, randn_items
from torch import Tensor

from custom.fourd.diffusion.layer_contexts import unet_arguments
from custom.fourd.mappers.composition import JOINT, TIME
from custom.fourd.mappers.control_sampling import sample_controlled
from custom.fourd.mappers.inference import TimeViewControls, on_device
from custom.fourd.mappers.mapper import MapperOutput
from custom.fourd.mappers.prompt_templates import fill_template


@dataclass
class OracleOptions:
    """Keys of `system.evaluation.oracle`."""

    pairs: int = 2
    """targets of each protocol"""
    steps: int = 100
    """updates of their tokens"""
    rate: float = 0.02
    """learning rate of Adam, of bases and bypasses at unit scale"""
    draws: int = 4
    """noise levels of each update"""


def oracle_images(
    controls: TimeViewControls,
    batch: Mapping[str, Any],
    noise: Float[Tensor, "b c lh lw"],
    options: OracleOptions,
) -> Float[Tensor, "b h w 3"]:
    """Images of targets, each by a token of its own that was fitted to it and to nothing else.

    The token is that of the time (or of both controls), with a base and a bypass for every layer,
    the same at all noise levels; the condition frame is seen as by ours.

    Random from the roles "oracle-noise" and "oracle-timesteps".

    Args:
        controls: whose model and settings are used; its mappers do not speak.
        batch: of the pair source.
        noise: where sampling starts.
        options: see `OracleOptions`.
    """
    model = controls.model
    # What an evaluation loop made cannot be saved for a backward pass; copies can.
    batch = _copied(on_device(batch, model.device))
    texts = [fill_template(controls.template, caption) for caption in batch["caption"]]
    tokens = _fit(controls, batch, texts, options)
    placeholder = JOINT if model.composition.mode == "joint_token" else TIME
    words = {placeholder: MapperOutput(*(token.detach() for token in tokens))}

    def speech(levels: Tensor) -> dict[str, MapperOutput]:
        return words

    return sample_controlled(
        model, batch, texts, noise.to(model.device), speech, speech, controls.sampling
    )


def _fit(
    controls: TimeViewControls, batch: Mapping[str, Any], texts: list[str], options: OracleOptions
) -> tuple[Tensor, Tensor]:
    model = controls.model
    prior, injection = model.prior, model.injection
    placeholder = JOINT if model.composition.mode == "joint_token" else TIME
    n, shape = len(texts), (len(model.table), len(texts), injection.width)
    start = injection.encoder.embeddings.token_embedding.weight[injection.super_ids[placeholder]]
    base = start.detach().float().expand(shape).clone().requires_grad_(True)
    # Bypasses enter by their direction, so a small start turns quickly.
    bypass = (0.01 * randn_items(shape, "oracle-bypass", 0)).to(model.device).requires_grad_(True)
    scale = float(start.detach().float().norm()) / injection.width**0.5
    optimizer = torch.optim.Adam(
        [{"params": [base], "lr": options.rate * scale}, {"params": [bypass], "lr": options.rate}]
    )
    prompts, latents = model.prompts(texts), prior.encode(batch["target_rgb"])
    abar = prior.schedule.alphas_cumprod.to(latents.device)
    count = options.draws
    image = model.image_prompt(_repeated(batch, count))
    camera = prior.camera_arguments(_repeated(batch["camera_a"], count))
    for step in range(options.steps):
        noise = randn_items((n * count, *latents.shape[1:]), "oracle-noise", step).to(latents)
        unit = rand_items((n * count,), "oracle-timesteps", step, device=latents.device)
        timesteps = (unit * len(abar)).long()
        scales = diffusion_scales(abar, timesteps)
        clean = latents.repeat(count, 1, 1, 1)
        contexts = injection.contexts(prompts, {placeholder: MapperOutput(base, bypass)})
        repeated = type(contexts)(
            contexts.keys.repeat(1, count, 1, 1), contexts.values.repeat(1, count, 1, 1)
        )
        predicted = prior.unet(
            add_noise(clean, noise, *scales).to(prior.unet.dtype),
            timesteps,
            **unet_arguments(repeated),
            **image,
            **camera,
        ).sample.float()
        target = noise
        if prior.schedule.prediction_type == "v_prediction":
            target = add_noise(noise, -clean, *scales)
        # A sum over targets: none may slow another.
        loss = (predicted - target).square().flatten(1).mean(dim=1).sum() / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return base, bypass


def _repeated(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    return {
        key: value.repeat(count, *[1] * (value.ndim - 1))
        for key, value in batch.items()
        if isinstance(value, Tensor) and value.ndim
    }


def _copied(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value.clone() if isinstance(value, Tensor)
        else _copied(value) if isinstance(value, Mapping) else value
        for key, value in batch.items()
    }  # fmt: skip
