"""Where in space anything moves, by what fixed cameras see: the visual hull of moving pixels.

Legend: n points in the world, k cameras, h x w pixels.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from ..ops.camera import project_points
from .ray_batches import MOTION_THRESHOLD
from .video_scene import VideoScene

MARGIN_PX = 2
"""Pixels as close as this to one that moves count as moving: silhouettes are blurred, and a place
is wider than its centre."""


def changing_pixels(
    scene: VideoScene,
    camera: int,
    threshold: float = MOTION_THRESHOLD,
    margin_px: int = MARGIN_PX,
) -> Bool[Tensor, "h w"]:
    """Return which pixels of a fixed camera change at all, and those beside them.

    A pixel changes if the mean of its colour, in [0, 1], has a range above ``threshold`` over the
    camera's frames; slow changes count as much as quick ones.
    """
    shades = scene.frames[scene.camera_rows(camera)].float().mean(dim=-1) / 255
    changes = (shades.amax(dim=0) - shades.amin(dim=0)) > threshold
    side = 2 * margin_px + 1
    return functional.max_pool2d(changes[None].float(), side, 1, margin_px)[0] > 0


def has_fixed_cameras(scene: VideoScene) -> bool:
    """Whether every training camera stands still and does not zoom, so that what changes moves."""
    rows = scene.train_rows()
    return all(_is_fixed(scene, camera) for camera in set(scene.camera_ids[rows].tolist()))


def _is_fixed(scene: VideoScene, camera: int) -> bool:
    rows = scene.camera_rows(camera)
    cameras = torch.cat((scene.c2w[rows].flatten(1), scene.intrinsics[rows].flatten(1)), dim=1)
    return torch.equal(cameras, cameras[:1].expand_as(cameras))


def moving_share(points: Float[Tensor, "n 3"], scene: VideoScene) -> Float[Tensor, "n"]:
    """Share of the training cameras that see a point and see something change there, in [0, 1].

    Points that no camera sees have 1: nothing is known of them. What stands before a point is not
    asked, so a camera whose view is blocked by something at rest says that the point is at rest.

    Raises:
        ValueError: a camera moves, so that its pixels change without anything moving.
    """
    rows = scene.train_rows()
    seen, moving = torch.zeros(2, len(points), device=points.device)
    for camera in sorted(set(scene.camera_ids[rows].tolist())):
        if not _is_fixed(scene, camera):
            raise ValueError(
                f"camera {camera} moves, so what changes in its images need not move in the world; "
                "expected fixed cameras."
            )
        first = int(scene.camera_rows(camera)[0])
        changes = changing_pixels(scene, camera).to(points.device)
        pose, matrix = scene.c2w[first].to(points), scene.intrinsics[first].to(points)
        pixels, z_depth = project_points(points, pose, matrix)
        column, row = pixels.nan_to_num(-1.0, -1.0, -1.0).floor().long().unbind(dim=-1)
        is_inside = (z_depth > 0) & (column >= 0) & (column < scene.width)
        is_inside &= (row >= 0) & (row < scene.height)
        found = changes[row.clamp(0, scene.height - 1), column.clamp(0, scene.width - 1)]
        seen += is_inside
        moving += is_inside & found
    return torch.where(seen > 0, moving / seen.clamp_min(1), 1.0)
