"""Original checkpoints of the published models as the parts of a diffusers folder.

A checkpoint is one flat state dict. Each kind below says which parts it is made of, by prefix, and
what in it no part needs: schedule buffers, averaged copies of the weights, and what an encoder has
beyond its text. A tensor that is neither, or a part that lacks one, is an error that names it.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ldm_conversion import (
    AUTOENCODER_PREFIX,
    UNET_PREFIX,
    autoencoder_config,
    convert_autoencoder,
    convert_unet,
    unet_config,
)
from .text_conversion import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    clip_config,
    convert_clip,
    convert_open_clip,
    open_clip_config,
    text_shapes,
)
from .video_unet_conversion import convert_video_unet, knows_frame_rate, video_unet_config

_LISTED = 6
# Buffers of the noise schedule, a learned variance, the latents' scale, and averaged weights.
_UNUSED = re.compile(
    r"(sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?|betas|logvar|lvlb_weights"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|scale_(factor|arr)|model_ema\..*"
)
_MODELSCOPE_FILES = {
    "unet": "text2video_pytorch_model.pth",
    "vae": "VQGAN_autoencoder.pth",
    "text_encoder": "open_clip_pytorch_model.bin",
}


_FOLDER_CLASSES = (
    "AutoencoderKL",
    "CLIPTextModel",
    "UNet2DConditionModel",
    "UNet3DConditionModel",
)


@dataclass(frozen=True)
class ConvertedPart:
    """One component of a diffusers folder."""

    name: str
    """Its subfolder: "unet", "vae" or "text_encoder"."""
    class_name: str
    """The class that it is a model of."""
    config: dict[str, Any]
    """That class's arguments, read off the tensors."""
    state: dict[str, Tensor]
    """Its tensors under that class's names, sharing the memory of the original's."""


@dataclass(frozen=True)
class CheckpointKind:
    """What a family of checkpoints holds."""

    is_video: bool
    """The U-Net is one over frames."""
    example: str
    """A published file of this kind."""


KINDS = {
    "stable-diffusion": CheckpointKind(False, "v2-1_512-ema-pruned.safetensors"),
    "mvdream": CheckpointKind(False, "sd-v2.1-base-4view.pt"),
    "modelscope-video": CheckpointKind(True, _MODELSCOPE_FILES["unet"]),
    "videocrafter": CheckpointKind(True, "model.ckpt"),
}


def convert_checkpoint(kind: str, state: Mapping[str, Tensor]) -> list[ConvertedPart]:
    """Return the parts of a flat state dict, each complete and without a tensor left over.

    Args:
        kind: one of `KINDS`.
        state: the original's tensors by their original names, prefixes included.

    Raises:
        ValueError: for a tensor that belongs to no part, or a part that lacks or adds one; all are
            named.
    """
    _check_kind(kind)
    inside, left_over = _split(state)
    if left_over:
        raise ValueError(
            f"{len(left_over)} tensors are no part of a {kind} checkpoint: {_listed(left_over)}; "
            f"expected a file such as {KINDS[kind].example}. Choose another kind."
        )
    if UNET_PREFIX not in inside:
        raise ValueError(
            f"The checkpoint holds no tensor below '{UNET_PREFIX}'; expected a file such as "
            f"{KINDS[kind].example}."
        )
    parts = []
    for prefix, tensors in inside.items():
        part = _CONVERTERS[prefix](kind, tensors)
        check_complete(part)
        parts.append(part)
    return parts


def read_original(kind: str, path: Path) -> dict[str, Tensor]:
    """Read an original checkpoint: one file, or ModelScope's folder of up to three.

    Raises:
        FileNotFoundError: if a folder holds no U-Net's file.
        ValueError: if a file holds anything but tensors, or is damaged.
    """
    _check_kind(kind)
    if kind != "modelscope-video":
        return read_original_checkpoint(path)
    folder = path if path.is_dir() else path.parent
    files = {part: folder / name for part, name in _MODELSCOPE_FILES.items()}
    if not path.is_dir():
        files = {"unet": path}
    if not files["unet"].is_file():
        raise FileNotFoundError(
            f"{folder} holds no {_MODELSCOPE_FILES['unet']}; expected ModelScope's folder, or the "
            "U-Net's file itself."
        )
    state = {}
    for part, file in files.items():
        if file.is_file():
            state |= _modelscope_part(part, read_original_checkpoint(file))
    return state


def read_original_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a flat state dict from safetensors, or from a pickle that holds tensors only.

    Raises:
        ValueError: if a pickle holds anything but plain data, or the file is damaged.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no valid safetensors file ({error}).") from error
    try:
        # Mapped into memory, so that a model of 5 GB is not held twice while it is converted.
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors; expected an original checkpoint. "
            "Code in a checkpoint is never run. Fetch it again, or convert it to safetensors."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no flat state dict of tensors; expected an original checkpoint."
        )
    return dict(state)


def read_pickled_folder(folder: Path) -> list[ConvertedPart]:
    """Read the components of a diffusers folder whose weights are pickles (``.bin``).

    Names of attention layers that diffusers has given up since are replaced.

    Raises:
        FileNotFoundError: if no component has such weights.
        ValueError: if a pickle holds anything but tensors, or a component is incomplete.
    """
    parts = []
    for config_path in sorted(folder.glob("*/config.json")):
        files = [f for f in sorted(config_path.parent.glob("*.bin")) if ".fp16." not in f.name]
        if not files or any(config_path.parent.glob("*.safetensors")):
            continue
        config = json.loads(config_path.read_text(encoding="utf-8"))
        name = config.get("_class_name") or (config.get("architectures") or [""])[0]
        if name not in _FOLDER_CLASSES:
            raise ValueError(
                f"{config_path} names the class {name!r}; expected one of "
                f"{', '.join(_FOLDER_CLASSES)}."
            )
        state = {k: v for file in files for k, v in read_original_checkpoint(file).items()}
        state = convert_clip(state) if name == "CLIPTextModel" else _renewed(state)
        part = ConvertedPart(config_path.parent.name, name, config, state)
        check_complete(part)
        parts.append(part)
    if not parts:
        raise FileNotFoundError(
            f"{folder} holds no component with pickled weights (*/config.json beside *.bin) that "
            "lacks safetensors; expected a diffusers folder such as zeroscope_v2_576w."
        )
    return parts


def check_complete(part: ConvertedPart) -> None:
    """Compare a part with what its class builds at its configuration; nothing is allocated.

    Raises:
        ValueError: naming what is missing, left over or of another shape.
    """
    expected = _expected_shapes(part)
    given = {name: tuple(value.shape) for name, value in part.state.items()}
    faults = {
        "lacks": [name for name in expected if name not in given],
        "has no place for": [name for name in given if name not in expected],
        "has other shapes of": [
            f"{name} {given[name]} instead of {expected[name]}"
            for name in given
            if name in expected and given[name] != expected[name]
        ],
    }
    found = "; ".join(f"{what} {_listed(names)}" for what, names in faults.items() if names)
    if found:
        raise ValueError(
            f"The checkpoint does not fit {part.class_name}: it {found}. Fetch it again, or choose "
            "the kind that it is of."
        )


def assembled(part: ConvertedPart) -> torch.nn.Module:
    """Build a part's model around its tensors, without memory of its own; frozen, evaluating."""
    with torch.device("meta"):
        model = _model_class(part.class_name).from_config(part.config)
    model.load_state_dict(part.state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def _renewed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the names that attention layers of autoencoders had before diffusers 0.18."""
    old = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
    new = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    matches = {name: old.fullmatch(name) for name in state}
    return {
        f"{match[1]}.{new[match[2]]}.{match[3]}" if (match := matches[name]) else name: value
        for name, value in state.items()
    }


def _split(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return the tensors below each known prefix, which is removed, and the names of the others."""
    inside: dict[str, dict[str, Tensor]] = {}
    left_over = []
    for name, value in state.items():
        prefix = next((p for p in _CONVERTERS if name.startswith(p)), None)
        if prefix is not None:
            inside.setdefault(prefix, {})[name.removeprefix(prefix)] = value
        elif not _UNUSED.fullmatch(name):
            left_over.append(name)
    return inside, left_over


def _unet_part(kind: str, state: dict[str, Tensor]) -> ConvertedPart:
    if not KINDS[kind].is_video:
        size = 32 if kind == "mvdream" else 64
        if ("camera_embed.0.weight" in state) != (kind == "mvdream"):
            raise ValueError(
                f"The U-Net has {'a' if kind != 'mvdream' else 'no'} camera embedding; expected "
                f"--kind {'mvdream' if kind != 'mvdream' else 'stable-diffusion'} for it."
            )
        config = unet_config(state, size)
        return ConvertedPart("unet", "UNet2DConditionModel", config, convert_unet(state))
    name = "VideoCrafterUNet" if knows_frame_rate(state) else "UNet3DConditionModel"
    return ConvertedPart("unet", name, video_unet_config(state), convert_video_unet(state))


def _autoencoder_part(kind: str, state: dict[str, Tensor]) -> ConvertedPart:
    config = autoencoder_config(state, 256 if kind == "mvdream" else 512)
    return ConvertedPart("vae", "AutoencoderKL", config, convert_autoencoder(state))


def _open_clip_part(kind: str, state: dict[str, Tensor]) -> ConvertedPart:
    config = open_clip_config(state)
    return ConvertedPart("text_encoder", "CLIPTextModel", config, convert_open_clip(state))


def _clip_part(kind: str, state: dict[str, Tensor]) -> ConvertedPart:
    return ConvertedPart("text_encoder", "CLIPTextModel", clip_config(state), convert_clip(state))


_CONVERTERS: dict[str, Callable[[str, dict[str, Tensor]], ConvertedPart]] = {
    UNET_PREFIX: _unet_part,
    AUTOENCODER_PREFIX: _autoencoder_part,
    OPEN_CLIP_PREFIX: _open_clip_part,
    CLIP_PREFIX: _clip_part,
}


def _modelscope_part(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the prefixes of one checkpoint before the names of ModelScope's three files."""
    if part == "vae":
        # The published file is a whole image model; only its autoencoder is used.
        inside = {k: v for k, v in state.items() if k.startswith(AUTOENCODER_PREFIX)}
        return inside or {f"{AUTOENCODER_PREFIX}{name}": value for name, value in state.items()}
    prefix = UNET_PREFIX if part == "unet" else OPEN_CLIP_PREFIX
    return {f"{prefix}{name.removeprefix(prefix)}": value for name, value in state.items()}


def _expected_shapes(part: ConvertedPart) -> dict[str, tuple[int, ...]]:
    if part.class_name == "CLIPTextModel":
        return text_shapes(part.config)
    with torch.device("meta"):
        model = _model_class(part.class_name).from_config(part.config)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _model_class(name: str) -> Any:
    if name == "VideoCrafterUNet":
        from .videocrafter_unet import VideoCrafterUNet

        return VideoCrafterUNet
    import diffusers

    return getattr(diffusers, name)


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}.")


def _listed(names: list[str]) -> str:
    rest = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
