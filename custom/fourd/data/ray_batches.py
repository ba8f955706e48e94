"""Batches of a `VideoScene`: which pixels a training step looks at, and whole frames to compare.

Rays are built for a batch from frames and cameras and never stored. Which pixels a step looks at is
a pure function of (seed, step, shard), so resuming and prefetching change nothing.

Legend: n rays of a batch, p x p pixels of a patch, m moving pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from threestudio.data.camera_sampling import FAR_PLANE, NEAR_PLANE
from threestudio.utils.ops import get_mvp_matrix, get_projection_matrix
from threestudio.utils.rng import generator
from torch import Tensor

from ..ops.camera import camera_rays, ndc_rays, pixel_rays
from .video_scene import VideoScene

# The near plane of NDC, in the units of the normalised world, whose nearest content is at 0.93.
NDC_NEAR = 1.0
MOTION_THRESHOLD = 10 / 255
MOTION_REACH = 5


@dataclass(frozen=True)
class SamplingOptions:
    """How the pixels of a batch are drawn."""

    n_rays: int
    """per batch and process; a multiple of (patch_size samples_per_axis) squared"""
    patch_size: int = 1
    """side of the squares that are drawn whole, in pixels"""
    motion_share: float = 0.0
    """share of the batch that is drawn from pixels that move"""
    motion_until: int | None = None
    """step from which on all pixels are drawn alike; None: never"""
    one_time_per_batch: bool = False
    """whether all rays of a step show one scene time"""
    ndc: bool = False
    """whether rays are in normalised device coordinates"""
    samples_per_axis: int = 1
    """rays per axis of a pixel, one somewhere in each of so many strips; 1: one through its
    centre"""

    @property
    def rays_per_pixel(self) -> int:
        """Their square."""
        return self.samples_per_axis**2


def moving_pixels(
    scene: VideoScene,
    rows: Int[Tensor, "r"],
    threshold: float = MOTION_THRESHOLD,
    reach: int = MOTION_REACH,
) -> list[Bool[Tensor, "h w"]]:
    """Return, for each row, which pixels change near its time.

    A pixel changes at a frame if its mean absolute difference from the camera's previous frame, in
    [0, 1], exceeds ``threshold``; a camera's first frame has no previous one. The mask of a frame
    is the union over the ``reach`` frames before it, itself and as many after it.
    """
    masks: dict[int, Tensor] = {}
    wanted = set(rows.tolist())
    for camera in scene.cameras():
        stream = [row for row in scene.camera_rows(camera).tolist() if row in wanted]
        changes = []
        for place, row in enumerate(stream):
            if place == 0:
                changes.append(torch.zeros(scene.frames.shape[1:3], dtype=torch.bool))
                continue
            pair = scene.frames[row].short(), scene.frames[stream[place - 1]].short()
            changes.append((pair[0] - pair[1]).abs().sum(-1) > 3 * 255 * threshold)
        for place, row in enumerate(stream):
            near = changes[max(0, place - reach) : place + reach + 1]
            masks[row] = torch.stack(near).any(dim=0)
    return [masks[row] for row in rows.tolist()]


class RaySampler:
    """Draws the pixels of training batches, some of them where the scene moves.

    Args:
        scene: frames and cameras; only its `train_rows` are drawn.
        options: see `SamplingOptions`.

    Raises:
        ValueError: the patches do not fit the batch or the frames.
    """

    def __init__(self, scene: VideoScene, options: SamplingOptions) -> None:
        side = options.patch_size
        in_patch = side**2 * options.rays_per_pixel
        if options.n_rays % in_patch:
            raise ValueError(
                f"batch_size is {options.n_rays} rays; expected a multiple of (patch_size times "
                f"samples_per_axis) squared, {in_patch}."
            )
        if side > min(scene.height, scene.width):
            raise ValueError(
                f"patch_size is {side} for frames of {scene.height} x {scene.width} pixels; "
                "expected at most the smaller side."
            )
        self.scene, self.options = scene, options
        self.rows = scene.train_rows()
        self._rows_at = {
            time: torch.nonzero(scene.time_ids[self.rows] == time).flatten()
            for time in sorted(set(scene.time_ids[self.rows].tolist()))
        }
        self._moving, self._first_moving = self._list_moving()

    def draw(self, step: int, shard: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the pixels of a batch.

        Args:
            step: training step. shard: place of the batch in its step, over ranks and accumulated
                batches.

        Returns:
            rows of the scene, pixel rows and pixel columns [n], the pixels of a patch together and
            row by row. Random from the role "rays"; the time of a step from "ray-time".
        """
        options, scene = self.options, self.scene
        side = options.patch_size
        n_patches = options.n_rays // (side**2 * options.rays_per_pixel)
        stream = generator("rays", step, shard)
        allowed = torch.arange(len(self.rows))
        if options.one_time_per_batch:
            times = list(self._rows_at)
            choice = torch.randint(len(times), (), generator=generator("ray-time", step))
            allowed = self._rows_at[times[int(choice)]]
        use_motion = options.motion_until is None or step < options.motion_until
        n_moving = round(options.motion_share * n_patches) if use_motion else 0
        place, pixel = self._draw_moving(allowed, n_moving, stream)
        n_rest = n_patches - len(place)
        rest = allowed[torch.randint(len(allowed), (n_rest,), generator=stream)]
        n_places = (scene.height - side + 1, scene.width - side + 1)
        top, left = (
            torch.cat([start, torch.randint(count, (n_rest,), generator=stream)])
            for start, count in zip(self._corner(pixel), n_places, strict=True)
        )
        rows = self.rows[torch.cat([place, rest])]
        within = torch.arange(side)
        down, along = torch.meshgrid(within, within, indexing="ij")
        return (
            rows.repeat_interleave(side**2),
            (top[:, None] + down.flatten()).flatten(),
            (left[:, None] + along.flatten()).flatten(),
        )

    def batch(self, step: int, shard: int = 0) -> dict[str, Any]:
        """Return the rays of a step and what they should show.

        Returns:
            "rays_o", "rays_d" [n 3]; "frame_times" [n] in [0, 1]; "near", "far" along the rays;
            "rays_per_pixel" m: rays of a pixel follow each other, and what follows is of the p =
            n / m pixels: "rgb" [p 3] in [0, 1]; "index" [p], rows of the scene; "pixels" [p 2],
            integer (column, row); "patch_size"; "step"; and, where the scene has them, "depth"
            [p 1] in world units along unit rays, 0 where missing, and "mask" [p 1]. In NDC also
            "world_rays_o" and "world_rays_d" [n 3], of unit length. Where several rays look
            through a pixel, their places in it are random from the role "ray-places".
        """
        rows, y, x = self.draw(step, shard)
        scene, count = self.scene, self.options.rays_per_pixel
        pixels = torch.stack([x, y], dim=-1)
        places = pixels[:, None] + self._places_in_pixels(len(rows), step, shard)
        rays = pixel_rays(places, scene.c2w[rows], scene.intrinsics[rows])
        of_rays = rows.repeat_interleave(count)
        batch = _rays(scene, of_rays, *(part.flatten(0, 1) for part in rays), self.options.ndc) | {
            "frame_times": scene.frame_times[of_rays],
            "rays_per_pixel": count,
            "rgb": scene.frames[rows, y, x].float() / 255.0,
            "index": rows,
            "pixels": pixels,
            "patch_size": self.options.patch_size,
            "step": step,
        }
        if scene.depth is not None:
            batch["depth"] = scene.depth[rows, y, x, None]
        if scene.masks is not None:
            batch["mask"] = (scene.masks[rows, y, x, None] > 0).float()
        return batch

    def _places_in_pixels(self, n_pixels: int, step: int, shard: int) -> Float[Tensor, "p m 2"]:
        """Where in a pixel its rays look through, (right, down) in [0, 1]."""
        side = self.options.samples_per_axis
        if side == 1:
            return torch.full((1, 1, 2), 0.5)
        strips = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32),) * 2)
        stream = generator("ray-places", step, shard)
        within = torch.rand((n_pixels, side**2, 2), generator=stream)
        return (strips + within) / side

    def _list_moving(self) -> tuple[Tensor, Tensor]:
        """All moving pixels, row after row, and where each row's begin."""
        if self.options.motion_share <= 0:
            return torch.zeros(0, dtype=torch.int32), torch.zeros(len(self.rows) + 1).long()
        pixels = [
            torch.nonzero(mask.flatten()).flatten().int()
            for mask in moving_pixels(self.scene, self.rows)
        ]
        counts = torch.tensor([0, *(len(part) for part in pixels)])
        return torch.cat(pixels), counts.cumsum(0)

    def _draw_moving(
        self, allowed: Tensor, count: int, stream: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Moving pixels of the allowed rows, each as likely as any other; none if nothing moves."""
        first = self._first_moving[allowed]
        upto = (self._first_moving[allowed + 1] - first).cumsum(0)
        total = int(upto[-1])
        if total == 0 or count == 0:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)
        ordinal = torch.randint(total, (count,), generator=stream)
        which = torch.searchsorted(upto, ordinal, right=True)
        before = torch.cat([upto.new_zeros(1), upto])[which]
        return allowed[which], self._moving[first[which] + ordinal - before].long()

    def _corner(self, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """Top and left of the patch around a pixel, moved into the frame."""
        side, width, height = self.options.patch_size, self.scene.width, self.scene.height
        top = (pixel // width - side // 2).clamp(0, height - side)
        return top, (pixel % width - side // 2).clamp(0, width - side)


def frame_batch(scene: VideoScene, row: int, ndc: bool = False) -> dict[str, Any]:
    """Return a whole frame as a batch of one image, with the contract's camera keys.

    Further keys: "intrinsics" [1 3 3], "frame_times" [1], "rgb" [1 h w 3] in [0, 1], "index" [1],
    "camera_id", "time_id", "near", "far", and where the scene has them "depth" and "mask"
    [1 h w 1]. The projection matrices leave an off-centre principal point out; rays do not.
    """
    c2w, intrinsics = scene.c2w[row : row + 1], scene.intrinsics[row : row + 1]
    height, width = scene.height, scene.width
    rays_o, rays_d = camera_rays(c2w, intrinsics, height, width)
    position = c2w[:, :3, 3]
    distance = position.norm(dim=-1).clamp_min(1e-9)
    fovy = 2 * torch.atan(0.5 * height / intrinsics[:, 1, 1])
    aspect = float(width / intrinsics[0, 0, 0] * intrinsics[0, 1, 1] / height)
    proj_mtx = get_projection_matrix(fovy, aspect, NEAR_PLANE, FAR_PLANE)
    batch = _rays(scene, torch.tensor([row]), rays_o, rays_d, ndc) | {
        "mvp_mtx": get_mvp_matrix(c2w, proj_mtx),
        "proj_mtx": proj_mtx,
        "c2w": c2w,
        "intrinsics": intrinsics,
        "camera_positions": position,
        "light_positions": position,
        "elevation": torch.rad2deg(torch.asin((position[:, 2] / distance).clamp(-1, 1))),
        "azimuth": torch.rad2deg(torch.atan2(position[:, 1], position[:, 0])),
        "camera_distances": distance,
        "fovy": fovy,
        "height": height,
        "width": width,
        "frame_times": scene.frame_times[row : row + 1],
        "rgb": scene.frames[row : row + 1].float() / 255.0,
        "index": torch.tensor([row]),
        "camera_id": int(scene.camera_ids[row]),
        "time_id": int(scene.time_ids[row]),
    }
    if scene.depth is not None:
        batch["depth"] = scene.depth[row : row + 1, ..., None]
    if scene.masks is not None:
        batch["mask"] = (scene.masks[row : row + 1, ..., None] > 0).float()
    return batch


def ndc_scale(scene: VideoScene, rows: Int[Tensor, "b"]) -> Float[Tensor, "b 2"]:
    """Return (2 f_x / W, 2 f_y / H) of each row; see `ops.camera.ndc_rays`."""
    focal = torch.stack([scene.intrinsics[rows, 0, 0], scene.intrinsics[rows, 1, 1]], dim=-1)
    return 2 * focal / focal.new_tensor([scene.width, scene.height])


def _rays(scene: VideoScene, rows: Tensor, rays_o: Tensor, rays_d: Tensor, ndc: bool) -> dict:
    if not ndc:
        return {"rays_o": rays_o, "rays_d": rays_d, "near": scene.near, "far": scene.far}
    # All cameras share the first one's scale: NDC must be one map of the world, not one each.
    scale = ndc_scale(scene, torch.zeros_like(rows)).view(-1, *(1,) * (rays_o.ndim - 2), 2)
    origins, directions = ndc_rays(rays_o, rays_d, scale.expand(*rays_o.shape[:-1], 2), NDC_NEAR)
    return {
        "rays_o": origins,
        "rays_d": directions,
        "world_rays_o": rays_o,
        "world_rays_d": rays_d,
        "near": 0.0,
        "far": 1.0,
    }
