"""Paths of a camera around a scene while its time goes on, and their file form `transforms.json`.

Legend: n views of a path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..ops.camera import (
    camera_from_orbit,
    intrinsics_from_fovy,
    motion_smooth_path,
    turntable_azimuths,
)

PATHS = ("orbit", "fixed", "motion_smooth")
SMOOTH_STOPS = 4


@dataclass(frozen=True)
class CameraPath:
    """Poses and scene times of the frames of a video."""

    c2w: Float[Tensor, "n 4 4"]
    """Camera-to-world matrices of the contract."""
    fovy: Float[Tensor, "n"]
    """Vertical fields of view in radians."""
    frame_times: Float[Tensor, "n"]
    """Scene times in [0, 1]."""
    azimuths_deg: Float[Tensor, "n"]
    """Azimuths, in degrees."""

    def __len__(self) -> int:
        return len(self.c2w)


def camera_path(
    kind: str,
    n_frames: int,
    elevation_deg: float = 15.0,
    distance: float = 3.0,
    fovy_deg: float = 40.0,
    azimuth_deg: float = 0.0,
) -> CameraPath:
    """A path on the circle of one elevation and distance around the origin.

    Args:
        kind: "orbit", one full turn while the clip plays once; the last view is one step before
            the first, so the turn loops. "fixed", a standing camera while the clip plays once.
            "motion_smooth", 4D-fy's: the camera stands, turns by a quarter, stands, ... while the
            clip plays twice.
        n_frames: frames of the video. motion_smooth takes the next multiple of 8, less 4.
        elevation_deg: height over the horizon, in (-90, 90).
        distance: of the camera from the origin, in scene units.
        fovy_deg: vertical field of view, in (0, 180).
        azimuth_deg: where the path begins; 0 is the front.

    Raises:
        ValueError: an unknown kind, or a number that cannot work.
    """
    if kind not in PATHS:
        raise ValueError(f"the camera path is {kind!r}; expected one of {', '.join(PATHS)}.")
    if n_frames < 1:
        raise ValueError(f"the camera path has {n_frames} frames; expected at least 1.")
    if not 0.0 < fovy_deg < 180.0:
        raise ValueError(f"fovy_deg is {fovy_deg}; expected more than 0 and less than 180.")
    if not -90.0 < elevation_deg < 90.0 or distance <= 0.0:
        raise ValueError(
            f"elevation_deg is {elevation_deg} and distance {distance}; expected an elevation "
            "between -90 and 90 and a distance above 0."
        )
    if kind == "motion_smooth":
        # 2 * n_times - n_stops views, and n_times is a multiple of n_stops.
        n_times = SMOOTH_STOPS * max(1, math.ceil((n_frames + SMOOTH_STOPS) / (2 * SMOOTH_STOPS)))
        azimuths, frame_times = motion_smooth_path(n_times, SMOOTH_STOPS)
    else:
        frame_times = torch.linspace(0.0, 1.0, n_frames)
        azimuths = torch.zeros(n_frames)
        if kind == "orbit":
            azimuths = turntable_azimuths(n_frames)
    azimuths = azimuths + azimuth_deg
    return CameraPath(
        camera_from_orbit(torch.full_like(azimuths, elevation_deg), azimuths, distance),
        torch.full((len(azimuths),), math.radians(fovy_deg)),
        frame_times,
        azimuths,
    )


def transforms_json(
    path: CameraPath, height: int, width: int, file_paths: Sequence[str]
) -> dict[str, Any]:
    """The content of nerfstudio's `transforms.json` for the frames of a path.

    Poses are camera-to-world with x right, y up, looking down -z, in a world with z up, which is
    the contract's own convention. Each frame also has its scene `time` in [0, 1], as D-NeRF's files
    have it.

    Args:
        path: the cameras; all have one field of view.
        height: of the images in pixels.
        width: of the images in pixels.
        file_paths: of the frames, relative to the file.

    Raises:
        ValueError: the number of files is not that of the views.
    """
    if len(file_paths) != len(path):
        raise ValueError(f"{len(file_paths)} files for {len(path)} views; expected one for each.")
    intrinsics = intrinsics_from_fovy(path.fovy[0].double(), height, width)
    return {
        "camera_model": "OPENCV",
        "w": width,
        "h": height,
        "fl_x": float(intrinsics[0, 0]),
        "fl_y": float(intrinsics[1, 1]),
        "cx": float(intrinsics[0, 2]),
        "cy": float(intrinsics[1, 2]),
        **dict.fromkeys(("k1", "k2", "p1", "p2"), 0.0),
        "frames": [
            {
                "file_path": name,
                "transform_matrix": pose.tolist(),
                "time": round(float(time), 6),
            }
            for name, pose, time in zip(file_paths, path.c2w, path.frame_times, strict=True)
        ],
    }
