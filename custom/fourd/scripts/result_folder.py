"""Folders of a tool's results: claimed by one run's settings, and nothing in them overwritten."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

GAP_PX = 2
"""White columns between pictures that stand side by side."""


def claim_output(folder: Path, record: dict[str, Any], name: str, noun: str) -> None:
    """Make an output folder a run's own, or find that it is already.

    Args:
        folder: made where it is not there.
        record: all that decides the results, as JSON has it.
        name: file in ``folder`` that holds the record.
        noun: what the run is called in messages, such as "edit".

    Raises:
        ValueError: the folder holds other files, or the results of another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in {**known, **record} if known.get(key) != record.get(key))
        if changed:
            key = changed[0]
            raise ValueError(
                f"{folder} holds the results of another {noun} ({key} was {known.get(key)!r} and "
                f"is {record.get(key)!r}); they are not overwritten. Choose another --output."
            )
        return
    found = sorted(entry.name for entry in folder.iterdir() if entry.suffix != ".part")
    if found:
        raise ValueError(
            f"{folder} holds {found[0]} and is no folder of this tool's results; nothing is "
            "overwritten. Choose another --output."
        )
    write_new(path, (json.dumps(record, indent=1) + "\n").encode())


def write_new(path: Path, content: bytes) -> None:
    """Write a file under its name only when it is whole, and only where there is none.

    Raises:
        FileExistsError: there is one.
    """
    descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.link(part, path)
    finally:
        os.unlink(part)


def encode_png(image: Float[Tensor, "h w 3"]) -> bytes:
    """A PNG file of an image in [0, 1], rounded to 8 bits."""
    import cv2

    pixels = (image.cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return cv2.imencode(".png", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))[1].tobytes()


def side_by_side(images: Sequence[Tensor]) -> Float[Tensor, "h w2 3"]:
    """One picture of several of one height, [h w 3] in [0, 1] or masks [h w], left to right."""
    parts: list[Tensor] = []
    for image in images:
        if image.ndim == 2:
            image = image.float().unsqueeze(-1).expand(-1, -1, 3)
        if parts:
            parts.append(image.new_ones(len(image), GAP_PX, 3))
        parts.append(image)
    return torch.cat(parts, dim=1)


def write_missing(folder: Path, pictures: dict[str, Tensor]) -> int:
    """Write pictures, [h w 3] in [0, 1] or masks [h w], as `<name>.png` where there is none.

    Returns:
        how many were written; what is there is kept.
    """
    count = 0
    for name, picture in pictures.items():
        path = folder / f"{name}.png"
        if not path.exists():
            write_new(path, encode_png(side_by_side([picture])))
            count += 1
    return count
