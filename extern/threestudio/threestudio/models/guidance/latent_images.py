"""Images to latents and back, through a diffusers autoencoder, with gradients.

Every draw comes from the caller's own streams.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def resize_images(
    images: Float[Tensor, "b c h w"], size: tuple[int, int]
) -> Float[Tensor, "b c h2 w2"]:
    """Resize bilinearly, with a low-pass filter where the images get smaller."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return functional.interpolate(
        images, size, mode="bilinear", align_corners=False, antialias=True
    )


def encode_images(
    autoencoder,
    images: Float[Tensor, "b 3 *f h w"],
    draw_noise: Callable[[tuple[int, ...]], Tensor] | None = None,
) -> Float[Tensor, "b c *f2 h2 w2"]:
    """Encode images (or clips) in [0, 1] to scaled latents, in fp32; differentiable in the images.

    Args:
        autoencoder: `AutoencoderKL` or a model with its interface; its dtype is used inside.
        images: RGB in [0, 1], of clips for an autoencoder of clips.
        draw_noise: returns N(0, 1) values of a shape, with which the posterior is sampled; not
            called for a posterior without variance. None gives the mean.
    """
    parameter = next(autoencoder.parameters())
    posterior = autoencoder.encode((images * 2.0 - 1.0).to(parameter.dtype)).latent_dist
    latents = posterior.mean.float()
    if draw_noise is not None and not posterior.deterministic:
        latents = latents + posterior.std.float() * draw_noise(tuple(latents.shape))
    shift, scale = _normalisation(autoencoder, latents)
    return (latents - shift) * scale


def encode_renders(
    autoencoder,
    rgb: Float[Tensor, "b h w k"],
    image_size: int,
    draw_noise: Callable[[tuple[int, ...]], Tensor] | None = None,
    rgb_as_latents: bool = False,
) -> Float[Tensor, "b c h2 w2"]:
    """Return scaled latents of square renders, at the size that a model sees; differentiable.

    Args:
        autoencoder: as `encode_images` takes it.
        rgb: images in [0, 1], or latents of the model's channels.
        image_size: edge of the images that the model sees, pixels.
        draw_noise: see `encode_images`.
        rgb_as_latents: ``rgb`` holds latents, which are only resized.
    """
    images = rgb.permute(0, 3, 1, 2).float()
    if rgb_as_latents:
        size = latent_size(autoencoder, image_size)
        return resize_images(images, (size, size))
    return encode_images(autoencoder, resize_images(images, (image_size, image_size)), draw_noise)


@torch.no_grad()
def decode_latents(
    autoencoder, latents: Float[Tensor, "b c *f h w"]
) -> Float[Tensor, "b 3 *f2 h2 w2"]:
    """Decode scaled latents to images in [0, 1], clamped, in fp32."""
    parameter = next(autoencoder.parameters())
    shift, scale = _normalisation(autoencoder, latents)
    unscaled = latents / scale + shift
    images = autoencoder.decode(unscaled.to(parameter.dtype)).sample.float()
    return (images * 0.5 + 0.5).clamp(0.0, 1.0)


def _normalisation(autoencoder, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """Return (shift, scale): numbers, or one of each for every channel."""
    config = autoencoder.config
    scale = getattr(config, "scaling_factor", None) or 1.0
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, scale
    shape = (-1, *[1] * (latents.ndim - 2))
    return latents.new_tensor(mean).view(shape), scale / latents.new_tensor(std).view(shape)


def pixels_per_latent(autoencoder) -> int:
    """Return the edge in pixels of what one latent stands for."""
    config = autoencoder.config
    patch = getattr(config, "scale_factor_spatial", None) or getattr(config, "patch_size", None)
    return patch or 2 ** (len(config.block_out_channels) - 1)


def latent_size(autoencoder, image_size: int) -> int:
    """Return the edge of the latents of a square image, in latent pixels."""
    return image_size // pixels_per_latent(autoencoder)
