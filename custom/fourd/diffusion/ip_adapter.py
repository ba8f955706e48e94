"""An IP-Adapter on a U-Net without a pipeline: its weights, its scale, its image features.

Two kinds exist, told apart by their keys. `base` makes 4 tokens of the pooled vision feature (the
projected `image_embeds`); `plus` makes 16 of all patch states of the vision encoder's layer before
the last, and holds on to the layout of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from diffusers.loaders import IPAdapterMixin
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionModelWithProjection

DEFAULT_SCALE = 0.5
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class _Holder(IPAdapterMixin):
    """What diffusers' loader asks of a pipeline."""

    unet_name = "unet"

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet


def load_ip_adapter(
    unet: UNet2DConditionModel,
    weights: str | Mapping[str, Mapping[str, Tensor]],
    scale: float = DEFAULT_SCALE,
    subfolder: str = "",
    weight_name: str | None = None,
) -> None:
    """Put an IP-Adapter on the U-Net, frozen, at ``scale``.

    Every attention processor is replaced: call `set_layer_contexts` afterwards, not before.

    Args:
        unet: the denoiser.
        weights: folder or hub id, with ``weight_name``; or the two state dicts ``image_proj`` and
            ``ip_adapter``.
        scale: weight of the image prompt; diffusers itself would load it at 1.0.
        subfolder: of the folder.
        weight_name: file in it, safetensors.

    Raises:
        ValueError: state dicts without these keys, or a file that is not safetensors.
    """
    if isinstance(weights, Mapping):
        if set(weights) != {"image_proj", "ip_adapter"}:
            raise ValueError(
                f"the IP-Adapter's weights have the keys {sorted(weights)}; expected image_proj "
                "and ip_adapter, a state dict each."
            )
        # The loader keeps and edits what it is given.
        weights = {key: dict(part) for key, part in weights.items()}
    elif not (weight_name or "").endswith(".safetensors"):
        raise ValueError(
            f"the IP-Adapter's file is {weight_name!r}; expected a .safetensors file. Pickled "
            "weights are not read."
        )
    holder = _Holder(unet)
    holder.load_ip_adapter(
        weights, subfolder=subfolder, weight_name=weight_name, image_encoder_folder=None
    )
    holder.set_ip_adapter_scale(scale)
    unet.encoder_hid_proj.requires_grad_(False)
    for processor in unet.attn_processors.values():
        if isinstance(processor, torch.nn.Module):
            processor.requires_grad_(False)


def set_ip_adapter_scale(unet: UNet2DConditionModel, scale: float) -> None:
    """Weigh the image prompt; layers with contexts of their own included."""
    _Holder(unet).set_ip_adapter_scale(scale)


def ip_adapter_kind(unet: UNet2DConditionModel) -> str | None:
    """`base`, `plus`, or None where no adapter is loaded.

    Raises:
        ValueError: an adapter of another kind, such as one for faces.
    """
    if unet.config.encoder_hid_dim_type != "ip_image_proj":
        return None
    kinds = {"ImageProjection": "base", "IPAdapterPlusImageProjection": "plus"}
    names = [type(layer).__name__ for layer in unet.encoder_hid_proj.image_projection_layers]
    if any(name not in kinds for name in names):
        raise ValueError(
            f"the IP-Adapter projects images by {', '.join(names)}; expected "
            f"{' or '.join(kinds)} (ip-adapter, ip-adapter-plus)."
        )
    return kinds[names[0]]


def clip_pixels(rgb: Float[Tensor, "b h w 3"], size: int) -> Float[Tensor, "b 3 s s"]:
    """The middle square of images in [0, 1] at the vision encoder's size, normalised for CLIP."""
    images = rgb.permute(0, 3, 1, 2)
    height, width = images.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = functional.interpolate(
        images[..., top : top + side, left : left + side],
        (size, size),
        mode="bicubic",
        antialias=True,
        align_corners=False,
    ).clamp(0, 1)
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


@torch.no_grad()
def image_features(
    encoder: CLIPVisionModelWithProjection, pixels: Float[Tensor, "b 3 h w"], kind: str
) -> Float[Tensor, "b ..."]:
    """What an adapter of ``kind`` asks of the vision encoder for preprocessed images.

    Returns:
        [b d] for `base`, [b n d] for `plus`; give them to the U-Net with `image_arguments`.
    """
    if kind == "base":
        return encoder(pixels).image_embeds
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]


def without_image(
    encoder: CLIPVisionModelWithProjection, pixels: Float[Tensor, "b 3 h w"], kind: str
) -> Float[Tensor, "b ..."]:
    """The same for no image prompt: zeros for `base`, the states of a black image for `plus`."""
    if kind == "base":
        return torch.zeros_like(image_features(encoder, pixels, kind))
    return image_features(encoder, torch.zeros_like(pixels), kind)


def image_arguments(features: Float[Tensor, "b ..."]) -> dict[str, object]:
    """Keyword arguments of a call of the U-Net that give it one image prompt for each sample."""
    return {"added_cond_kwargs": {"image_embeds": [features.unsqueeze(1)]}}
