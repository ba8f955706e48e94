"""A linear autoencoder of image patches, with the interface of diffusers' `AutoencoderKL`.

Each `patch_size` x `patch_size` patch of RGB becomes `latent_channels` numbers by one affine map
and returns by another. Being linear it passes clean gradients to score distillation, and costs
nothing beside a denoiser of the same size.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Affine patches to latents and back.

    Args:
        in_channels: image channels.
        patch_size: edge of a patch in pixels; latents are smaller by this factor.
        latent_channels: numbers per patch.
        scaling_factor: what users multiply latents by, as in `AutoencoderKL`; the weights are
            already scaled, so it is 1 unless a checkpoint says otherwise.
    """

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        patch_size: int = 4,
        latent_channels: int = 16,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        patch_numbers = in_channels * patch_size**2
        self.encoder = nn.Conv2d(patch_numbers, latent_channels, kernel_size=1)
        self.decoder = nn.Conv2d(latent_channels, patch_numbers, kernel_size=1)

    def encode(
        self, x: Float[Tensor, "b c h w"], return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Latents of images in [-1, 1]; the posterior is a point, so `mode` and `sample` agree.

        Raises:
            ValueError: an edge of the image is not a multiple of the patch size.
        """
        size = self.config.patch_size
        if x.shape[-2] % size or x.shape[-1] % size:
            raise ValueError(
                f"PatchAutoencoder got an image of {x.shape[-2]} x {x.shape[-1]} pixels; expected "
                f"multiples of its patch size {size}. Resize the image first."
            )
        mean = self.encoder(functional.pixel_unshuffle(x, size))
        posterior = DiagonalGaussianDistribution(
            torch.cat((mean, torch.zeros_like(mean)), dim=1), deterministic=True
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(
        self, z: Float[Tensor, "b c h w"], return_dict: bool = True, generator=None
    ) -> DecoderOutput | tuple[Tensor]:
        """Images, about [-1, 1], of latents. `generator` is accepted for the interface, unused."""
        sample = functional.pixel_shuffle(self.decoder(z), self.config.patch_size)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(self, sample: Float[Tensor, "b c h w"]) -> DecoderOutput:
        """The image after a round trip."""
        return self.decode(self.encode(sample).latent_dist.mode())

    @torch.no_grad()
    def fit(self, images: Float[Tensor, "b c h w"], gain: float = 0.8, power: float = 0.6) -> None:
        """Set the weights to the principal components of the images' patches.

        Channel i is scaled by gain * std_i ** -power: partly whitened, which lets a denoiser learn
        colour and shape at once while the strongest components stay the strongest.
        """
        patches = functional.pixel_unshuffle(images.double(), self.config.patch_size)
        rows = patches.permute(0, 2, 3, 1).reshape(-1, patches.shape[1])
        mean = rows.mean(dim=0)
        variances, axes = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
        order = variances.argsort(descending=True)[: self.config.latent_channels]
        axes, std = axes[:, order], variances[order].clamp_min(1e-12).sqrt()
        # The sign of an eigenvector is arbitrary; fixing it makes the fit reproducible.
        axes = axes * axes.gather(0, axes.abs().argmax(dim=0, keepdim=True)).sign()
        scale = gain * std**-power
        encode = (axes * scale).T
        decode = axes / scale
        self.encoder.weight.copy_(encode[:, :, None, None])
        self.encoder.bias.copy_(-encode @ mean)
        self.decoder.weight.copy_(decode[:, :, None, None])
        self.decoder.bias.copy_(mean)
