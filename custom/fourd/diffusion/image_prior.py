"""A frozen image diffusion model with its text encoder, as time and view controls are taught on.

A diffusers folder of Stable Diffusion's layout. A multi-view model serves as a model of single
images: its attention is not joined, and the camera that it asks for is that of the image prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from threestudio.models.guidance.multiview_facts import (
    camera_vector_function,
    read_multiview_facts,
)
from threestudio.models.guidance.noise_schedule import NoiseSchedule, noise_schedule
from threestudio.utils.diffusers_folder import load_model, load_tokenizer, read_config
from threestudio.utils.pretrained import resolve_pretrained
from torch import Tensor

IMAGE_COMPONENTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class ImagePrior:
    """The parts of the model, frozen; it is no module, so no checkpoint holds it."""

    name: str
    """Id, path or ``embedded://name``."""
    revision: str | None
    """Commit of an id."""
    unet: Any
    """`UNet2DConditionModel`."""
    autoencoder: Any
    """`AutoencoderKL`, or a model with its interface."""
    text_encoder: Any
    """`CLIPTextModel`."""
    tokenizer: Any
    """Of the text encoder."""
    schedule: NoiseSchedule
    """The schedule it was trained with."""
    camera_kind: str | None
    """Kind of the camera vector that the U-Net asks for; None for an image model."""

    @torch.no_grad()
    def encode(self, rgb: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b c lh lw"]:
        """Latents of images in [0, 1], as the U-Net takes them: the posterior's mode, scaled."""
        images = rgb.permute(0, 3, 1, 2).to(self.autoencoder.dtype) * 2 - 1
        mode = self.autoencoder.encode(images).latent_dist.mode()
        return (mode * self.autoencoder.config.scaling_factor).float()

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c lh lw"]) -> Float[Tensor, "b h w 3"]:
        """Images in [0, 1] of the U-Net's latents."""
        scaled = latents.to(self.autoencoder.dtype) / self.autoencoder.config.scaling_factor
        images = self.autoencoder.decode(scaled).sample.float()
        return (0.5 * images + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    def camera_arguments(self, camera: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keyword arguments of a call of the U-Net that tell it the camera, if it asks for one.

        Args:
            camera: ``c2w`` [b 4 4] and ``fovy`` [b] in radians, of the image prompt: what is told
                of the target comes from the mappers alone.
        """
        if self.camera_kind is None:
            return {}
        vector = camera_vector_function(self.camera_kind)
        labels = vector(camera["c2w"], camera["fovy"])
        return {"class_labels": labels.to(self.unet.dtype)}


def load_image_prior(
    name: str,
    revision: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> ImagePrior:
    """Load the model, frozen and in evaluation mode.

    Args:
        name: folder in diffusers layout, hub id or ``embedded://name``.
        revision: commit of a hub id.
        device: where it goes; None leaves it where torch creates tensors.
        dtype: precision of its weights.

    Raises:
        ModelUnavailableError: the model cannot be had.
        ValueError: its U-Net asks for something that this has not.
    """
    device = torch.empty(0).device if device is None else device
    root = resolve_pretrained(name, revision, components=IMAGE_COMPONENTS)
    camera_kind = _camera_kind(name, root)
    parts = {part: load_model(root, part, device, dtype) for part in ("unet", "vae")}
    return ImagePrior(
        name=name,
        revision=revision,
        unet=parts["unet"],
        autoencoder=parts["vae"],
        text_encoder=load_model(root, "text_encoder", device, dtype),
        tokenizer=load_tokenizer(root),
        schedule=noise_schedule(read_config(root, "scheduler")),
        camera_kind=camera_kind,
    )


def _camera_kind(name: str, root: Path) -> str | None:
    config = read_config(root, "unet")
    latents = config.get("out_channels", 4)
    if config.get("in_channels", 4) != latents:
        raise ValueError(
            f"the U-Net of '{name}' takes {config['in_channels']} channels; expected {latents}, "
            "the noisy latents alone. Choose a text-to-image model, such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    if not config.get("class_embed_type"):
        return None
    if not (root / "multiview.json").is_file():
        raise ValueError(
            f"the U-Net of '{name}' takes a class vector ({config['class_embed_type']}), and no "
            "multiview.json says which; expected an image model, or a multi-view one."
        )
    return read_multiview_facts(root).camera_vector
