"""True cells of the scenes that time and view control is tested on, as candidates to look among.

Legend: t times and c cameras of a scene, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.data.pair_batch import lay_over
from custom.fourd.data.pair_cells import CellMemory, CellSource
from custom.fourd.metrics.control_accuracy import (
    Candidates,
    azimuth_gaps_deg,
    frame_gaps,
)

Features = Callable[[Float[Tensor, "n h w 3"]], Float[Tensor, "n f"]]
_SAME_HEIGHT_DEG = 1e-3


class SceneTruth:
    """True images of one scene over a background.

    Args:
        source: the scene, prepared.
        background: colour behind it, in [0, 1].
        features: what images are compared by.
        memory: of cells that cost much.
    """

    def __init__(
        self,
        source: CellSource,
        background: Float[Tensor, "3"],
        features: Features,
        memory: CellMemory,
    ) -> None:
        self.source, self.background = source, background
        self.features, self.memory = features, memory
        self._found: dict[tuple[str, int, int], Candidates] = {}

    def images(
        self, places: Sequence[tuple[int, int]]
    ) -> tuple[Float[Tensor, "n h w 3"], Float[Tensor, "n h w 1"]]:
        """Colour and alpha of cells by (time, camera)."""
        cells = torch.stack([self.memory.read(self.source, *place) for place in places])
        return lay_over(cells, self.background.expand(len(cells), 3))

    def level_cameras(self, camera_id: int) -> list[int]:
        """Cameras at the height and distance of one, it included, in order."""
        cameras = self.source.cameras
        same = (cameras.elevation - cameras.elevation[camera_id]).abs() < _SAME_HEIGHT_DEG
        same &= (cameras.radius - cameras.radius[camera_id]).abs() < _SAME_HEIGHT_DEG
        return torch.nonzero(same).flatten().tolist()

    def times(self, camera_id: int) -> Candidates:
        """All times, seen by one camera; gaps are frames."""
        places = [(time_id, camera_id) for time_id in range(len(self.source.frame_times))]
        gaps = frame_gaps(self.source.frame_times, self.source.loops)
        return self._candidates(("times", camera_id, 0), places, gaps)

    def views(self, time_id: int, camera_id: int) -> Candidates:
        """All cameras of `level_cameras` at one time; gaps are degrees."""
        level = self.level_cameras(camera_id)
        places = [(time_id, camera) for camera in level]
        gaps = azimuth_gaps_deg(self.source.cameras.azimuth[level])
        return self._candidates(("views", time_id, level[0]), places, gaps)

    def _candidates(self, key: tuple, places: list, gaps: Tensor) -> Candidates:
        if key not in self._found:
            rgb, _ = self.images(places)
            self._found[key] = Candidates.of(rgb, self.features(rgb).cpu(), gaps)
        return self._found[key]
