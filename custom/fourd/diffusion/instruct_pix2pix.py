"""Facts of InstructPix2Pix (Brooks et al. 2023): its three branches, its condition, its sizes.

The U-Net sees noisy latents beside the latents of the image to edit. Its guidance has three
branches, always in this order: [text and image, no text and image, no text and no image].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.noise_schedule import NoiseSchedule, noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import resolve_pretrained
from torch import Tensor

NUM_BRANCHES = 3


@dataclass(frozen=True)
class EditPrior:
    """A frozen image-editing diffusion model."""

    unet: torch.nn.Module
    """`UNet2DConditionModel`, input channels: noisy latents, then those of the condition."""
    autoencoder: torch.nn.Module
    """`AutoencoderKL`, or a model with its interface."""
    schedule: NoiseSchedule
    """The schedule it was trained with."""
    final_alpha_cumprod: float
    """abar after the last denoising step."""


def load_edit_prior(
    name: str,
    revision: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> EditPrior:
    """Load an InstructPix2Pix model, frozen and in evaluation mode.

    Args:
        name: folder in diffusers layout, hub id or ``embedded://name``.
        revision: commit of a hub id.
        device: where the model goes; None leaves it where torch creates tensors.
        dtype: precision of its weights.
        channels_last: memory layout of the U-Net's weights.

    Raises:
        ModelUnavailableError: if the model cannot be had.
        ValueError: if its U-Net has no place for a condition image, or wants a class vector.
    """
    device = torch.empty(0).device if device is None else device
    root = resolve_pretrained(name, revision, components=PRIOR_COMPONENTS)
    _check_unet(name, root)
    unet = load_model(root, "unet", device, dtype)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    config = read_config(root, "scheduler")
    schedule = noise_schedule(config)
    # What a scheduler's file does not say is false, as in Stable Diffusion 1's; the last step then
    # ends at the schedule's first abar rather than at 1.
    final = 1.0 if config.get("set_alpha_to_one") else float(schedule.alphas_cumprod[0])
    return EditPrior(unet, load_model(root, "vae", device, dtype), schedule, final)


def _check_unet(name: str, root: Path) -> None:
    config = read_config(root, "unet")
    channels, wanted = config.get("in_channels"), 2 * config.get("out_channels", 4)
    if channels != wanted:
        raise ValueError(
            f"The U-Net of '{name}' takes {channels} channels; expected {wanted}, noisy latents "
            "and those of the image to edit. Choose an InstructPix2Pix model, such as "
            "timbrooks/instruct-pix2pix or embedded://edit."
        )
    if config.get("class_embed_type"):
        raise ValueError(
            f"The U-Net of '{name}' takes a class vector ({config['class_embed_type']}); expected "
            "an image editor without one. Choose an InstructPix2Pix model."
        )


def three_branch_guidance(
    text: Float[Tensor, "b ..."],
    image: Float[Tensor, "b ..."],
    uncond: Float[Tensor, "b ..."],
    guidance_scale: float,
    image_guidance_scale: float,
) -> Float[Tensor, "b ..."]:
    """Combine the branches (Brooks et al. 2023, eq. 3).

    uncond + guidance_scale (text - image) + image_guidance_scale (image - uncond). The weights of
    the three add up to 1, so velocities combine as noises do.

    Args:
        text: prediction with instruction and image.
        image: with the image alone.
        uncond: with neither.
    """
    return uncond + guidance_scale * (text - image) + image_guidance_scale * (image - uncond)


def needed_branches(guidance_scale: float, image_guidance_scale: float) -> tuple[int, ...]:
    """Which of the three branches have a weight in `three_branch_guidance`, in its order.

    The weights are guidance_scale, image_guidance_scale - guidance_scale and
    1 - image_guidance_scale; where both scales are 1 the first branch alone is the result.
    """
    weights = (
        guidance_scale,
        image_guidance_scale - guidance_scale,
        1.0 - image_guidance_scale,
    )
    return tuple(branch for branch, weight in enumerate(weights) if weight != 0.0)


@torch.no_grad()
def condition_latents(autoencoder, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
    """Latents of the images to edit: the posterior's mode, not scaled by the scaling factor.

    Args:
        images: RGB in [0, 1].
    """
    parameter = next(autoencoder.parameters())
    posterior = autoencoder.encode((images * 2.0 - 1.0).to(parameter.dtype)).latent_dist
    return posterior.mode().float()


def editing_size(
    height: int, width: int, pixels: int = 8, longest: int | None = None
) -> tuple[int, int]:
    """Return (height, width) at which images are edited; they are resized to it and back.

    Without ``longest`` both edges are floored to whole latents. With it, the image is scaled so
    that its longer edge is about ``longest`` and its shorter one is rounded up to whole blocks of 8
    latents; both edges are then floored to such blocks (Instruct 4D-to-4D's ``resize``).

    Args:
        pixels: edge in pixels of what one latent stands for, 8 in Stable Diffusion, 4 when
            embedded.
        longest: pixels, or None.

    Raises:
        ValueError: if nothing is left of an edge.
    """
    if longest is None:
        size = height // pixels * pixels, width // pixels * pixels
    else:
        block, shorter = 8 * pixels, min(height, width)
        # In fractions of whole numbers: a rounding error below a whole block would lose that block.
        blocks = math.ceil(shorter * longest / (max(height, width) * block))
        size = tuple(edge * blocks // shorter * block for edge in (height, width))
    if min(size) < 1:
        raise ValueError(
            f"an image of {height} x {width} pixels holds no whole latent of {pixels} pixels; "
            "expected larger images, or a resize in pixels that makes them so."
        )
    return size


def draw_frames(
    shape: tuple[int, ...],
    generators: list[torch.Generator],
    shared: Float[Tensor, "..."] | None = None,
    shared_share: float = 0.0,
) -> Float[Tensor, "b ..."]:
    """Draw N(0, 1), row i from ``generators[i]``, with a share of the variance common to all rows.

    Args:
        shape: of the result; shape[0] rows.
        shared: N(0, 1) values of one row, what the rows have in common.
        shared_share: s in [0, 1]; rows are sqrt(s) shared + sqrt(1 - s) own, again N(0, 1).
    """
    own = torch.stack(
        [torch.randn(shape[1:], generator=g, device=g.device).cpu() for g in generators]
    )
    if shared is None or shared_share == 0.0:
        return own
    return math.sqrt(shared_share) * shared + math.sqrt(1.0 - shared_share) * own
