"""What a multi-view checkpoint says of itself, and the functions that make its camera vectors.

A diffusers folder has no place for how many views a U-Net joins and what its class vector holds, so
``multiview.json`` beside ``model_index.json`` does. A folder without that file is the published
MVDream. Extensions register how a kind of camera vector is computed.
"""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

CameraVectorFunction = Callable[[Float[Tensor, "b 4 4"], Float[Tensor, "b"]], Float[Tensor, "b k"]]

_camera_vectors: dict[str, str] = {}


@dataclass(frozen=True)
class MultiviewFacts:
    """Facts of a multi-view U-Net; the defaults are MVDream's."""

    num_views: int = 4
    """Views that attention joins."""
    camera_vector: str = "mvdream"
    """Kind of class vector, a name given to `register_camera_vector`."""
    image_size: int = 256
    """Edge of an image in pixels."""


def read_multiview_facts(root: Path) -> MultiviewFacts:
    """Read ``multiview.json`` of a folder, the published MVDream's facts if there is none.

    Raises:
        ValueError: if the file holds an unknown key or a value of the wrong type.
    """
    path = Path(root) / "multiview.json"
    if not path.is_file():
        return MultiviewFacts()
    content = json.loads(path.read_text(encoding="utf-8"))
    types = {field.name: field.type for field in fields(MultiviewFacts)}
    for key, value in content.items():
        if key not in types or not isinstance(value, types[key]):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in types.items())
            raise ValueError(f"{path} holds {key}={value!r}; expected the keys {expected}.")
    return MultiviewFacts(**content)


def register_camera_vector(kind: str, target: str) -> None:
    """Name the function, "module:function", that turns (c2w, fovy, kind) into a class vector."""
    _camera_vectors[kind] = target


def camera_vector_function(kind: str) -> CameraVectorFunction:
    """Return the function of a kind of camera vector.

    Raises:
        ValueError: if no extension registered it.
    """
    if kind not in _camera_vectors:
        raise ValueError(
            f"The model asks for the camera vector {kind!r}; expected one of "
            f"{', '.join(sorted(_camera_vectors)) or 'none, since no extension registered any'}."
        )
    module, _, name = _camera_vectors[kind].partition(":")
    function = getattr(importlib.import_module(module), name)
    return lambda c2w, fovy: function(c2w, fovy, kind)
