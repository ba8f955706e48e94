"""Poses in LLFF's convention: `poses_bounds.npy`, one row of 17 numbers per camera.

A row is a 3 x 5 matrix, row by row, and two bounds. Its columns are the camera's down, right and
backward axes and its position in the world, then (H, W, focal in pixels); the bounds are the depths
of the nearest and farthest content. The principal point is the image's centre.

Legend: n cameras.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .video_scene import check_pose

# Nearest content lands at 1 / 1.08 = 0.93, where the release's boxes and thresholds expect it.
NEAR_SCALE = 1.08


@dataclass
class LlffCameras:
    """What a `poses_bounds.npy` says, in double precision."""

    c2w: Float[Tensor, "n 4 4"]
    """poses of the contract: right, up, backward, position"""
    sizes: Float[Tensor, "n 2"]
    """height and width of the images in pixels"""
    focal: Float[Tensor, "n"]
    """in pixels of that size"""
    bounds: Float[Tensor, "n 2"]
    """nearest and farthest depth"""

    def __len__(self) -> int:
        return len(self.c2w)

    def without(self, row: int) -> LlffCameras:
        """Return all rows but one."""
        keep = [index for index in range(len(self)) if index != row]
        return LlffCameras(self.c2w[keep], self.sizes[keep], self.focal[keep], self.bounds[keep])


def read_poses_bounds(path: Path) -> LlffCameras:
    """Read and check a `poses_bounds.npy`.

    Raises:
        ValueError: the file is missing or no array of rows of 17, or a row holds NaN, a rotation
            that is not orthonormal, or sizes and bounds that cannot be. The row is named.
    """
    try:
        rows = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected one row of 17 numbers per video.") from None
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole array file ({error}); copy it again.") from error
    if rows.ndim != 2 or rows.shape[1] != 17 or rows.dtype.kind not in "fiu":
        raise ValueError(
            f"{path} has shape {rows.shape} and type {rows.dtype}; expected (cameras, 17) numbers: "
            "a 3 x 5 matrix and two bounds per camera."
        )
    table = torch.from_numpy(rows.astype(np.float64))
    matrices, bounds = table[:, :15].reshape(-1, 3, 5), table[:, 15:]
    for row in range(len(table)):
        _check_row(table[row], matrices[row], bounds[row], f"{path} row {row}")
    down, right, backward, position, shape = matrices.unbind(dim=-1)
    c2w = torch.eye(4, dtype=torch.float64).repeat(len(table), 1, 1)
    c2w[:, :3] = torch.stack([right, -down, backward, position], dim=-1)
    for row in range(len(table)):
        check_pose(c2w[row], f"{path} row {row}")
    return LlffCameras(c2w, shape[:, :2], shape[:, 2], bounds)


def average_pose(c2w: Float[Tensor, "n 4 4"]) -> Float[Tensor, "4 4"]:
    """Return the pose in the middle: mean position, mean backward axis, mean up made square to it.

    Raises:
        ValueError: the cameras' axes cancel, as of a full turn, so that there is no middle.
    """
    backward, up = c2w[:, :3, 2].mean(dim=0), c2w[:, :3, 1].mean(dim=0)
    right = torch.linalg.cross(up, backward)
    if float(right.norm()) < 1e-3 or float(backward.norm()) < 1e-3:
        raise ValueError(
            "the cameras look in directions that cancel, so they have no average pose; expected "
            "cameras on one side of the scene. Set data.normalise: none and data.space: world."
        )
    backward, right = backward / backward.norm(), right / right.norm()
    pose = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    axes = [right, torch.linalg.cross(backward, right), backward, c2w[:, :3, 3].mean(dim=0)]
    pose[:3] = torch.stack(axes, dim=-1)
    return pose


def normalise_cameras(cameras: LlffCameras) -> tuple[LlffCameras, Float[Tensor, "4 4"]]:
    """Move the average pose to the identity and divide lengths by 1.08 times the nearest bound.

    Returns:
        the cameras in the new world, and the similarity that takes its points to the file's.

    Raises:
        ValueError: see `average_pose`.
    """
    middle = average_pose(cameras.c2w)
    scale = NEAR_SCALE * float(cameras.bounds.min())
    rotation, position = middle[:3, :3], middle[:3, 3]
    c2w = cameras.c2w.clone()
    c2w[:, :3, :3] = rotation.T @ cameras.c2w[:, :3, :3]
    c2w[:, :3, 3] = (cameras.c2w[:, :3, 3] - position) @ rotation / scale
    back = middle.clone()
    back[:3, :3] = rotation * scale
    return LlffCameras(c2w, cameras.sizes, cameras.focal, cameras.bounds / scale), back


def _check_row(row: Tensor, matrix: Tensor, bounds: Tensor, name: str) -> None:
    if not bool(torch.isfinite(row).all()):
        raise ValueError(f"{name}: its pose holds NaN or infinity; expected 17 finite numbers.")
    if bool((matrix[:, 4] <= 0).any()):
        raise ValueError(
            f"{name}: height, width and focal are {matrix[:, 4].tolist()}; expected positive "
            "pixels in the fifth column."
        )
    if not 0 < float(bounds[0]) < float(bounds[1]):
        raise ValueError(
            f"{name}: its bounds are {bounds.tolist()}; expected 0 < nearest < farthest depth."
        )
