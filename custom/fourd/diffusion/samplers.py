"""Samplers: from noise and text to clean latents, for looking at a prior and for measuring it.

Dimensions: ``b`` latents, ``l`` text tokens, ``d`` text width, ``k`` numbers of a camera vector.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.models.guidance.score_distillation import (
    classifier_free_guidance,
    diffusion_scales,
    rescale_denoised,
    split_prediction,
)
from torch import Tensor

SPACINGS = ("leading", "trailing")


def trailing_timesteps(start: int, steps: int) -> list[int]:
    """Return ``steps`` timesteps from ``start`` - 1 downwards, equally spaced ("trailing").

    From all training steps the first is the last one, which a schedule with zero terminal SNR
    needs: only there is pure noise what the model was trained on (Lin et al. 2023, section 3.3).

    Raises:
        ValueError: if ``steps`` is not in [1, start].
    """
    if not 1 <= steps <= start:
        raise ValueError(
            f"steps is {steps}; expected a number from 1 to {start}, the training steps that they "
            "are spread over."
        )
    stride = start / steps
    return [round(start - i * stride) - 1 for i in range(steps)]


def partial_timesteps(
    start: int, steps: int, num_train_timesteps: int = 1000, spacing: str = "leading"
) -> list[int]:
    """Return the timesteps of a denoising that begins part of the way, Instruct 4D-to-4D's T and n.

    They are k floor(T / n) + 1 for k from n - 1 down to 0: T spreads the steps, and the first one
    lies a stride below it. The schedule's own table stays whole.

    Args:
        start: T, in training steps; strength of the edit.
        steps: n, number of U-Net calls.
        num_train_timesteps: training steps of the schedule.
        spacing: "leading", as above and as published; or "trailing", from T - 1 downwards, so that
            few steps begin as noisy as many do.

    Raises:
        ValueError: unless 1 <= n <= T and the first timestep is one of the schedule; or another
            spacing.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spacing is {spacing!r}; expected one of {', '.join(SPACINGS)}.")
    if spacing == "trailing":
        if start > num_train_timesteps:
            raise ValueError(
                f"start is {start}; expected at most {num_train_timesteps}, the schedule's "
                "training steps."
            )
        return trailing_timesteps(start, steps)
    if not 1 <= steps <= start:
        raise ValueError(
            f"steps is {steps} and start {start}; expected 1 <= steps <= start, for example "
            "start=600, steps=5."
        )
    stride = start // steps
    first = (steps - 1) * stride + 1
    if first >= num_train_timesteps:
        raise ValueError(
            f"start {start} with {steps} steps begins at timestep {first}; expected one below "
            f"{num_train_timesteps}, the schedule's training steps. Lower start."
        )
    return [k * stride + 1 for k in reversed(range(steps))]


def denoise_ddim(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    latents: Float[Tensor, "b ..."],
    alphas_cumprod: Float[Tensor, "t"],
    timesteps: Sequence[int],
    final_alpha_cumprod: float | Tensor = 1.0,
) -> Float[Tensor, "b ..."]:
    """Run deterministic DDIM over given timesteps (Song et al. 2021, eq. 12 with eta = 0).

    Args:
        predict: (latents, timestep) -> (denoised, noise_pred), both of the latents' shape.
        latents: noisy latents at the first timestep.
        alphas_cumprod: cumulative product abar of the schedule.
        timesteps: falling indices into it.
        final_alpha_cumprod: abar after the last step; 1 is the denoised prediction itself.

    Returns:
        Latents after the last step.
    """
    following = [*(alphas_cumprod[step] for step in timesteps[1:]), final_alpha_cumprod]
    for step, after in zip(timesteps, following, strict=True):
        denoised, noise_pred = predict(latents, step)
        after = torch.as_tensor(after, dtype=latents.dtype, device=latents.device)
        latents = after.sqrt() * denoised + (1.0 - after).sqrt() * noise_pred
    return latents


@torch.no_grad()
def sample_ddim(
    unet,
    scheduler,
    text_embeddings: Float[Tensor, "2b l d"],
    camera: Float[Tensor, "rows k"] | None,
    shape: tuple[int, ...],
    steps: int,
    guidance_scale: float,
    generator: torch.Generator | None,
    guidance_rescale: float = 0.0,
    group_size: int = 1,
) -> Float[Tensor, "b c h w"]:
    """Sample latents with deterministic DDIM (Song et al. 2021, eta = 0).

    Args:
        unet: a `UNet2DConditionModel`; its dtype and device decide those of the sampling.
        scheduler: diffusers scheduler or its config: betas, prediction type, number of steps.
        text_embeddings: conditional half first, then the unconditional half.
        camera: class vector of each view, b rows that serve both halves or 2b rows, conditional
            half first; None for a model without one.
        shape: shape of the latents, (b, c, h, w); view groups contiguous.
        steps: number of U-Net calls.
        guidance_scale: standard convention; 1 evaluates the conditional half alone.
        generator: draws the starting noise, on its own device; None starts from zeros.
        guidance_rescale: strength of `rescale_denoised`, 0 to 1.
        group_size: number of views that share one rescale factor.

    Returns:
        Clean latents in the U-Net's scaling (divide by the autoencoder's scaling factor to decode).

    Raises:
        ValueError: if text or camera do not fit ``shape``, or ``steps`` is out of range.
    """
    schedule = noise_schedule(scheduler)
    batch = shape[0]
    if text_embeddings.shape[0] != 2 * batch:
        raise ValueError(
            f"text_embeddings holds {text_embeddings.shape[0]} rows; expected {2 * batch}, the "
            f"conditional rows and then the unconditional ones of {batch} latents."
        )
    if camera is not None and camera.shape[0] not in (batch, 2 * batch):
        raise ValueError(
            f"camera holds {camera.shape[0]} rows; expected {batch}, one per latent, or "
            f"{2 * batch}, one per row of text_embeddings."
        )
    parameter = next(unet.parameters())
    abar = schedule.alphas_cumprod.to(parameter.device)
    text = text_embeddings.to(parameter)
    latents = _starting_noise(shape, generator).to(parameter.device)
    halves = 1 if guidance_scale == 1 else 2
    labels = None
    if camera is not None:
        labels = camera.to(parameter).repeat(2 * batch // camera.shape[0], 1)[: halves * batch]

    def predict(latents: Tensor, step: int) -> tuple[Tensor, Tensor]:
        now = torch.full((batch,), step, device=latents.device)
        output = unet(
            latents.to(parameter.dtype).repeat(halves, 1, 1, 1),
            now.repeat(halves),
            encoder_hidden_states=text[: halves * batch],
            class_labels=labels,
        ).sample.float()
        signal, noise = diffusion_scales(abar, now)
        cond = output[:batch]
        guided = classifier_free_guidance(cond, output[-batch:], guidance_scale)
        denoised, noise_pred = split_prediction(
            guided, latents, signal, noise, schedule.prediction_type
        )
        if guidance_rescale > 0 and halves == 2:
            denoised_cond, _ = split_prediction(
                cond, latents, signal, noise, schedule.prediction_type
            )
            denoised = rescale_denoised(denoised, denoised_cond, group_size, guidance_rescale)
        return denoised, noise_pred

    return denoise_ddim(predict, latents, abar, trailing_timesteps(len(abar), steps))


def _starting_noise(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator, device=generator.device)
