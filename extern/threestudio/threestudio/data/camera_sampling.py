"""Random cameras as a pure function of (seed, step, item).

Legend: G objects (items) that this process samples, V views of each, B = G * V cameras, the views
of one object next to each other. Every quantity has a stream of its own, so that a configuration
that draws more of one never shifts another.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from threestudio.utils.camera import look_at, orbit_position
from threestudio.utils.ops import (
    get_mvp_matrix,
    get_projection_matrix,
    get_ray_directions,
    get_rays,
)
from threestudio.utils.rng import generator, rand_items, randn_items

# Clipping planes of the contract's projection, in world units.
NEAR_PLANE = 0.01
FAR_PLANE = 100.0


class ItemSpan(NamedTuple):
    """Which objects of a training step this process samples."""

    step: int
    first: int
    """global index of the first object"""
    count: int
    """number of objects here"""
    total: int
    """number of objects in the step, over all processes and accumulated batches"""


class CameraSample(NamedTuple):
    """Cameras before they become matrices and rays; degrees and radians as the names say."""

    elevation_deg: Float[Tensor, "B"]
    azimuth_deg: Float[Tensor, "B"]
    distance: Float[Tensor, "B"]
    """before perturbation"""
    fovy_rad: Float[Tensor, "B"]
    position: Float[Tensor, "B 3"]
    center: Float[Tensor, "B 3"]
    up: Float[Tensor, "B 3"]
    light_position: Float[Tensor, "B 3"]


def draw_uniform(span: ItemSpan, quantity: str, low: float, high: float) -> Float[Tensor, "G"]:
    """Draw one value of U[low, high) per object from its stream "camera-<quantity>"."""
    fractions = rand_items((span.count,), f"camera-{quantity}", span.step, span.first)
    return low + (high - low) * fractions


def draw_normal(span: ItemSpan, quantity: str, std: float) -> Float[Tensor, "G 3"]:
    """Draw one vector of N(0, std^2) per object from its stream "camera-<quantity>"."""
    return std * randn_items((span.count, 3), f"camera-{quantity}", span.step, span.first)


def sample_elevation_deg(span: ItemSpan, elevation_range: tuple[float, float]) -> Tensor:
    """Draw elevations: with probability 1/2 per step uniform in degrees, else on the sphere.

    The coin is shared by the whole step, on all processes. On the sphere, the area between two
    elevations a and b is uniform in the sine: asin(u (sin b - sin a) + sin a).
    """
    low, high = elevation_range
    coin = torch.rand((), generator=generator("camera-elevation-law", span.step))
    if coin < 0.5:
        return draw_uniform(span, "elevation", low, high)
    sine_low, sine_high = torch.deg2rad(torch.tensor([low, high], dtype=torch.float64)).sin()
    sines = draw_uniform(span, "elevation", sine_low, sine_high).clamp(-1.0, 1.0)
    return torch.rad2deg(torch.asin(sines)).to(torch.float32).clamp(low, high)


def sample_azimuth_deg(
    span: ItemSpan, azimuth_range: tuple[float, float], stratified: bool
) -> Float[Tensor, "G"]:
    """Draw azimuths; stratified, object k of K takes the k-th of K equal parts of the range."""
    low, high = azimuth_range
    if not stratified:
        return draw_uniform(span, "azimuth", low, high)
    places = span.first + torch.arange(span.count)
    fractions = (draw_uniform(span, "azimuth", 0.0, 1.0) + places) / span.total
    return low + (high - low) * fractions


def sample_light(span: ItemSpan, cfg: Any, position: Float[Tensor, "B 3"]) -> Float[Tensor, "B 3"]:
    """Draw a point light near each camera; the views of one object share the noise.

    "dreamfusion" scatters the direction of the camera by N(0, 1) * light_position_perturb;
    "magic3d" tilts it by pi/6 to pi/2 above the image plane, at any angle around the axis.
    """
    n_view = position.shape[0] // span.count
    low, high = cfg.light_distance_range
    distance = draw_uniform(span, "light-distance", low, high).repeat_interleave(n_view)[:, None]
    if cfg.light_sample_strategy == "dreamfusion":
        noise = draw_normal(span, "light-direction", cfg.light_position_perturb)
        scattered = position + noise.repeat_interleave(n_view, dim=0)
        return distance * torch.nn.functional.normalize(scattered, dim=-1)
    azimuth_deg = draw_uniform(span, "light-azimuth", -180.0, 180.0)
    elevation_deg = draw_uniform(span, "light-elevation", 30.0, 90.0)
    in_camera = orbit_position(elevation_deg, azimuth_deg, 1.0).repeat_interleave(n_view, dim=0)
    camera_axes = look_at(position)[:, :3, :3]
    return distance * (camera_axes @ in_camera[:, :, None]).squeeze(-1)


def place_cameras(
    span: ItemSpan,
    cfg: Any,
    elevation_deg: Float[Tensor, "B"],
    azimuth_deg: Float[Tensor, "B"],
    distance: Float[Tensor, "B"],
    fovy_rad: Float[Tensor, "B"],
) -> CameraSample:
    """Place cameras on their orbits and perturb them, alike for all views of one object.

    The position moves by U[-camera_perturb, camera_perturb) per axis, the point looked at by
    N(0, center_perturb^2), the up vector by N(0, up_perturb^2).
    """
    n_view = elevation_deg.shape[0] // span.count
    shift = rand_items((span.count, 3), "camera-position", span.step, span.first) * 2.0 - 1.0
    shift = (cfg.camera_perturb * shift).repeat_interleave(n_view, dim=0)
    position = orbit_position(elevation_deg, azimuth_deg, distance) + shift
    center = draw_normal(span, "center", cfg.center_perturb).repeat_interleave(n_view, dim=0)
    up = draw_normal(span, "up", cfg.up_perturb).repeat_interleave(n_view, dim=0)
    up = up + up.new_tensor([0.0, 0.0, 1.0])
    light_position = sample_light(span, cfg, position)
    return CameraSample(
        elevation_deg, azimuth_deg, distance, fovy_rad, position, center, up, light_position
    )


def camera_batch(
    cameras: CameraSample,
    height: int,
    width: int,
    normalize: bool = True,
    directions_unit_focal: Float[Tensor, "H W 3"] | None = None,
) -> dict[str, Any]:
    """Return the contract's batch of cameras: poses, projections and rays.

    Args:
        cameras: what was sampled.
        height: image height in pixels.
        width: image width in pixels.
        normalize: whether ray directions have unit length; otherwise their z in the camera is -1.
        directions_unit_focal: camera directions of this size for a focal length of one pixel.
    """
    if directions_unit_focal is None:
        directions_unit_focal = get_ray_directions(height, width, 1.0)
    c2w = look_at(cameras.position, cameras.center, cameras.up)
    focal_px = 0.5 * height / torch.tan(0.5 * cameras.fovy_rad)
    scale = torch.stack([1.0 / focal_px, 1.0 / focal_px, torch.ones_like(focal_px)], dim=-1)
    directions = directions_unit_focal * scale[:, None, None, :]
    rays_o, rays_d = get_rays(directions, c2w, keepdim=True, normalize=normalize)
    proj_mtx = get_projection_matrix(cameras.fovy_rad, width / height, NEAR_PLANE, FAR_PLANE)
    return {
        "rays_o": rays_o,
        "rays_d": rays_d,
        "mvp_mtx": get_mvp_matrix(c2w, proj_mtx),
        "proj_mtx": proj_mtx,
        "c2w": c2w,
        "camera_positions": cameras.position,
        "light_positions": cameras.light_position,
        "elevation": cameras.elevation_deg,
        "azimuth": cameras.azimuth_deg,
        "camera_distances": cameras.distance,
        "fovy": cameras.fovy_rad,
        "height": height,
        "width": width,
    }
