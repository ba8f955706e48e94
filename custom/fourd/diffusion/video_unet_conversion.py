"""U-Nets of text-to-video models in their original layouts, as diffusers' 3D U-Nets.

ModelScope's network (Zeroscope is a fine-tuned one) and VideoCrafter's are ldm U-Nets with parts
over time: a temporal convolution in every residual block, a temporal transformer behind every
spatial one, and one before the first block. VideoCrafter2 also embeds the frame rate. The two
differ in names alone: where the first transformer stands, how a downsampler is wrapped, and whether
projections over time are 1 x 1 convolutions.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .ldm_conversion import (
    UNET_PREFIX,
    common_unet_config,
    renamed,
    unet_key,
    without_prefix,
)

# Both code bases give the first temporal transformer eight heads, whatever its width.
_FIRST_HEADS = 8
_FIRST_PROJECTION = r"(?:init_attn\.0|input_blocks\.0\.1)\.proj_in\.weight"
_FIRST = re.compile(r"(?:init_attn\.0|input_blocks\.0\.1)\.(.*)")
_RATE = re.compile(r"fps_embedding\.([02])\.(.*)")
_CONVOLUTION = re.compile(r"(.*\.\d+|middle_block)\.(\d+)\.temopral_conv\.(.*)")
_TEMPORAL = re.compile(r"((?:input|output)_blocks\.\d+)\.2\.((?!conv\.).*)")
_SAMPLER = re.compile(r"(input_blocks\.\d+)\.op\.(.*)")


def video_unet_key(name: str, layers_per_block: int = 2) -> str:
    """Return diffusers' name of a tensor of ModelScope's or VideoCrafter's U-Net, prefix removed.

    Args:
        name: for example ``input_blocks.1.2.transformer_blocks.0.attn1.to_q.weight``.
        layers_per_block: residual blocks of each resolution, 2 in the published models.

    Raises:
        ValueError: if no rule covers the name.
    """
    if match := _FIRST.fullmatch(name):
        return f"transformer_in.{match[1]}"
    if match := _RATE.fullmatch(name):
        return f"fps_embedding.linear_{1 if match[1] == '0' else 2}.{match[2]}"
    if match := _SAMPLER.fullmatch(name):
        return unet_key(f"{match[1]}.0.op.{match[2]}", layers_per_block)
    if match := _CONVOLUTION.fullmatch(name):
        # The place of a residual block's temporal convolution is told by one of its own tensors.
        block = f"{match[1]}.{match[2]}"
        if match[1] == "middle_block":
            return f"mid_block.temp_convs.{int(match[2]) // 3}.{match[3]}"
        place = unet_key(f"{block}.in_layers.0.weight", layers_per_block)
        return place.replace(".resnets.", ".temp_convs.").replace("norm1.weight", match[3])
    if match := _TEMPORAL.fullmatch(name):
        place = unet_key(f"{match[1]}.1.{match[2]}", layers_per_block)
        return place.replace(".attentions.", ".temp_attentions.")
    if name.startswith("middle_block.2."):
        return name.replace("middle_block.2", "mid_block.temp_attentions.0", 1)
    if name.startswith("middle_block.3."):
        name = name.replace("middle_block.3", "middle_block.2", 1)
    return unet_key(name, layers_per_block)


def convert_video_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a video U-Net's state dict, prefix removed or not, under diffusers' names.

    1 x 1 convolutions over time become linear: their weights lose the last dimension.

    Raises:
        ValueError: if a name fits no rule or two names become one.
    """
    state = without_prefix(state, UNET_PREFIX)
    layers = _layers_per_block(state)
    converted = renamed(state, lambda name: video_unet_key(name, layers))
    return {
        name: value[:, :, 0] if ".proj_" in name and value.ndim == 3 else value
        for name, value in converted.items()
    }


def video_unet_config(state: Mapping[str, Tensor], sample_size: int = 32) -> dict[str, Any]:
    """Read the arguments of `UNet3DConditionModel`, or of `VideoCrafterUNet`, off the tensors."""
    state = without_prefix(state, UNET_PREFIX)
    layers = _layers_per_block(state)
    inner = next(v.shape[0] for k, v in state.items() if re.fullmatch(_FIRST_PROJECTION, k))
    config = common_unet_config(state, layers, "3D", sample_size)
    return config | {"attention_head_dim": inner // _FIRST_HEADS}


def knows_frame_rate(state: Mapping[str, Tensor]) -> bool:
    """Tell VideoCrafter2's network, which embeds the frame rate, from ModelScope's."""
    return "fps_embedding.0.weight" in without_prefix(state, UNET_PREFIX)


def _layers_per_block(state: Mapping[str, Tensor]) -> int:
    """Count the layers of the first resolution: they end at the first downsampler.

    Raises:
        ValueError: if the state dict holds no such U-Net.
    """
    pattern = re.compile(r"input_blocks\.(\d+)\.(?:0\.)?op\.")
    samplers = [int(match[1]) for match in map(pattern.match, state) if match]
    is_temporal = any(re.fullmatch(_FIRST_PROJECTION, name) for name in state)
    if not samplers or not is_temporal:
        raise ValueError(
            "The checkpoint holds no U-Net of a text-to-video model (a temporal transformer at "
            "'init_attn.0' or 'input_blocks.0.1', and downsamplers); expected ModelScope's "
            "text2video_pytorch_model.pth or VideoCrafter's model.ckpt."
        )
    return min(samplers) - 1
