"""The reader of a path, by what lies there: for tools that take any source of a `VideoScene`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .video_frames import PICTURES, VIDEOS, list_pictures
from .video_scene import VideoScene

READERS = "a folder with poses_bounds.npy (DyNeRF), with splits and camera (DyCheck) or with "
READERS += "transforms.json, a video, or a folder of pictures"


def reader_name(path: Path) -> str:
    """Return the registered name of the data module that reads a path.

    Raises:
        ValueError: nothing there is of a kind that any of them reads.
    """
    if path.is_dir():
        if (path / "poses_bounds.npy").is_file():
            return "dynerf-datamodule"
        if (path / "splits").is_dir() and (path / "camera").is_dir():
            return "dycheck-datamodule"
        if list(path.glob("transforms*.json")):
            return "transforms-datamodule"
        if list_pictures(path):
            return "video-file-datamodule"
    elif path.is_file():
        if path.name.startswith("transforms") and path.suffix == ".json":
            return "transforms-datamodule"
        if path.suffix.lower() in VIDEOS:
            return "video-file-datamodule"
        if path.suffix.lower() in PICTURES:
            raise ValueError(f"{path} is a single picture; expected {READERS}.")
    else:
        raise ValueError(f"{path} does not exist; expected {READERS}.")
    raise ValueError(f"{path} is nothing that can be read; expected {READERS}.")


def open_scene(path: str | Path, **keys: Any) -> VideoScene:
    """Read the frames and cameras of a path, in the file's own world where that can be.

    Args:
        path: a folder or a file; see `reader_name`.
        keys: config keys of the data module, such as ``downsample`` or ``frame_list``.

    Raises:
        ValueError: nothing there can be read, or a file is broken, naming it.
    """
    import threestudio

    path = Path(path).expanduser()
    name = reader_name(path)
    if name == "dynerf-datamodule":
        keys = {"normalise": "none", **keys}
    return threestudio.find(name)({"dataroot": str(path), **keys}).scene
