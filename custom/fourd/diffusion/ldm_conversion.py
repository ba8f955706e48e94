"""Checkpoints in ldm layout as diffusers models: names, shapes and configurations.

Stable Diffusion and MVDream are one flat state dict: the U-Net below ``model.diffusion_model.``,
the autoencoder below ``first_stage_model.``. Every name is rewritten by a rule; the configurations
are read off the tensors, so a small model of the same layout converts as well. Video models add to
these names, see `video_unet_conversion`; which parts a checkpoint has, `checkpoint_conversion`
knows.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
# SD 2.x fixes the width of a head, and so their number by the channels; SD 1.x their number.
_HEAD_WIDTH = 64
_SD_1_HEADS = 8
# Groups of ldm's group norms.
_NORM_GROUPS = 32

LDM_SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "camera_embed.0": "class_embedding.linear_1",
    "camera_embed.2": "class_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def unet_key(name: str, layers_per_block: int = 2) -> str:
    """Return diffusers' name of an ldm U-Net tensor, prefix removed.

    Args:
        name: for example ``input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight``.
        layers_per_block: residual blocks of each resolution, 2 in SD.

    Raises:
        ValueError: if no rule covers the name.
    """
    for old, new in _UNET_ENDS.items():
        if name.startswith(f"{old}."):
            return _resnet_key(new + name[len(old) :])
    match = re.match(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.*)", name)
    if match is None:
        raise ValueError(
            f"'{name}' is no name of an ldm U-Net; expected Stable Diffusion's layout, such as "
            "'input_blocks.1.0.in_layers.0.weight'."
        )
    side, index, part, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "input":
        # Input block 0 is the first convolution; each resolution then has its layers and a
        # downsampler.
        block, layer = divmod(index - 1, layers_per_block + 1)
        if rest.startswith("op."):
            return f"down_blocks.{block}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        place = f"down_blocks.{block}"
    else:
        block, layer = divmod(index, layers_per_block + 1)
        if rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        place = f"up_blocks.{block}"
    kind = "resnets" if part == 0 else "attentions"
    return _resnet_key(f"{place}.{kind}.{layer}.{rest}")


def autoencoder_key(name: str, levels: int = 4) -> str:
    """Return diffusers' name of an ldm autoencoder tensor, prefix removed.

    Args:
        name: for example ``decoder.up.3.block.0.conv1.weight``.
        levels: number of resolutions, 4 in SD.
    """
    name = name.replace("nin_shortcut", "conv_shortcut")
    name = name.replace("coder.norm_out", "coder.conv_norm_out")
    name = re.sub(r"mid\.block_([12])", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", name)
    name = re.sub(
        r"mid\.attn_1\.(\w+)", lambda m: f"mid_block.attentions.0.{_VAE_ATTENTION[m[1]]}", name
    )
    name = re.sub(r"down\.(\d+)\.block\.(\d+)", r"down_blocks.\1.resnets.\2", name)
    name = re.sub(r"down\.(\d+)\.downsample", r"down_blocks.\1.downsamplers.0", name)
    # ldm counts the decoder's resolutions from the finest, diffusers in the order of use.
    name = re.sub(
        r"up\.(\d+)\.block\.(\d+)",
        lambda m: f"up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}",
        name,
    )
    return re.sub(
        r"up\.(\d+)\.upsample",
        lambda m: f"up_blocks.{levels - 1 - int(m[1])}.upsamplers.0",
        name,
    )


def convert_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an ldm U-Net's state dict, prefix removed or not, under diffusers' names.

    Raises:
        ValueError: if a name fits no rule or two names become one.
    """
    state = without_prefix(state, UNET_PREFIX)
    layers = layers_per_block(state)
    return renamed(state, lambda name: unet_key(name, layers))


def convert_autoencoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an ldm autoencoder's state dict under diffusers' names.

    The attention of the middle block is a 1 x 1 convolution in ldm and linear in diffusers, so its
    weights lose their last two dimensions.
    """
    state = without_prefix(state, AUTOENCODER_PREFIX)
    levels = 1 + max(int(m[1]) for m in map(re.compile(r"encoder\.down\.(\d+)").match, state) if m)
    converted = renamed(state, lambda name: autoencoder_key(name, levels))
    return {
        name: value[:, :, 0, 0] if "attentions" in name and value.ndim == 4 else value
        for name, value in converted.items()
    }


def unet_config(state: Mapping[str, Tensor], sample_size: int = 32) -> dict[str, Any]:
    """Read the arguments of `UNet2DConditionModel` off an ldm U-Net's tensors."""
    state = without_prefix(state, UNET_PREFIX)
    layers = layers_per_block(state)
    config = common_unet_config(state, layers, "2D", sample_size)
    is_linear = state["middle_block.1.proj_in.weight"].ndim == 2
    heads = tuple(max(width // _HEAD_WIDTH, 1) for width in config["block_out_channels"])
    config |= {
        # diffusers' name of the number of heads.
        "attention_head_dim": heads if is_linear else _SD_1_HEADS,
        "use_linear_projection": is_linear,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if "camera_embed.0.weight" in state:
        config["class_embed_type"] = "projection"
        config["projection_class_embeddings_input_dim"] = state["camera_embed.0.weight"].shape[1]
    return config


def common_unet_config(
    state: Mapping[str, Tensor], layers: int, kind: str, sample_size: int
) -> dict[str, Any]:
    """Read off the tensors what the U-Nets of images and of clips have in common.

    Args:
        state: an ldm U-Net, prefix removed.
        layers: residual blocks of each resolution.
        kind: "2D" or "3D", the end of diffusers' names of the blocks.
        sample_size: edge of the latents; the tensors do not tell it.
    """
    channels, attends = [], []
    while f"input_blocks.{1 + len(channels) * (layers + 1)}.0.in_layers.2.weight" in state:
        first = f"input_blocks.{1 + len(channels) * (layers + 1)}"
        attends.append("CrossAttn" if f"{first}.1.proj_in.weight" in state else "")
        channels.append(state[f"{first}.0.in_layers.2.weight"].shape[0])
    text = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    return {
        "sample_size": sample_size,
        "in_channels": state["input_blocks.0.0.weight"].shape[1],
        "out_channels": state["out.2.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": tuple(f"{prefix}DownBlock{kind}" for prefix in attends),
        "up_block_types": tuple(f"{prefix}UpBlock{kind}" for prefix in reversed(attends)),
        "cross_attention_dim": state[text].shape[1],
        "norm_num_groups": min(_NORM_GROUPS, channels[0]),
        "norm_eps": 1e-5,
    }


def autoencoder_config(state: Mapping[str, Tensor], sample_size: int = 256) -> dict[str, Any]:
    """Read the arguments of `AutoencoderKL` off an ldm autoencoder's tensors."""
    state = without_prefix(state, AUTOENCODER_PREFIX)
    channels = []
    while f"encoder.down.{len(channels)}.block.0.conv1.weight" in state:
        channels.append(state[f"encoder.down.{len(channels)}.block.0.conv1.weight"].shape[0])
    layers = sum(
        re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None
        for name in state
    )
    return {
        "sample_size": sample_size,
        "in_channels": state["encoder.conv_in.weight"].shape[1],
        "out_channels": state["decoder.conv_out.weight"].shape[0],
        "latent_channels": state["post_quant_conv.weight"].shape[0],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": min(_NORM_GROUPS, channels[0]),
        "scaling_factor": 0.18215,
    }


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keep the tensors below ``prefix`` and remove it; all of them if none has it."""
    inside = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return inside or dict(state)


def _resnet_key(name: str) -> str:
    if ".resnets." not in name:
        return name
    for old, new in _RESNET.items():
        name = name.replace(f".{old}.", f".{new}.")
    return name


def layers_per_block(state: Mapping[str, Tensor]) -> int:
    """Count the layers of the first resolution: they end at the first downsampler.

    Raises:
        ValueError: if the state dict holds no ldm U-Net.
    """
    samplers = [
        int(match[1])
        for match in map(re.compile(r"input_blocks\.(\d+)\.0\.op\.").match, state)
        if match
    ]
    if not samplers:
        raise ValueError(
            "The checkpoint holds no U-Net in ldm layout (no 'input_blocks.*.0.op.*'); expected an "
            "original file, such as MVDream's sd-v2.1-base-4view.pt."
        )
    return min(samplers) - 1


def renamed(state: Mapping[str, Tensor], rule: Callable[[str], str]) -> dict[str, Tensor]:
    """Return the tensors under the names that ``rule`` gives them.

    Raises:
        ValueError: if two names become one.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        new = rule(name)
        if new in renamed:
            raise ValueError(f"Two tensors of the checkpoint become '{new}', one of them '{name}'.")
        renamed[new] = value
    return renamed
