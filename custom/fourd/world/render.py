"""The exact renderer of the world: colour, alpha, depth, normals, optical and scene flow.

Legend: b images (a camera and a scene time each), h x w pixels, k objects. Cameras are the
contract's: `c2w` columns are right, up, backward and position in the z-up world; `fovy` is the
vertical field of view in radians. Colour and alpha are averages over a regular grid of sub-pixel
rays; depth, normals, object indices and flow belong to the ray through the pixel's centre.
Shading does not depend on the viewpoint, so that a radiance field without view directions can be
exactly right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from custom.fourd.ops import camera as ops_camera

from .grammar import WorldObject, WorldScene
from .motion import object_poses
from .shapes import BOUNDING_RADIUS, intersect
from .vocabulary import COLOURS

LIGHT_DIRECTION = (0.42, 0.34, 0.84)
AMBIENT, DIFFUSE = 0.50, 0.50
BACK_ALBEDO = 0.50
"""Factor on the albedo of an object's back half (its own x < 0); shows azimuth and spin."""
BACK_EDGE = 0.06
STRIPE_PERIOD, STRIPE_ALBEDO = 0.40, 0.45
RING_PERIOD, RING_CONTRAST = 0.26, 0.28


@dataclass
class WorldImages:
    """What the renderer sees. Background depth is 0, its normal 0 and its object index -1."""

    rgb: Float[Tensor, "b h w 3"]
    """Colour in [0, 1] over the background."""
    alpha: Float[Tensor, "b h w 1"]
    """Coverage of the pixel by objects in [0, 1]."""
    depth: Float[Tensor, "b h w 1"]
    """Euclidean distance from the camera along the unit ray, in scene units."""
    normal: Float[Tensor, "b h w 3"]
    """Outward unit normal in the world frame."""
    object_index: Int[Tensor, "b h w"]
    """Which object the pixel's centre shows."""


@dataclass
class WorldFlow:
    """Where the surface seen in one image is at another time, for another camera."""

    optical: Float[Tensor, "b h w 2"]
    """Displacement in pixels, x right and y down."""
    scene: Float[Tensor, "b h w 3"]
    """Displacement of the surface point in the world frame, in scene units."""
    is_surface: Bool[Tensor, "b h w"]
    """True where the first image shows an object at the pixel's centre."""
    is_visible: Bool[Tensor, "b h w"]
    """True where that point is also seen, unoccluded and in bounds, by the second camera."""


def camera_rays(
    c2w: Float[Tensor, "b 4 4"], fovy: Float[Tensor, "b"], height: int, width: int
) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w 3"]]:
    """Origins and unit directions through the pixels' centres, row 0 at the image's top."""
    return ops_camera.camera_rays(
        c2w, ops_camera.intrinsics_from_fovy(fovy, height, width), height, width
    )


def render(
    scene: WorldScene,
    c2w: Float[Tensor, "b 4 4"],
    fovy: Float[Tensor, "b"],
    height: int,
    width: int,
    frame_times: Float[Tensor, "b"] | None = None,
    background: Float[Tensor, "3"] | Float[Tensor, "b 3"] | None = None,
    samples_per_axis: int = 2,
) -> WorldImages:
    """The true images of a scene.

    Args:
        frame_times: scene time of each image in [0, 1]; None means 0.
        background: colour in [0, 1]; None means white.
        samples_per_axis: colour and alpha average this many squared rays a pixel.
    """
    frame_times = c2w.new_zeros(len(c2w)) if frame_times is None else frame_times
    cover, shade = render_layers(scene, c2w, fovy, height, width, frame_times, samples_per_axis)
    background = c2w.new_ones(3) if background is None else background
    rgb, alpha = composite_layers(scene, cover, shade, background)
    rays_o, rays_d = camera_rays(c2w, fovy, height, width)
    first = _trace(scene, rays_o, rays_d, frame_times)
    return WorldImages(rgb, alpha, first.distance.unsqueeze(-1), first.normal, first.object_index)


def render_layers(
    scene: WorldScene,
    c2w: Float[Tensor, "b 4 4"],
    fovy: Float[Tensor, "b"],
    height: int,
    width: int,
    frame_times: Float[Tensor, "b"],
    samples_per_axis: int = 2,
) -> tuple[Float[Tensor, "b k h w"], Float[Tensor, "b k h w"]]:
    """Coverage and shading of each object; colour and background come in by `composite_layers`.

    Returns:
        the share of the pixel that shows the object, and the average over the pixel of its
        shading factor (zero where the object is not seen).
    """
    n = samples_per_axis
    rays_o, rays_d = camera_rays(c2w, fovy, height * n, width * n)
    seen = _trace(scene, rays_o, rays_d, frame_times)
    cover, shade = [], []
    for index in range(len(scene.objects)):
        mask = seen.object_index == index
        cover.append(_pool(mask.to(rays_d.dtype), n))
        shade.append(_pool(torch.where(mask, seen.shading, 0.0), n))
    return torch.stack(cover, dim=1), torch.stack(shade, dim=1)


def composite_layers(
    scene: WorldScene,
    cover: Float[Tensor, "b k h w"],
    shade: Float[Tensor, "b k h w"],
    background: Float[Tensor, "3"] | Float[Tensor, "b 3"],
) -> tuple[Float[Tensor, "b h w 3"], Float[Tensor, "b h w 1"]]:
    """Colour and alpha from layers."""
    albedo = cover.new_tensor([COLOURS[item.colour] for item in scene.objects])
    alpha = cover.sum(dim=1).unsqueeze(-1)
    background = background.expand(len(cover), 3)[:, None, None, :]
    return torch.einsum("bkhw,kc->bhwc", shade, albedo) + (1 - alpha) * background, alpha


def flow(
    scene: WorldScene,
    c2w: Float[Tensor, "b 4 4"],
    fovy: Float[Tensor, "b"],
    frame_times: Float[Tensor, "b"],
    c2w_to: Float[Tensor, "b 4 4"],
    fovy_to: Float[Tensor, "b"],
    frame_times_to: Float[Tensor, "b"],
    height: int,
    width: int,
) -> WorldFlow:
    """True motion of every visible surface point from one camera and time to another."""
    rays_o, rays_d = camera_rays(c2w, fovy, height, width)
    seen = _trace(scene, rays_o, rays_d, frame_times)
    points = rays_o + seen.distance.unsqueeze(-1) * rays_d
    moved = points.clone()
    poses = zip(object_poses(scene, frame_times), object_poses(scene, frame_times_to), strict=True)
    for index, (before, after) in enumerate(poses):
        local = _to_object(points, before)
        there = _to_world(local, after)
        moved = torch.where((seen.object_index == index).unsqueeze(-1), there, moved)
    pixels, in_front = project(moved, c2w_to, fovy_to, height, width)
    here, _ = project(points, c2w, fovy, height, width)
    is_surface = seen.object_index >= 0
    inside = (pixels >= 0).all(-1) & (pixels[..., 0] <= width) & (pixels[..., 1] <= height)
    visible = _is_seen(scene, moved, c2w_to, frame_times_to)
    return WorldFlow(
        optical=(pixels - here) * is_surface.unsqueeze(-1),
        scene=(moved - points) * is_surface.unsqueeze(-1),
        is_surface=is_surface,
        is_visible=is_surface & inside & in_front & visible,
    )


def project(
    points: Float[Tensor, "b h w 3"],
    c2w: Float[Tensor, "b 4 4"],
    fovy: Float[Tensor, "b"],
    height: int,
    width: int,
) -> tuple[Float[Tensor, "b h w 2"], Bool[Tensor, "b h w"]]:
    """Pixel coordinates (x right, y down, the first pixel's centre at 0.5) and whether in front.

    The coordinates of what is not in front are 0.
    """
    intrinsics = ops_camera.intrinsics_from_fovy(fovy, height, width)
    pixels, z_depth = ops_camera.project_points(points.flatten(1, 2), c2w, intrinsics)
    in_front = z_depth > 1e-6
    pixels = torch.where(in_front.unsqueeze(-1), pixels, 0.0)
    return pixels.view(*points.shape[:3], 2), in_front.view(points.shape[:3])


@dataclass
class _FirstHit:
    distance: Tensor
    normal: Tensor
    object_index: Tensor
    shading: Tensor


def _to_object(points: Tensor, pose: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    rotation, translation, scale = pose
    moved = points - translation[:, None, None]
    return torch.einsum("bji,bhwj->bhwi", rotation, moved) / scale[:, None, None, None]


def _to_world(points: Tensor, pose: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    rotation, translation, scale = pose
    turned = torch.einsum("bij,bhwj->bhwi", rotation, points) * scale[:, None, None, None]
    return turned + translation[:, None, None]


def _trace(scene: WorldScene, rays_o: Tensor, rays_d: Tensor, frame_times: Tensor) -> _FirstHit:
    """First hits of unit rays [b h w 3]; only rays that meet an object's bounding ball count."""
    shape = rays_d.shape[:-1]
    origins, directions = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)
    image = torch.arange(shape[0], device=rays_d.device).repeat_interleave(shape[1] * shape[2])
    nearest = directions.new_full((len(directions),), torch.inf)
    normal = torch.zeros_like(directions)
    index = torch.full_like(nearest, -1, dtype=torch.long)
    shading = torch.zeros_like(nearest)
    for number, (item, pose) in enumerate(
        zip(scene.objects, object_poses(scene, frame_times), strict=True)
    ):
        rotation, translation, scale = pose
        offset = origins - translation[image]
        along = (offset * directions).sum(-1)
        gap = (offset * offset).sum(-1) - along * along
        rays = torch.nonzero(gap <= (scale[image] * BOUNDING_RADIUS[item.shape]) ** 2).squeeze(-1)
        turn, size = rotation[image[rays]], scale[image[rays]].unsqueeze(-1)
        local_o = torch.einsum("nji,nj->ni", turn, offset[rays]) / size
        local_d = torch.einsum("nji,nj->ni", turn, directions[rays]) / size
        distance, local_normal = intersect(item.shape, local_o, local_d)
        closer = distance < nearest[rays]
        rays, distance, turn = rays[closer], distance[closer], turn[closer]
        world_normal = torch.einsum("nij,nj->ni", turn, local_normal[closer])
        points = local_o[closer] + distance.unsqueeze(-1) * local_d[closer]
        nearest[rays] = distance
        normal[rays] = world_normal
        index[rays] = number
        shading[rays] = _shading(item, points, world_normal)
    distance = torch.where(index >= 0, nearest, 0.0)
    return _FirstHit(
        distance.view(shape), normal.view(rays_d.shape), index.view(shape), shading.view(shape)
    )


def _shading(item: WorldObject, points: Tensor, normals: Tensor) -> Tensor:
    """Factor on the colour, at most 1: a fixed light in the world, patterns on the object."""
    light = normals.new_tensor(LIGHT_DIRECTION)
    lambert = (normals @ (light / light.norm())).clamp_min(0)
    if item.material == "metal":
        lit = 0.26 + 0.74 * lambert**3
    else:
        lit = AMBIENT + DIFFUSE * lambert
    edge = ((points[..., 0] / BACK_EDGE + 1) / 2).clamp(0, 1)
    albedo = BACK_ALBEDO + (1 - BACK_ALBEDO) * edge * edge * (3 - 2 * edge)
    if item.material == "striped":
        wave = torch.sin(points[..., 2] * (2 * math.pi / STRIPE_PERIOD))
        albedo = albedo * torch.where(wave > 0, 1.0, STRIPE_ALBEDO)
    elif item.material == "wooden":
        radius = torch.hypot(points[..., 1], points[..., 2] * 0.6)
        wave = torch.sin(radius * (2 * math.pi / RING_PERIOD))
        albedo = albedo * (1 - RING_CONTRAST * (0.5 + 0.5 * wave))
    return lit * albedo


def _is_seen(scene: WorldScene, points: Tensor, c2w: Tensor, frame_times: Tensor) -> Tensor:
    origins = c2w[:, None, None, :3, 3].expand_as(points)
    offset = points - origins
    distance = offset.norm(dim=-1)
    seen = _trace(scene, origins, offset / distance.clamp_min(1e-9).unsqueeze(-1), frame_times)
    return (seen.object_index >= 0) & (seen.distance > distance - 1e-3)


def _pool(images: Tensor, n: int) -> Tensor:
    if n == 1:
        return images
    b, h, w = images.shape
    return images.view(b, h // n, n, w // n, n).mean(dim=(2, 4))
