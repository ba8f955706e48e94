"""IP-Adapter weights under the names of the published files: fresh ones, and a trained U-Net's.

A file holds two parts. `image_proj` is the resampler that makes 16 tokens of the vision encoder's
patch states; `ip_adapter` holds keys and values of each cross-attention, numbered by twos from 1 in
the order in which diffusers lists the U-Net's processors.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

AdapterWeights = dict[str, dict[str, Tensor]]

NUM_TOKENS = 16
HEAD_SIZE, DEPTH = 64, 4
"""Of the resampler: its loader takes both for granted."""
_FILE_NAMES = (
    (r"\.ln0\.", ".0.norm1."),
    (r"\.ln1\.", ".0.norm2."),
    (r"\.attn\.to_q\.", ".0.to_q."),
    (r"\.attn\.to_out\.0\.", ".0.to_out."),
    (r"\.ff\.0\.", ".1.0."),
    (r"\.ff\.1\.net\.0\.proj\.", ".1.1."),
    (r"\.ff\.1\.net\.2\.", ".1.3."),
)


def fresh_adapter_weights(
    unet: UNet2DConditionModel, vision_width: int, hidden: int, num_tokens: int = NUM_TOKENS
) -> AdapterWeights:
    """Weights of an adapter of kind `plus`, whose values are zero: it begins without influence.

    Args:
        unet: whose cross-attentions get keys and values; it is not changed.
        vision_width: of the vision encoder's states.
        hidden: width of the resampler.

    Random: draws from torch's global generator.
    """
    from diffusers.models.embeddings import IPAdapterPlusImageProjection

    width = unet.config.cross_attention_dim
    resampler = IPAdapterPlusImageProjection(
        embed_dims=vision_width, output_dims=width, hidden_dims=hidden, depth=DEPTH,
        dim_head=HEAD_SIZE, heads=1, num_queries=num_tokens,
    )  # fmt: skip
    attention = {}
    for number, channels in _numbered_channels(unet).values():
        keys = torch.nn.Linear(width, channels, bias=False).weight.detach()
        attention[f"{number}.to_k_ip.weight"] = keys
        attention[f"{number}.to_v_ip.weight"] = torch.zeros(channels, width)
    return {"image_proj": _resampler_file(resampler.state_dict()), "ip_adapter": attention}


def adapter_weights(unet: UNet2DConditionModel) -> AdapterWeights:
    """The weights of the adapter of kind `plus` that a U-Net carries, as copies."""
    state = unet.state_dict()
    prefix = "encoder_hid_proj.image_projection_layers.0."
    resampler = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    attention = {
        f"{number}.{part}.weight": state[f"{name}.{part}.0.weight"].clone()
        for name, (number, _) in _numbered_channels(unet).items()
        for part in ("to_k_ip", "to_v_ip")
    }
    return {"image_proj": _resampler_file(resampler), "ip_adapter": attention}


def weights_without_adapter(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The U-Net's own weights."""
    return {
        key: value
        for key, value in unet.state_dict().items()
        if not key.startswith("encoder_hid_proj.") and ".processor." not in key
    }


def flat_names(weights: AdapterWeights) -> dict[str, Tensor]:
    """Both parts in one dictionary, as a safetensors file has them."""
    return {
        f"{part}.{key}": value.contiguous()
        for part, state in weights.items()
        for key, value in state.items()
    }


def _numbered_channels(unet: UNet2DConditionModel) -> dict[str, tuple[int, int]]:
    """Number and channels of each cross-attention, by its processor's name."""
    return {
        name: (number, unet.get_submodule(name.removesuffix(".processor")).to_k.out_features)
        for number, name in enumerate(unet.attn_processors)
        if name.endswith("attn2.processor")
    }


def _resampler_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A resampler's weights under the published names, keys and values as one matrix."""
    renamed = {}
    for key, value in state.items():
        if ".attn.to_v." in key:
            continue
        if ".attn.to_k." in key:
            value = torch.cat((value, state[key.replace("to_k", "to_v")]))
            key = key.replace(".attn.to_k.", ".0.to_kv.")
        for pattern, name in _FILE_NAMES:
            key = re.sub(pattern, name, key)
        renamed[key] = value.clone()
    return renamed
