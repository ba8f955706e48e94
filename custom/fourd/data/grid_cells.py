"""Cells rendered once and kept on disk: a time x camera grid, memory-mapped.

A grid is a folder of `frames.npy`, bytes [t c h w 4] (colour times alpha, alpha), and `grid.json`,
which says what they show. `grid_cache` adds latents and features beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from threestudio.utils.saving import replacing
from torch import Tensor

from .pair_cells import CellSource, OrbitCameras

RECORD, FRAMES, PART = "grid.json", "frames.npy", "frames.part.npy"
FORMAT = "threestudio-4d grid 1"
_CAMERA_KEYS = ("c2w", "fovy", "elevation", "azimuth", "radius")


def is_grid(folder: Path) -> bool:
    """Return whether a folder holds a grid, finished or not."""
    return (folder / RECORD).is_file()


class GridCells(CellSource):
    """A finished grid; a cell is read from the memory map.

    Args:
        folder: what `write_grid` made.
        height, width: expected, in pixels.

    Raises:
        ValueError: the folder holds no finished grid, or one of another size.
    """

    is_slow = False

    def __init__(self, folder: Path, height: int, width: int) -> None:
        self.folder, self.record = folder, read_record(folder)
        if not self.record["complete"]:
            raise ValueError(
                f"{folder} holds {self.record['n_done']} of {len(self.record['frame_times'])} "
                "times; run render_grid with the same arguments again to finish it."
            )
        size = self.record["height"], self.record["width"]
        if size != (height, width):
            raise ValueError(
                f"{folder} holds images of {size[0]} x {size[1]} pixels (height x width), and the "
                f"data asks for {height} x {width}. Set data.height and data.width, or render it "
                "again."
            )
        frame_times = torch.tensor(self.record["frame_times"])
        cameras = OrbitCameras(*(torch.tensor(self.record["cameras"][key]) for key in _CAMERA_KEYS))
        self._cells = np.load(folder / FRAMES, mmap_mode="r", allow_pickle=False)
        expected = (len(frame_times), len(cameras), height, width, 4)
        if self._cells.shape != expected or self._cells.dtype != np.uint8:
            raise ValueError(
                f"{folder / FRAMES} holds {self._cells.dtype} of shape {self._cells.shape}; "
                f"expected bytes of shape {expected}. Render the grid again."
            )
        self._latents: np.ndarray | None = None
        self._features: np.ndarray | None = None
        super().__init__(
            self.record["scene_id"], self.record["caption"], frame_times, cameras, height, width
        )

    def read_cell(self, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Copy a cell out of the file."""
        return torch.from_numpy(np.array(self._cells[time_id, camera_id]))

    def use_caches(self, latents: np.ndarray | None, features: np.ndarray | None) -> None:
        """Deliver rows [t c ...] of `grid_cache.open_cache` with the cells."""
        self._latents, self._features = latents, features

    def read_latents(self, time_id: int, camera_id: int) -> Tensor | None:
        """Return a cell's latents, if any are in use."""
        return _row(self._latents, time_id, camera_id)

    def read_features(self, time_id: int, camera_id: int) -> Tensor | None:
        """Return a cell's features, if any are in use."""
        return _row(self._features, time_id, camera_id)


def _row(values: np.ndarray | None, time_id: int, camera_id: int) -> Tensor | None:
    if values is None:
        return None
    return torch.from_numpy(values[time_id, camera_id].astype(np.float32))


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of `grid.json`.

    Raises:
        ValueError: it is missing, no JSON or of another format.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {RECORD}; expected a folder of render_grid.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}).") from error
    if record.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {record.get('format')!r}; expected {FORMAT!r}. Render it again."
        )
    return record


def write_grid(
    folder: Path,
    source: CellSource,
    origin: dict[str, Any],
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Render all cells of a prepared source into a folder, or go on where that was stopped.

    `frames.npy` appears when it is whole. Nothing of another grid is ever overwritten.

    Args:
        folder: made where it is not there.
        source: what to render.
        origin: what it is rendered from, as JSON has it; the same only for the same images.
        report: called with (times done, times in all).

    Raises:
        ValueError: the folder holds something else.
    """
    record = _record_of(source, origin)
    known = _claim(folder, record)
    if known["complete"]:
        return
    n_times, n_cameras = len(source.frame_times), len(source.cameras)
    shape = (n_times, n_cameras, source.height, source.width, 4)
    part, done = folder / PART, int(known["n_done"])
    if (folder / FRAMES).is_file():  # stopped between the rename and the record
        (folder / FRAMES).rename(part)
    if done == 0 or not part.is_file():
        done = 0
        np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape).flush()
    frames = np.lib.format.open_memmap(part, mode="r+")
    for time_id in range(done, n_times):
        for camera_id in range(n_cameras):
            frames[time_id, camera_id] = source.read_cell(time_id, camera_id).numpy()
        # Flushed before it is counted: what counts as done is on disk.
        frames.flush()
        _write_record(folder, {**record, "complete": False, "n_done": time_id + 1})
        if report:
            report(time_id + 1, n_times)
    digest = hashlib.sha256(frames).hexdigest()
    del frames
    part.rename(folder / FRAMES)
    _write_record(folder, {**record, "complete": True, "n_done": n_times, "frames_sha256": digest})


def _record_of(source: CellSource, origin: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "scene_id": source.scene_id,
        "caption": source.caption,
        "height": source.height,
        "width": source.width,
        "frame_times": source.frame_times.tolist(),
        "cameras": {key: getattr(source.cameras, key).tolist() for key in _CAMERA_KEYS},
        "origin": origin,
    }


def _claim(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Make a folder this grid's own, or find that it is."""
    folder.mkdir(parents=True, exist_ok=True)
    if not is_grid(folder):
        found = sorted(entry.name for entry in folder.iterdir())
        if found:
            raise ValueError(
                f"{folder} holds {found[0]} and no {RECORD}; expected a new or empty folder, since "
                "nothing is overwritten."
            )
        _write_record(folder, {**record, "complete": False, "n_done": 0})
    known = read_record(folder)
    # Through JSON, so that numbers compare as they were written.
    changed = [key for key, value in json.loads(json.dumps(record)).items() if known[key] != value]
    if changed:
        raise ValueError(
            f"{folder} holds another grid: its {changed[0]} differs. It is not overwritten; choose "
            "another folder."
        )
    return known


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with replacing(folder / RECORD) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
