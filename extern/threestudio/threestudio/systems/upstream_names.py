"""Upstream's names of a system's weights, where they differ from ours.

- An encoding without parameters has an empty vector of them (tiny-cuda-nn); ours has none.
- One module under two names is stored twice (4D-fy's ``geometry_encoding``).
- A wrapper renderer keeps another one's state one level deeper.
- VSD's second score numbers its LoRA factors by attention, in the order of the U-Net's modules
  (``lora_layers.layers.3.to_q_lora.down.weight``), and wraps its camera embedding.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_RENDERER = "renderer."
_WRAPPED = "renderer.base_renderer."
_LORA = ".lora_layers."
_CAMERA = ".camera_embedding."
_NUMBERED = re.compile(r"layers\.(\d+)\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight")
_FACTOR = {"down": "lora_A", "up": "lora_B"}
_PROJECTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out": "to_out.0"}


def with_our_names(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a file under the names that this system has for them.

    Args:
        own: state dict of the system. found: state dict of the file; not changed.

    Entries that are empty, or the same tensor as one that the system has, are left out: nothing is
    lost with them.
    """
    found = _unwrap_renderer(own, found)
    renamed: dict[str, Tensor] = {}
    for root, attentions in _lora_attentions(own).items():
        for name in [name for name in found if name.startswith(f"{root}.") and name not in own]:
            ours = _guidance_name(name, root, attentions)
            if ours is not None:
                renamed[name] = ours
    found = {renamed.get(name, name): value for name, value in found.items()}
    loading = {_place(found[name]) for name in own if name in found}
    return {
        name: value
        for name, value in found.items()
        if name in own or not (_is_empty(value) or _place(value) in loading)
    }


def _unwrap_renderer(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """Lift what upstream's wrapper renderers keep one level deeper to where every renderer has it.

    Otherwise the occupancy grid would start anew whenever the type of the renderer changes.
    """
    if any(name.startswith(_WRAPPED) for name in own):
        return found
    return {
        name.replace(_WRAPPED, _RENDERER, 1) if name.startswith(_WRAPPED) else name: value
        for name, value in found.items()
    }


def _lora_attentions(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The attentions that have LoRA factors below each module ``<root>.lora_layers``, in order."""
    roots: dict[str, dict[str, None]] = {}
    for name in own:
        root, separator, inside = name.partition(_LORA)
        attention = re.match(r"(.*\.attn\d+)\.to_", inside)
        if separator and attention:
            roots.setdefault(root, {})[attention[1]] = None
    return {root: list(attentions) for root, attentions in roots.items()}


def _guidance_name(name: str, root: str, attentions: list[str]) -> str | None:
    """Our name of an entry of VSD's second score; None if it is none, or of a larger U-Net."""
    camera = f"{root}{_CAMERA}module."
    if name.startswith(camera):
        return f"{root}{_CAMERA}{name.removeprefix(camera)}"
    match = _NUMBERED.fullmatch(name.removeprefix(f"{root}{_LORA}"))
    if match is None or int(match[1]) >= len(attentions):
        return None
    place = f"{attentions[int(match[1])]}.{_PROJECTION[match[2]]}.{_FACTOR[match[3]]}.weight"
    return f"{root}{_LORA}{place}"


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 0


def _place(value: Any) -> Any:
    """What two names of one tensor have in common."""
    if not isinstance(value, Tensor):
        return id(value)
    return value.data_ptr(), tuple(value.shape), value.stride()
