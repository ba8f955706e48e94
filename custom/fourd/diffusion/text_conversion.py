"""Text encoders as checkpoints hold them, as the CLIP text model of transformers.

SD 2.x, MVDream, ModelScope and VideoCrafter hold OpenCLIP's ViT-H text tower and stop one layer
before its end ("penultimate"), followed by the final norm; the encoder of transformers therefore
has one layer less. SD 1.x holds transformers' own CLIP ViT-L under its own names.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OPEN_CLIP_PREFIX = "cond_stage_model.model."
CLIP_PREFIX = "cond_stage_model.transformer."
_HEAD_WIDTH = 64
_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.*)\.(weight|bias)")
_JOINED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def is_unused_by_text(name: str, number_of_blocks: int) -> bool:
    """Tell whether the penultimate layer's embedding does without an OpenCLIP tensor."""
    last = f"transformer.resblocks.{number_of_blocks - 1}."
    return name in ("logit_scale", "text_projection", "attn_mask") or name.startswith(
        ("visual.", last)
    )


def count_blocks(state: Mapping[str, Tensor]) -> int:
    """Count the residual blocks of an OpenCLIP text tower, prefix removed.

    Raises:
        ValueError: if there is none.
    """
    numbers = [int(match[1]) for match in map(_BLOCK.fullmatch, state) if match]
    if not numbers:
        raise ValueError(
            "The checkpoint holds no OpenCLIP text encoder (no 'transformer.resblocks.*'); "
            "expected it below 'cond_stage_model.model.'."
        )
    return max(numbers) + 1


def convert_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an OpenCLIP text tower, prefix removed, under the names of `CLIPTextModel`.

    Queries, keys and values, one matrix there, become three.

    Raises:
        ValueError: if a name fits no rule.
    """
    blocks = count_blocks(state)
    converted: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_unused_by_text(name, blocks):
            continue
        if match := _JOINED.fullmatch(name):
            layer = f"encoder.layers.{match[1]}.self_attn"
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}.{part}_proj.{match[2]}"] = piece
        else:
            converted[open_clip_key(name)] = value
    return converted


def open_clip_key(name: str) -> str:
    """Return the name in `CLIPTextModel` of an OpenCLIP tensor that stays one tensor.

    Raises:
        ValueError: if no rule covers the name.
    """
    if name in _ENDS:
        return _ENDS[name]
    match = _BLOCK.fullmatch(name)
    if match is None or match[2] not in _PARTS:
        raise ValueError(
            f"'{name}' is no name of an OpenCLIP text encoder; expected, for example, "
            "'transformer.resblocks.0.mlp.c_fc.weight'."
        )
    return f"encoder.layers.{match[1]}.{_PARTS[match[2]]}.{match[3]}"


def open_clip_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of `CLIPTextConfig` off an OpenCLIP text tower's tensors."""
    words, width = state["token_embedding.weight"].shape
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": count_blocks(state) - 1,
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "max_position_embeddings": state["positional_embedding"].shape[0],
        "hidden_act": "gelu",
        **_special_tokens(words),
    }


def convert_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return SD 1.x's text encoder, prefix removed, as `CLIPTextModel` names it now."""
    return {
        name.removeprefix("text_model."): value
        for name, value in state.items()
        # Numbers from 0 to 76, which are computed now.
        if not name.endswith("embeddings.position_ids")
    }


def clip_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the arguments of `CLIPTextConfig` off SD 1.x's text encoder."""
    state = convert_clip(state)
    words, width = state["embeddings.token_embedding.weight"].shape
    layers = {name.split(".")[2] for name in state if name.startswith("encoder.layers.")}
    return {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(width // _HEAD_WIDTH, 1),
        "max_position_embeddings": state["embeddings.position_embedding.weight"].shape[0],
        "hidden_act": "quick_gelu",
        **_special_tokens(words),
    }


def _special_tokens(words: int) -> dict[str, int]:
    """CLIP's vocabulary ends in the marks of start and end; the latter also fills up."""
    return {"bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": words - 1}


def text_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """List name and shape of every tensor of a `CLIPTextModel`; allocates nothing."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**config))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}
