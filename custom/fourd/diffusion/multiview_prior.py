"""A multi-view prior from a diffusers folder, the original checkpoint, or an embedded folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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

from .checkpoint_conversion import (
    ConvertedPart,
    assembled,
    check_complete,
    convert_checkpoint,
    read_original_checkpoint,
)
from .cross_view_attention import set_cross_view_attention
from .ldm_conversion import (
    AUTOENCODER_PREFIX,
    LDM_SCHEDULER_CONFIG,
    UNET_PREFIX,
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
        schedule, facts = noise_schedule(LDM_SCHEDULER_CONFIG), MultiviewFacts()
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


def build_from_original(
    state: Mapping[str, Tensor],
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return (U-Net, autoencoder) from a flat ldm state dict, sharing its tensors.

    Raises:
        ValueError: if tensors are missing, left over, or of another shape.
    """
    for prefix in (UNET_PREFIX, AUTOENCODER_PREFIX):
        if not any(name.startswith(prefix) for name in state):
            raise ValueError(
                f"The checkpoint holds no tensor below '{prefix}'; expected MVDream's original."
            )
    wanted = {k: v for k, v in state.items() if k.startswith((UNET_PREFIX, AUTOENCODER_PREFIX))}
    parts = {part.name: part for part in convert_checkpoint("mvdream", wanted)}
    return assembled(parts["unet"]), assembled(parts["vae"])


def _load_original(path: Path) -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_from_original(read_original_checkpoint(path))


def _load_ldm_unet(root: Path) -> torch.nn.Module:
    files = sorted((root / "unet").glob("*.safetensors"))
    plain = [file for file in files if ".fp16." not in file.name] or files
    state: dict[str, Tensor] = {}
    for file in plain:
        state.update(read_original_checkpoint(file))
    part = ConvertedPart("unet", "UNet2DConditionModel", unet_config(state), convert_unet(state))
    check_complete(part)
    return assembled(part)
