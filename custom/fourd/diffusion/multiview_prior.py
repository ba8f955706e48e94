"""A multi-view prior from a diffusers folder, the original checkpoint, or an embedded folder."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threestudio.models.guidance.base import PRIOR_COMPONENTS
from threestudio.models.guidance.multiview_facts import MultiviewFacts, read_multiview_facts
from threestudio.models.guidance.noise_schedule import NoiseSchedule, noise_schedule
from threestudio.utils.diffusers_folder import load_model, read_config
from threestudio.utils.pretrained import (
    WEIGHT_SUFFIXES,
    resolve_checkpoint_file,
    resolve_pretrained,
)
from torch import Tensor

from .cross_view_attention import set_cross_view_attention
from .multiview_conversion import (
    AUTOENCODER_PREFIX,
    MVDREAM_SCHEDULER_CONFIG,
    UNET_PREFIX,
    autoencoder_config,
    convert_autoencoder,
    convert_unet,
    unet_config,
)


@dataclass(frozen=True)
class MultiviewPrior:
    """A frozen multi-view diffusion model."""

    unet: torch.nn.Module
    """`UNet2DConditionModel` whose self-attention joins ``facts.num_views`` views."""
    autoencoder: torch.nn.Module
    """`AutoencoderKL`, or a model with its interface."""
    schedule: NoiseSchedule
    """The schedule it was trained with."""
    facts: MultiviewFacts
    """How many views it joins, its camera vector, its image size."""


def load_multiview_prior(
    name: str,
    revision: str | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> MultiviewPrior:
    """Load a multi-view prior, frozen and in evaluation mode.

    Args:
        name: folder, hub id or ``embedded://name``; or a single file in ldm layout, as a path or
            ``owner/name/file.pt`` on the hub. A folder whose U-Net keeps ldm's names (the port
            ``ashawkey/mvdream-sd2.1-diffusers``) is converted while loading.
        revision: commit of a hub id.
        device: where the model goes; None leaves it where torch creates tensors.
        dtype: precision of its weights.
        channels_last: memory layout of the U-Net's weights.

    Raises:
        ModelUnavailableError: if the model cannot be had.
        ValueError: if a file is no MVDream checkpoint, or holds code.
    """
    device = torch.empty(0).device if device is None else device
    if name.endswith(WEIGHT_SUFFIXES):
        unet, autoencoder = _load_original(resolve_checkpoint_file(name, revision))
        schedule, facts = noise_schedule(MVDREAM_SCHEDULER_CONFIG), MultiviewFacts()
        autoencoder = autoencoder.to(device, dtype)
        unet = unet.to(device, dtype)
    else:
        root = resolve_pretrained(name, revision, components=PRIOR_COMPONENTS)
        facts = read_multiview_facts(root)
        if read_config(root, "unet").get("_class_name") == "UNet2DConditionModel":
            unet = load_model(root, "unet", device, dtype)
        else:
            unet = _load_ldm_unet(root).to(device, dtype)
        autoencoder = load_model(root, "vae", device, dtype)
        schedule = noise_schedule(read_config(root, "scheduler"))
    set_cross_view_attention(unet, facts.num_views)
    if channels_last:
        unet.to(memory_format=torch.channels_last)
    return MultiviewPrior(unet, autoencoder, schedule, facts)


def read_original_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a flat ldm state dict from safetensors, or from a pickle that holds tensors only.

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
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors; expected MVDream's original file. "
            "Code in a checkpoint is never run. Fetch it again, or convert it to safetensors."
        ) from error
    state = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{path} holds no flat state dict of tensors; expected MVDream's original."
        )
    return dict(state)


def build_from_original(
    state: Mapping[str, Tensor],
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return (U-Net, autoencoder) from a flat ldm state dict, sharing its tensors.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    parts = {
        prefix: {k: v for k, v in state.items() if k.startswith(prefix)}
        for prefix in (UNET_PREFIX, AUTOENCODER_PREFIX)
    }
    for prefix, part in parts.items():
        if not part:
            raise ValueError(
                f"The checkpoint holds no tensor below '{prefix}'; expected MVDream's original."
            )
    unet = _assigned(
        UNet2DConditionModel,
        unet_config(parts[UNET_PREFIX]),
        convert_unet(parts[UNET_PREFIX]),
    )
    autoencoder = _assigned(
        AutoencoderKL,
        autoencoder_config(parts[AUTOENCODER_PREFIX]),
        convert_autoencoder(parts[AUTOENCODER_PREFIX]),
    )
    return unet, autoencoder


def _load_original(path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_from_original(read_original_checkpoint(path))


def _load_ldm_unet(root: Path) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    files = sorted((root / "unet").glob("*.safetensors"))
    plain = [file for file in files if ".fp16." not in file.name] or files
    state: dict[str, Tensor] = {}
    for file in plain:
        state.update(read_original_checkpoint(file))
    return _assigned(UNet2DConditionModel, unet_config(state), convert_unet(state))


def _assigned(cls: Any, config: dict[str, Any], state: dict[str, Tensor]) -> torch.nn.Module:
    """Build a model without memory of its own and put the tensors of ``state`` in its place."""
    with torch.device("meta"):
        model = cls(**config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in state.items()}
    wrong = [name for name in {**expected, **given} if expected.get(name) != given.get(name)]
    if wrong:
        first = wrong[0]
        raise ValueError(
            f"The checkpoint does not fit {cls.__name__}: {len(wrong)} tensors differ, first "
            f"{first} with shape {given.get(first)}; expected {expected.get(first)}. "
            "Fetch it again."
        )
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
