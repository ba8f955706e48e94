"""One file that holds a trained scene and nothing else: safetensors with its config as metadata.

The tensors are the parts' state under the contract's names (`geometry.*`, `material.*`,
`background.*`, `renderer.*`). The metadata says how to rebuild the parts: which registered modules
with which configs, and at which training step. Reading runs no code of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

PARTS = ("geometry", "material", "background", "renderer")
SUFFIX = ".safetensors"
METADATA_KEY = "threestudio-4d scene"  # a single one, since their order in the file is random
VERSION = 1


@dataclass
class SceneRecipe:
    """How a scene's parts are built, and where they come from."""

    system: dict[str, Any]
    """`NAME_type` and `NAME` of each part, as in a config's `system` section."""
    global_step: int = 0
    """Training step, which schedules of the parts depend on."""
    prompt: str = ""
    """The words that the scene was made from, if any."""
    profile: str = ""
    """The profile that it was trained with."""
    threestudio_version: str = field(default_factory=lambda: _version())


def recipe_of(
    system: Mapping[str, Any], global_step: int, prompt: str = "", profile: str = ""
) -> SceneRecipe:
    """The recipe in a system's config, in plain containers and without files of this machine.

    Args:
        system: the `system` section; all but the four parts is left out, as are the `weights`
            that a part may have started from.
        global_step: training step of the weights.
        prompt: see `SceneRecipe`.
        profile: see `SceneRecipe`.
    """
    plain = json.loads(json.dumps(dict(system)))
    parts: dict[str, Any] = {}
    for name in PARTS:
        parts[f"{name}_type"] = plain[f"{name}_type"]
        config = plain.get(name) or {}
        parts[name] = {key: value for key, value in config.items() if key != "weights"}
    return SceneRecipe(parts, int(global_step), str(prompt), str(profile))


def write_scene_file(path: str | Path, parts: Mapping[str, nn.Module], recipe: SceneRecipe) -> None:
    """Write the state of the four parts and how to rebuild them; tensors keep their bits.

    Args:
        path: the file; an existing one is replaced.
        parts: the modules by name.
        recipe: goes into the metadata, as JSON.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous().clone()
        for name in PARTS
        for key, value in parts[name].state_dict().items()
    }
    metadata = {METADATA_KEY: json.dumps({"version": VERSION, **asdict(recipe)})}
    # Their save_file makes a file that only its owner may read.
    Path(path).write_bytes(save(tensors, metadata))


def read_scene_file(path: str | Path) -> tuple[dict[str, Tensor], SceneRecipe]:
    """The tensors of a scene file by their names, on the CPU, and how to rebuild its parts.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or no scene of this project, or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"scene {path} does not exist. Check the path.")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            recipe = _recipe_in(metadata, path)
            return {key: file.get_tensor(key) for key in file.keys()}, recipe
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no readable safetensors file ({error}); export the scene again."
        ) from error


def _recipe_in(metadata: Mapping[str, str], path: Path) -> SceneRecipe:
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} holds no scene (its metadata has no {METADATA_KEY!r}); expected a file that "
            "`--export` wrote."
        )
    try:
        written = json.loads(metadata[METADATA_KEY])
        version = written.pop("version")
        if version != VERSION:
            raise ValueError(
                f"{path} is a scene of version {version}; this program reads version {VERSION}. "
                "Read it with the version of the program that wrote it."
            )
        recipe = SceneRecipe(**written)
        missing = [name for name in _types() if not isinstance(recipe.system.get(name), str)]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the metadata of {path} is damaged ({error}); export the scene again."
        ) from error
    if missing:
        raise ValueError(f"the metadata of {path} lacks {', '.join(missing)}; export it again.")
    return recipe


def _types() -> Iterable[str]:
    return (f"{name}_type" for name in PARTS)


def _version() -> str:
    import threestudio

    return str(threestudio.__version__)
