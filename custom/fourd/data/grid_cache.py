"""Rows beside a grid's frames, such as latents, that hold only for one model and one background.

A row of every cell is kept with 16 bits in `cache-<key>.npy`, [t c ...], and `cache-<key>.json`
says which weights made it from which frames over which background. The key is a hash of all that,
so rows of a model that changed since are never read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threestudio.utils.saving import replacing

from .frame_encoders import FrameEncoder
from .grid_cells import GridCells
from .pair_batch import lay_over

BATCH = 16


def cache_record(
    grid: GridCells, identity: dict[str, Any], background: Sequence[float]
) -> dict[str, Any]:
    """Return all that decides the rows of a cache."""
    frames = grid.record["frames_sha256"]
    return {"encoder": identity, "background": [float(v) for v in background], "frames": frames}


def cache_path(grid: GridCells, record: dict[str, Any]) -> Path:
    """Return the file of a record's rows, whether or not it is there."""
    # Where the weights came from decides nothing; what they are does.
    encoder = {key: record["encoder"][key] for key in ("part", "output", "fingerprint")}
    text = json.dumps({**record, "encoder": encoder}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return grid.folder / f"cache-{digest[:16]}.npy"


def write_cache(
    grid: GridCells,
    encoder: FrameEncoder,
    background: Sequence[float],
    report: Callable[[int, int], None] | None = None,
) -> Path:
    """Encode every cell of a grid, unless that was done; the file appears when it is whole.

    Args:
        grid: a finished grid.
        encoder: what makes a row of an image.
        background: colour in [0, 1] behind the cells.
        report: called with (times done, times in all).

    Returns:
        the file of the rows.

    Raises:
        ValueError: a row is not finite or too large for 16 bits.
    """
    record = cache_record(grid, encoder.identity, background)
    path = cache_path(grid, record)
    if path.is_file() and path.with_suffix(".json").is_file():
        return path
    n_times, n_cameras = len(grid.frame_times), len(grid.cameras)
    with replacing(path) as temporary:
        rows = None
        for time_id in range(n_times):
            for first in range(0, n_cameras, BATCH):
                places = range(first, min(first + BATCH, n_cameras))
                encoded = _encode(grid, encoder, background, time_id, places)
                if rows is None:
                    shape = (n_times, n_cameras, *encoded.shape[1:])
                    rows = np.lib.format.open_memmap(
                        temporary, mode="w+", dtype=np.float16, shape=shape
                    )
                rows[time_id, first : first + len(places)] = encoded
            if report:
                report(time_id + 1, n_times)
        rows.flush()
    with replacing(path.with_suffix(".json")) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def _encode(
    grid: GridCells, encoder: FrameEncoder, background: Sequence[float], time_id: int, places: range
) -> np.ndarray:
    cells = torch.stack([grid.read_cell(time_id, camera) for camera in places])
    colour = torch.tensor([float(value) for value in background]).expand(len(cells), 3)
    rows = encoder.encode(lay_over(cells, colour)[0]).cpu()
    if not bool((rows.abs() <= np.finfo(np.float16).max).all()):
        raise ValueError(
            f"{encoder.identity['model']} gives values that are not finite or too large for 16 "
            f"bits, at time {time_id} of {grid.folder}; expected a working model."
        )
    return rows.numpy().astype(np.float16)


def open_cache(
    grid: GridCells, identity: dict[str, Any], background: Sequence[float]
) -> np.ndarray:
    """Return the rows [t c ...] of an encoder, memory-mapped.

    Raises:
        ValueError: there are none, or they are of another version of the model, of other frames,
            or over another background; the message says which.
    """
    record = cache_record(grid, identity, background)
    path = cache_path(grid, record)
    if path.is_file() and path.with_suffix(".json").is_file():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    name, part = identity["model"], identity["part"]
    option = "--latents" if part == "vae" else "--features"
    for other in sorted(grid.folder.glob("cache-*.json")):
        known = json.loads(other.read_text(encoding="utf-8"))
        if known["encoder"]["part"] == part:
            raise ValueError(
                f"{other.name} in {grid.folder} does not fit {name} ({part}): "
                f"{_difference(known, record)}. Run render_grid on it with {option} {name}."
            )
    raise ValueError(
        f"{grid.folder} holds nothing cached of {name} ({part}). Run render_grid on it with "
        f"{option} {name}."
    )


def _difference(known: dict[str, Any], record: dict[str, Any]) -> str:
    for key, told in (("fingerprint", "weights"), ("output", "features")):
        before, now = known["encoder"].get(key), record["encoder"].get(key)
        if before != now:
            return f"its {told} were {_short(before)} and are {_short(now)}"
    if known["background"] != record["background"]:
        return f"its background was {known['background']} and is {record['background']}"
    return "it is of other frames"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
