"""Cameras in JSON as nerfstudio and D-NeRF write them: `transforms.json`.

`transform_matrix` is camera to world with x right, y up, looking down -z, which is the contract's
own; intrinsics stand in the file, in a frame, or follow from `camera_angle_x` (radians).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .video_scene import check_pose

DISTORTIONS = ("k1", "k2", "k3", "k4", "p1", "p2")
ASPECT_TOLERANCE = 0.01


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing.") from None
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON file ({error}).") from error


def frame_pose(frame: dict[str, Any], name: str) -> Float[Tensor, "4 4"]:
    """Return the checked pose of a frame.

    Args:
        frame: entry of "frames". name: file and row, for messages.

    Raises:
        ValueError: the matrix is missing, of another shape, or no rigid pose.
    """
    try:
        pose = torch.tensor(frame["transform_matrix"], dtype=torch.float64)
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{name}: its transform_matrix is missing or no matrix of numbers; expected 4 x 4."
        ) from None
    if pose.shape == (3, 4):
        pose = torch.cat([pose, pose.new_tensor([[0.0, 0.0, 0.0, 1.0]])])
    if pose.shape != (4, 4):
        raise ValueError(f"{name}: its transform_matrix is {tuple(pose.shape)}; expected 4 x 4.")
    check_pose(pose.float(), name)
    return pose.float()


def frame_intrinsics(
    content: dict[str, Any],
    frame: dict[str, Any],
    seen: tuple[int, int],
    size: tuple[int, int],
    name: str,
) -> Float[Tensor, "3 3"]:
    """Return the pinhole matrix of a frame, in pixels of the size it is read at.

    Args:
        content: the file. frame: entry of "frames", which comes first.
        seen: (height, width) of the picture in its file.
        size: (height, width) that it is read at.
        name: file and row, for messages.

    Raises:
        ValueError: no focal length, a distorted lens, or a picture of another shape than the file
            says.
    """
    facts = {**content, **frame}
    if facts.get("camera_model", "OPENCV") not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE"):
        raise ValueError(
            f"{name}: camera_model is {facts['camera_model']!r}; expected a pinhole. Undistort the "
            "pictures first."
        )
    bent = [key for key in DISTORTIONS if facts.get(key)]
    if bent:
        raise ValueError(
            f"{name}: lens distortion {bent[0]} is {facts[bent[0]]}; expected pictures without. "
            "Undistort them first, for example with COLMAP's image_undistorter."
        )
    height, width = float(facts.get("h", seen[0])), float(facts.get("w", seen[1]))
    if abs(seen[1] * height / (seen[0] * width) - 1) > ASPECT_TOLERANCE:
        raise ValueError(
            f"{name}: its picture has {seen[1]} x {seen[0]} pixels, but the file says {width:g} x "
            f"{height:g}; expected one shape."
        )
    if "fl_x" in facts:
        focal_x = float(facts["fl_x"])
    elif "camera_angle_x" in facts:
        focal_x = 0.5 * width / math.tan(0.5 * float(facts["camera_angle_x"]))
    else:
        raise ValueError(f"{name}: there is no focal length; expected fl_x or camera_angle_x.")
    focal_y = float(facts.get("fl_y", focal_x))
    to_x, to_y = size[1] / width, size[0] / height
    return torch.tensor(
        [
            [focal_x * to_x, 0.0, float(facts.get("cx", 0.5 * width)) * to_x],
            [0.0, focal_y * to_y, float(facts.get("cy", 0.5 * height)) * to_y],
            [0.0, 0.0, 1.0],
        ]
    )


def frame_time(frame: dict[str, Any], name: str) -> float | None:
    """Return the scene time of a frame in [0, 1], None where it has none.

    Raises:
        ValueError: it is no number in [0, 1].
    """
    if "time" not in frame:
        return None
    time = frame["time"]
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time <= 1:
        raise ValueError(f"{name}: its time is {time!r}; expected a number in [0, 1].")
    return float(time)


def distance_bounds(
    c2w: Float[Tensor, "n 4 4"], near: float | None, far: float | None, radius: float
) -> tuple[float, float]:
    """Return near and far along rays, those not given from a ball of content around the origin.

    Args:
        c2w: cameras. near, far: given bounds, or None. radius: of the ball, in world units.
    """
    distance = c2w[:, :3, 3].norm(dim=-1)
    near = max(0.02 * radius, float(distance.min()) - radius) if near is None else near
    return near, float(distance.max()) + radius if far is None else far
