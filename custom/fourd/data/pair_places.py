"""Where pairs lie: their times and cameras as a batch has them, without any image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from threestudio.data.camera_sampling import ItemSpan
from torch import Tensor

from .pair_cells import CellSource
from .pair_sampling import PairChoice


def pair_places(sources: Sequence[CellSource], choice: PairChoice) -> dict[str, Any]:
    """Times and cameras of pairs.

    Args:
        sources: scenes by their places.
        choice: n pairs.

    Returns:
        ``time_i``, ``time_j`` [n] in [0, 1]; ``camera_a``, ``camera_b``: see
        `FourdPairDataModule`.
    """
    chosen = [sources[place] for place in choice.scene.tolist()]
    sides = (
        ("time_i", "camera_a", choice.frame_i, choice.camera_a),
        ("time_j", "camera_b", choice.frame_j, choice.camera_b),
    )
    found: dict[str, Any] = {}
    for time_key, camera_key, frames, cameras in sides:
        places = list(zip(chosen, frames.tolist(), cameras.tolist(), strict=True))
        found[time_key] = torch.stack([source.frame_times[frame] for source, frame, _ in places])
        rows = [source.cameras.select(torch.tensor([camera])) for source, _, camera in places]
        found[camera_key] = {key: _joined(rows, key) for key in rows[0]}
    return found


def drawn_places(dataset: Any, count: int) -> dict[str, Any]:
    """Times and cameras of about ``count`` pairs of the training's first step, were it so large.

    Args:
        dataset: a `PairDataset`, or what has its ``sources`` and ``sampler``.
    """
    choice = dataset.sampler.draw(ItemSpan(0, 0, count, count))
    return pair_places(dataset.sources, choice)


def _joined(rows: list[dict[str, Tensor]], key: str) -> Tensor:
    return torch.cat([row[key] for row in rows])
