"""From what a config lists under `scenes` to sources of cells.

An entry is a text or a mapping. A text is a path, if something lies there, or a caption of the
world. A mapping says what it is by one of the keys ``world`` (a caption), ``checkpoint`` (a
checkpoint or an exported scene), ``grid`` (a folder of `render_grid`) and ``video`` (a video, a
folder of pictures or one picture), and may add ``caption`` (its words for prompts), ``scene_id``
(its name) and, for a video, ``frames`` (which ones, see `parse_frame_list`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from threestudio.data.camera_config import plain_list
from threestudio.utils.slug import safe_folder_name

from ..world.grammar import CaptionError, is_of_the_world
from .grid_cells import GridCells, is_grid
from .pair_cells import CellSource, OrbitCameras, orbit_cameras, scene_times
from .scene_cells import SceneCells
from .video_cells import VideoCells
from .video_frames import PICTURES, VIDEOS, list_pictures
from .video_scene_datamodule import plain
from .world_cells import WorldCells

SOURCES = ("world", "checkpoint", "grid", "video")
FURTHER_KEYS = ("caption", "scene_id", "frames")
SCENE_FILES = (".ckpt", ".pth", ".safetensors")


def open_scenes(entries: Any, cfg: Any) -> list[CellSource]:
    """Return the sources that a config lists, checked as far as that costs little.

    Args:
        entries: the list, or a single entry.
        cfg: keys of `fourd-pair-datamodule`.

    Raises:
        ValueError: there is none, or an entry cannot be read, naming it.
    """
    entries = [entries] if isinstance(entries, (str, dict)) else list(entries or [])
    if not entries:
        raise ValueError(
            "data.scenes is empty; expected captions of the world, checkpoints, grids or videos, "
            'such as data.scenes=["a red cube spinning"].'
        )
    sources: list[CellSource] = []
    for place, entry in enumerate(entries):
        given = {_kind_of(entry, place): entry} if isinstance(entry, str) else dict(entry)
        _check_keys(given, place)
        source = _open(given, cfg)
        known = {other.scene_id for other in sources}
        if source.scene_id in known:
            if "scene_id" in given:
                raise ValueError(f"data.scenes names the scene_id {source.scene_id!r} twice.")
            source.scene_id = _free_name(source.scene_id, known)
        sources.append(source)
    return sources


def _kind_of(text: str, place: int) -> str:
    """What a text means: by what lies there, else by its words."""
    path = Path(text).expanduser()
    if path.is_dir():
        if is_grid(path):
            return "grid"
        if list_pictures(path):
            return "video"
    elif path.is_file():
        if path.suffix.lower() in SCENE_FILES:
            return "checkpoint"
        if path.suffix.lower() in (*VIDEOS, *PICTURES):
            return "video"
    elif is_of_the_world(text):
        return "world"
    reason = "is no caption of the world, and there is no such file"
    if path.exists():
        reason = "is there, but is nothing that can be read"
    raise ValueError(
        f"data.scenes[{place}] is {text!r}, which {reason}; expected a caption such as 'a red cube "
        f"spinning', a scene file ({', '.join(SCENE_FILES)}), a folder of render_grid, a video, or "
        "a folder of pictures."
    )


def _check_keys(given: dict[str, Any], place: int) -> None:
    kinds = [key for key in SOURCES if key in given]
    unknown = [str(key) for key in given if key not in (*SOURCES, *FURTHER_KEYS)]
    if unknown or len(kinds) != 1:
        found = f"has the key {unknown[0]!r}" if unknown else f"has {len(kinds)} sources"
        raise ValueError(
            f"data.scenes[{place}] {found}; expected one of {', '.join(SOURCES)}, and perhaps "
            f"{', '.join(FURTHER_KEYS)}."
        )
    if "frames" in given and kinds != ["video"]:
        raise ValueError(f"data.scenes[{place}] has frames, which only a video has.")


def _open(given: dict[str, Any], cfg: Any) -> CellSource:
    (kind,) = (key for key in SOURCES if key in given)
    value, caption = str(given[kind]), given.get("caption")
    if kind == "world":
        source = _open_world(value, cfg)
    else:
        path = Path(value).expanduser()
        if not path.exists():
            raise ValueError(f"data.scenes names the {kind} {value!r}, which does not exist.")
        source = _open_file(kind, path, given.get("frames"), cfg)
    if caption is not None:
        source.caption = str(caption)
    source.scene_id = str(given.get("scene_id") or source.scene_id)
    return source


def grid_cameras(cfg: Any) -> OrbitCameras:
    """Return the cameras that a config puts around scenes that any camera can see."""
    azimuths = [360.0 * place / cfg.n_azimuths for place in range(cfg.n_azimuths)]
    elevations = plain_list(plain(cfg.elevations_deg))
    return orbit_cameras(elevations, azimuths, cfg.camera_distance, cfg.fovy_deg)


def _places(cfg: Any) -> tuple:
    times = scene_times(cfg.n_times, cfg.include_last_time)
    return times, grid_cameras(cfg), cfg.height, cfg.width


def _open_world(caption: str, cfg: Any) -> CellSource:
    try:
        return WorldCells(caption, safe_folder_name(caption), *_places(cfg))
    except CaptionError as error:
        raise ValueError(f"data.scenes names {caption!r}: {error}") from error


def _open_file(kind: str, path: Path, frames: Any, cfg: Any) -> CellSource:
    if kind == "grid":
        return GridCells(path, cfg.height, cfg.width)
    if kind == "checkpoint":
        # ckpts/last.ckpt is called so in every run; the run's folder has the name.
        in_run = path.parent.name == "ckpts"
        return SceneCells(path, path.parents[1].name if in_run else path.stem, *_places(cfg))
    elevation = plain_list(plain(cfg.elevations_deg))[:1]
    camera = orbit_cameras(elevation, [0.0], cfg.camera_distance, cfg.fovy_deg)
    size, limit = (cfg.height, cfg.width), int(cfg.cache_mib * 2**20)
    return VideoCells(path, path.stem, camera, *size, frames=frames, fit=cfg.fit, max_bytes=limit)


def _free_name(name: str, known: set[str]) -> str:
    number = 2
    while f"{name}-{number}" in known:
        number += 1
    return f"{name}-{number}"
