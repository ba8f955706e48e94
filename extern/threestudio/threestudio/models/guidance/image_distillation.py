"""Score distillation of single images, whatever the space that a model works in.

Dimensions: ``B`` images of the batch, ``c h w`` an image in the model's space, ``l`` and ``d``
tokens and width of a text.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threestudio.models.guidance.base import DiffusionGuidance
from threestudio.models.guidance.score_distillation import (
    add_noise,
    classifier_free_guidance,
    diffusion_scales,
    perp_neg_guidance,
    split_prediction,
)
from threestudio.models.prompt_processors.base import PromptProcessorOutput

Angles = tuple[Tensor, Tensor, Tensor]
EVAL_STEPS = 50


class ImageScore(NamedTuple):
    """What a prior answered about noisy images; all but ``timesteps`` in fp32."""

    timesteps: Int[Tensor, "B"]
    noise: Float[Tensor, "B c h w"]
    """what was drawn and added"""
    noisy: Float[Tensor, "B c h w"]
    noise_pred: Float[Tensor, "B c h w"]
    """what the model takes for the noise, after guidance"""
    denoised: Float[Tensor, "B c h w"]
    """the clean image that follows from it"""
    signal: Float[Tensor, "B"]
    noise_scale: Float[Tensor, "B"]


class ImageDistillation(DiffusionGuidance):
    """A prior that is asked about one image at a time; subclasses define `model_output`.

    Attributes:
        role: first word of the names of this guidance's random streams.
    """

    role = "image"

    @dataclass
    class Config(DiffusionGuidance.Config):
        """Keys of the contract that guidances of single images share."""

        guidance_scale: Any = 100.0
        """s of eps_text + s (eps_text - eps_uncond); diffusers' scale is s + 1."""
        weighting_strategy: str = "sds"
        """ "sds", "uniform" or "fantasia3d"; see `sds_weight`."""
        max_items_eval: int = 4
        """Images of the batch that `pictures` shows; -1 shows all."""

    cfg: Config

    def model_output(
        self,
        noisy: Float[Tensor, "n c h w"],
        timesteps: Int[Tensor, "n"],
        text: Float[Tensor, "n l d"],
        labels: Float[Tensor, "n k"] | None,
    ) -> Float[Tensor, "n c h w"]:
        """Return the model's prediction in fp32, one row for each text; to define."""
        raise NotImplementedError(f"{type(self).__name__} defines no model_output.")

    def decode(self, clean: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 3 h2 w2"]:
        """Return images in [0, 1] of what is in the model's space; to define."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode.")

    @torch.no_grad()
    def score(
        self,
        clean: Float[Tensor, "B c h w"],
        prompt_utils: PromptProcessorOutput,
        angles: Angles,
        labels: Float[Tensor, "B k"] | None = None,
    ) -> ImageScore:
        """Add noise to images and ask the model about them.

        Args:
            clean: images in the model's space.
            prompt_utils: embeddings; `angles` (elevation, azimuth, camera_distances) choose them.
            labels: class vector of each image, for a prior that has one.

        Random: noise and one timestep per image, from the step's streams.
        """
        timesteps = self.draw_timesteps(f"{self.role}-timestep", len(clean), shared=False)
        noise = self.draw_noise(f"{self.role}-noise", tuple(clean.shape))
        signal, noise_scale = diffusion_scales(self.alphas_cumprod, timesteps)
        noisy = add_noise(clean, noise, signal, noise_scale)
        noise_pred, denoised = self.predict(noisy, timesteps, prompt_utils, angles, labels)
        return ImageScore(timesteps, noise, noisy, noise_pred, denoised, signal, noise_scale)

    @torch.no_grad()
    def predict(
        self,
        noisy: Float[Tensor, "B c h w"],
        timesteps: Int[Tensor, "B"],
        prompt_utils: PromptProcessorOutput,
        angles: Angles,
        labels: Float[Tensor, "B k"] | None = None,
    ) -> tuple[Float[Tensor, "B c h w"], Float[Tensor, "B c h w"]]:
        """Return (noise_pred, denoised) of noisy images after guidance; see `score`."""
        signal, noise_scale = diffusion_scales(self.alphas_cumprod, timesteps)
        vd = self.cfg.view_dependent_prompting
        if prompt_utils.use_perp_neg:
            text, weights = prompt_utils.get_text_embeddings_perp_neg(*angles, vd)
        else:
            text, weights = prompt_utils.get_text_embeddings(*angles, vd), None
        output = self._ask(noisy, timesteps, text, labels)
        kind = self.schedule.prediction_type
        # Guidance is linear in the prediction, so its kind may be guided before it is converted,
        # except for Perp-Neg, whose projection is defined on the predicted noise.
        if weights is None:
            cond, uncond = output.chunk(2)
            guided = classifier_free_guidance(cond, uncond, self.guidance_scale, "threestudio")
            denoised, noise_pred = split_prediction(guided, noisy, signal, noise_scale, kind)
            return noise_pred, denoised
        batch = len(noisy)
        tiled = [x.repeat(2, *[1] * (x.ndim - 1)) for x in (noisy, signal, noise_scale)]
        _, pair = split_prediction(output[: 2 * batch], *tiled, kind)
        twice = [x.repeat_interleave(2, dim=0) for x in (noisy, signal, noise_scale)]
        _, others = split_prediction(output[2 * batch :], *twice, kind)
        noise_pred = perp_neg_guidance(
            *pair.chunk(2),
            others.unflatten(0, (batch, 2)),
            weights.to(others),
            self.guidance_scale,
        )
        # Where no signal is left the noise alone cannot give the clean latent; only the image loss
        # reads it, whose weight is zero there.
        signal = signal.clamp_min(1e-4)
        denoised, _ = split_prediction(noise_pred, noisy, signal, noise_scale, "epsilon")
        return noise_pred, denoised

    def _ask(self, noisy: Tensor, timesteps: Tensor, text: Tensor, labels: Tensor | None) -> Tensor:
        """Ask about each image with each of its texts, in the order of the text embeddings.

        The first two texts of all items come first, item by item; further ones are grouped by item.
        """
        index = torch.arange(len(noisy), device=noisy.device)
        copies = text.shape[0] // len(noisy)
        order = torch.cat([index.repeat(2), index.repeat_interleave(copies - 2)])
        labels = None if labels is None else labels[order]
        return self.model_output(noisy[order], timesteps[order], text.to(noisy.device), labels)

    # Pictures of what the prior makes of the renders

    @torch.no_grad()
    def pictures(
        self,
        score: ImageScore,
        prompt_utils: PromptProcessorOutput,
        angles: Angles,
        labels: Float[Tensor, "B k"] | None = None,
    ) -> dict[str, Any]:
        """Return pictures for `BaseLift3DSystem.guidance_evaluation_save`.

        The first ``max_items_eval`` images of the batch: ``imgs_noisy``; ``imgs_1step``, one step
        of a sampler later; ``imgs_1orig``, the clean image that the first answer implies;
        ``imgs_final``, the sampler's end. Each ``[n, h, w, 3]`` in [0, 1]; ``texts`` says noise
        level, elevation, azimuth and distance of each, ``noise_levels`` the first as a number and
        ``bs`` is n. The sampler is DDIM with eta 0 over the timesteps below the image's own that a
        schedule of 50 steps visits. Not differentiable, nothing is random.
        """
        count = len(score.noisy) if self.cfg.max_items_eval < 0 else self.cfg.max_items_eval
        count = min(count, len(score.noisy))
        one_step, final = [], []
        for index in range(count):
            one = slice(index, index + 1)
            ask = functools.partial(
                self.predict,
                prompt_utils=prompt_utils,
                angles=tuple(angle[one] for angle in angles),
                labels=None if labels is None else labels[one],
            )
            first, last = ddim_walk(
                ask, score.noisy[one], int(score.timesteps[index]), self.alphas_cumprod
            )
            one_step.append(first)
            final.append(last)
        levels = (score.timesteps[:count] / self.num_train_timesteps).tolist()
        shown = {
            "imgs_noisy": score.noisy[:count],
            "imgs_1step": torch.cat(one_step),
            "imgs_1orig": score.denoised[:count],
            "imgs_final": torch.cat(final),
        }
        places = zip(levels, *(angle[:count].tolist() for angle in angles))
        return {
            "bs": count,
            "noise_levels": levels,
            "texts": [f"n{n:.2f}\ne{e:.0f}\na{a:.0f}\nc{d:.2f}" for n, e, a, d in places],
            **{name: self.decode(x).permute(0, 2, 3, 1) for name, x in shown.items()},
        }


def ddim_walk(
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    noisy: Float[Tensor, "1 c h w"],
    timestep: int,
    alphas_cumprod: Float[Tensor, "t"],
    n_steps: int = EVAL_STEPS,
) -> tuple[Float[Tensor, "1 c h w"], Float[Tensor, "1 c h w"]]:
    """Denoise from one timestep by DDIM with eta 0 (Song et al. 2021, eq. 12).

    Args:
        predict: (noisy, timesteps) -> (noise_pred, denoised).
        noisy: the image at ``timestep``.
        timestep: where it stands in the schedule.
        alphas_cumprod: the schedule.
        n_steps: steps of a walk from pure noise; only those below ``timestep`` are made.

    Returns:
        The image after the first step, and at the end.
    """
    stride = max(1, len(alphas_cumprod) // n_steps)
    below = [t for t in range(0, len(alphas_cumprod), stride) if t < timestep]
    places = [timestep, *reversed(below)]
    first = None
    for here, there in zip(places, [*places[1:], None]):
        noise_pred, denoised = predict(noisy, torch.tensor([here], device=noisy.device))
        abar = alphas_cumprod.new_ones(()) if there is None else alphas_cumprod[there]
        noisy = abar.sqrt() * denoised + (1.0 - abar).sqrt() * noise_pred
        first = noisy if first is None else first
    return first, noisy
