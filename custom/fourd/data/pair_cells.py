"""What pairs are drawn from: images of one scene over its times and cameras.

A *cell* is the image of one scene time by one camera, kept as colour times alpha beside alpha, 8
bits each, so that any background can be laid under it and every back end gives the same bytes.

Legend: t scene times, c cameras, a cell has h x w pixels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from ..ops.camera import camera_from_orbit

FULL_TURN_DEG = 360.0


@dataclass(frozen=True)
class OrbitCameras:
    """Cameras that look at the world's origin."""

    c2w: Float[Tensor, "c 4 4"]
    """poses of the contract"""
    fovy: Float[Tensor, "c"]
    """vertical field of view, radians"""
    elevation: Float[Tensor, "c"]
    """height over the horizon, degrees"""
    azimuth: Float[Tensor, "c"]
    """direction, degrees"""
    radius: Float[Tensor, "c"]
    """distance from the origin, scene units"""

    def __len__(self) -> int:
        return len(self.c2w)

    def select(self, ids: Int[Tensor, "b"]) -> dict[str, Tensor]:
        """Return some cameras as a batch has them: its fields by name, one row each."""
        names = ("c2w", "fovy", "elevation", "azimuth", "radius")
        return {name: getattr(self, name)[ids] for name in names}


def orbit_cameras(
    elevations_deg: Sequence[float],
    azimuths_deg: Sequence[float],
    radius: float,
    fovy_deg: float,
) -> OrbitCameras:
    """Return cameras at every elevation and azimuth, the azimuths of an elevation together."""
    elevation, azimuth = torch.meshgrid(
        torch.tensor(elevations_deg, dtype=torch.float32),
        torch.tensor(azimuths_deg, dtype=torch.float32),
        indexing="ij",
    )
    elevation, azimuth = elevation.flatten(), azimuth.flatten()
    return OrbitCameras(
        c2w=camera_from_orbit(elevation, azimuth, float(radius)),
        fovy=torch.full_like(azimuth, math.radians(fovy_deg)),
        elevation=elevation,
        azimuth=azimuth,
        radius=torch.full_like(azimuth, float(radius)),
    )


def wrapped_deg(angle_deg: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """Return angles in degrees as the equal ones in (-180, 180]."""
    return FULL_TURN_DEG / 2 - (FULL_TURN_DEG / 2 - angle_deg) % FULL_TURN_DEG


def delta_view(a: dict[str, Tensor], b: dict[str, Tensor]) -> Float[Tensor, "b 3"]:
    """Return how cameras ``b`` differ from ``a``.

    Returns:
        elevation_b - elevation_a in radians; azimuth_b - azimuth_a in radians, in (-pi, pi];
        log(radius_b / radius_a).
    """
    elevation = torch.deg2rad(b["elevation"] - a["elevation"])
    azimuth = torch.deg2rad(wrapped_deg(b["azimuth"] - a["azimuth"]))
    return torch.stack([elevation, azimuth, torch.log(b["radius"] / a["radius"])], dim=-1)


def view_gaps_deg(cameras: OrbitCameras) -> Float[Tensor, "c c"]:
    """Return how far apart any two cameras are: the larger of both angles' differences, degrees."""
    azimuth = wrapped_deg(cameras.azimuth[:, None] - cameras.azimuth[None]).abs()
    elevation = (cameras.elevation[:, None] - cameras.elevation[None]).abs()
    return torch.maximum(azimuth, elevation)


def scene_times(n_times: int, include_last_time: bool) -> Float[Tensor, "t"]:
    """Return evenly spaced times from 0: k / n, or k / (n - 1) where the last one shall be 1."""
    steps = n_times - 1 if include_last_time else n_times
    return torch.arange(n_times) / max(1, steps)


def cell_bytes(
    colour_over_black: Float[Tensor, "h w 3"], alpha: Float[Tensor, "h w 1"]
) -> UInt8[Tensor, "h w 4"]:
    """Return a cell from colour times alpha and alpha, both in [0, 1]."""
    joined = torch.cat([colour_over_black, alpha], dim=-1)
    return (joined * 255).round().clamp(0, 255).to(torch.uint8).cpu()


class CellSource(ABC):
    """The cells of one scene. A cell is a pure function of its place: nothing random.

    Args:
        scene_id: a name, unique among the scenes of a run.
        caption: the scene in words, for prompts; may be empty.
        frame_times: in [0, 1], growing.
        cameras: who sees the scene.
        height, width: of a cell, in pixels.
    """

    is_slow = True
    """whether a cell costs so much that it is worth remembering"""
    is_prepared = False
    """whether `prepare` was called"""
    loops = False
    """whether time 1 is known to show what time 0 does"""

    def __init__(
        self,
        scene_id: str,
        caption: str,
        frame_times: Float[Tensor, "t"],
        cameras: OrbitCameras,
        height: int,
        width: int,
    ) -> None:
        self.scene_id, self.caption = scene_id, caption
        self.frame_times, self.cameras = frame_times, cameras
        self.height, self.width = height, width

    @property
    def cell_nbytes(self) -> int:
        """Memory of a cell in bytes."""
        return self.height * self.width * 4

    def prepare(self) -> None:
        """Load what reading needs; called once before the first cell is read."""
        self.is_prepared = True

    @abstractmethod
    def read_cell(self, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Return a cell: colour times alpha, and alpha."""

    def read_latents(self, time_id: int, camera_id: int) -> Tensor | None:
        """Return the latents of a cell where they are cached on disk."""
        return None

    def read_features(self, time_id: int, camera_id: int) -> Tensor | None:
        """Return the vision features of a cell where they are cached on disk."""
        return None


class CellMemory:
    """Cells remembered up to a number of bytes; the one unused for longest goes first.

    What is remembered changes no value, only how long a batch takes.

    Args:
        max_bytes: of all cells together; 0 remembers none.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.nbytes = max_bytes, 0
        self._cells: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._cells)

    def read(self, source: CellSource, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Return a cell of a source; it must not be written to."""
        if not source.is_slow:
            return source.read_cell(time_id, camera_id)
        key = (source.scene_id, time_id, camera_id)
        cell = self._cells.get(key)
        if cell is not None:
            self._cells.move_to_end(key)
            return cell
        cell = source.read_cell(time_id, camera_id)
        if cell.nbytes <= self.max_bytes:
            self._cells[key] = cell
            self.nbytes += cell.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._cells.popitem(last=False)[1].nbytes
        return cell
