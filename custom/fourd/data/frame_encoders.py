"""Frozen encoders whose results are kept beside a grid: a VAE's latents, a vision model's features.

An encoder's `identity` says which weights made a result, so that it is never taken for another's.

Legend: b images of h x w pixels, tokens of some width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from threestudio.utils.misc import get_device
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
KINDS_OF_FEATURES = ("plus", "base")


class FrameEncoder(Protocol):
    """What turns images into rows of a cache."""

    identity: dict[str, Any]
    """Name, part, output and fingerprint of the model, as JSON has it."""

    def encode(self, rgb: Float[Tensor, "b h w 3"]) -> Tensor:
        """Return one row [b ...] per image in [0, 1]."""
        ...


def latents_identity(model: str, revision: str | None = None) -> dict[str, Any]:
    """Return the identity of a model's VAE, from its files alone.

    Raises:
        ModelUnavailableError: the model is not on this disk and cannot be had.
    """
    return _identity(model, revision, "vae", "mode")


def features_identity(
    model: str, kind: str = "plus", revision: str | None = None, folder: str = "image_encoder"
) -> dict[str, Any]:
    """Return the identity of a model's vision encoder, from its files alone.

    Args:
        kind, folder: see `VisionEncoder`.

    Raises:
        ModelUnavailableError: the model is not on this disk and cannot be had.
    """
    return _identity(model, revision, folder, kind)


def _identity(model: str, revision: str | None, part: str, output: str) -> dict[str, Any]:
    from threestudio.utils.diffusers_folder import folder_fingerprint
    from threestudio.utils.pretrained import resolve_pretrained

    root = resolve_pretrained(model, revision=revision, components=(part,))
    return {
        "model": model,
        "revision": revision,
        "part": part,
        "output": output,
        "fingerprint": folder_fingerprint(root, (part,)),
    }


class LatentEncoder:
    """A VAE's latents as a denoiser takes them: the posterior's mode, shifted and scaled.

    Args:
        model: id, folder or ``embedded://name`` of a diffusers model. revision: of an id.
    """

    def __init__(self, model: str, revision: str | None = None) -> None:
        self.identity = latents_identity(model, revision)
        self._vae = _load(model, revision, "vae")

    @torch.no_grad()
    def encode(self, rgb: Float[Tensor, "b h w 3"]) -> Float[Tensor, "b c lh lw"]:
        """Return latents of images in [0, 1]."""
        images = rgb.permute(0, 3, 1, 2).to(self._vae.device) * 2 - 1
        latents = self._vae.encode(images.to(self._vae.dtype)).latent_dist.mode()
        shift = getattr(self._vae.config, "shift_factor", None) or 0.0
        return ((latents - shift) * self._vae.config.scaling_factor).float()


class VisionEncoder:
    """A CLIP vision model's features, as IP-Adapter takes them.

    The middle square of an image is resized to the model's size, edges smoothed.

    Args:
        model: id, folder or ``embedded://name`` of a model that holds one.
        kind: "plus" for the states of the layer before the last [b tokens width], as IP-Adapter
            plus takes them; "base" for the projected embedding [b width] of the base adapter.
        revision: of an id.
        folder: where in the model it is, such as ``models/image_encoder``.
    """

    def __init__(
        self,
        model: str,
        kind: str = "plus",
        revision: str | None = None,
        folder: str = "image_encoder",
    ) -> None:
        if kind not in KINDS_OF_FEATURES:
            raise ValueError(
                f"the kind of vision features is {kind!r}; expected one of "
                f"{', '.join(KINDS_OF_FEATURES)}."
            )
        self.identity = features_identity(model, kind, revision, folder)
        self.kind = kind
        self._model = _load(model, revision, folder)

    @torch.no_grad()
    def encode(self, rgb: Float[Tensor, "b h w 3"]) -> Tensor:
        """Return the features of images in [0, 1]."""
        size = self._model.config.image_size
        images = _middle_square(rgb.permute(0, 3, 1, 2)).to(self._model.device)
        images = torch.nn.functional.interpolate(
            images, (size, size), mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
        out = self._model(
            pixel_values=((images - mean) / std).to(self._model.dtype), output_hidden_states=True
        )
        chosen = out.image_embeds if self.kind == "base" else out.hidden_states[-2]
        return chosen.float()


def _middle_square(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _load(model: str, revision: str | None, part: str) -> torch.nn.Module:
    from threestudio.utils.diffusers_folder import load_model
    from threestudio.utils.pretrained import resolve_pretrained

    root = resolve_pretrained(model, revision=revision, components=(part,))
    return load_model(root, part, get_device())
