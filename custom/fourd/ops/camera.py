"""Cameras: poses, intrinsics, rays, projections and the paths that evaluation walks along.

Legend: ``c2w`` [*batch 4 4] camera to world, camera x right, y up, looking down -z, world z up;
``intrinsics`` [*batch 3 3] in pixels, pixel (column, row) with row 0 at the top of the image and
the centre of the first pixel at (0.5, 0.5); ``depth`` is the Euclidean distance along the ray.
"""

import torch
from jaxtyping import Float
from threestudio.utils.camera import camera_from_orbit, look_at, orbit_position
from torch import Tensor

__all__ = [
    "camera_from_orbit",
    "camera_rays",
    "intrinsics_from_fovy",
    "invert_pose",
    "look_at",
    "motion_smooth_path",
    "multiview_azimuths",
    "ndc_distance",
    "ndc_rays",
    "orbit_position",
    "pixel_centres",
    "pixel_rays",
    "points_from_depth",
    "project_points",
    "relative_distance",
    "stop_and_sweep_path",
    "turntable",
    "turntable_azimuths",
]


def intrinsics_from_fovy(
    fovy_rad: float | Float[Tensor, "*batch"], height: int, width: int
) -> Float[Tensor, "*batch 3 3"]:
    """Return the pinhole matrix [[f, 0, W/2], [0, f, H/2], [0, 0, 1]] with f = H / (2 tan(fovy/2)).

    Args:
        fovy_rad: vertical field of view in radians, in (0, pi).
        height: image height in pixels.
        width: image width in pixels; pixels are square.
    """
    if height < 1 or width < 1:
        raise ValueError(
            f"The image is {height} x {width} pixels; expected at least 1 x 1 (height x width)."
        )
    fovy_rad = torch.as_tensor(fovy_rad)
    if not fovy_rad.is_floating_point():
        fovy_rad = fovy_rad.to(torch.get_default_dtype())
    focal_px = 0.5 * height / torch.tan(0.5 * fovy_rad)
    zeros, ones = torch.zeros_like(focal_px), torch.ones_like(focal_px)
    entries = [
        [focal_px, zeros, 0.5 * width * ones],
        [zeros, focal_px, 0.5 * height * ones],
        [zeros, zeros, ones],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in entries], dim=-2)


def invert_pose(pose: Float[Tensor, "*batch 4 4"]) -> Float[Tensor, "*batch 4 4"]:
    """Return the inverse of a rigid pose, (R, p) -> (R^T, -R^T p), without a linear solve."""
    rotation, translation = pose[..., :3, :3], pose[..., :3, 3:]
    transposed = rotation.transpose(-1, -2)
    upper = torch.cat([transposed, -transposed @ translation], dim=-1)
    return torch.cat([upper, pose[..., 3:, :]], dim=-2)


def camera_rays(
    c2w: Float[Tensor, "*batch 4 4"],
    intrinsics: Float[Tensor, "*batch 3 3"],
    height: int,
    width: int,
) -> tuple[Float[Tensor, "*batch h w 3"], Float[Tensor, "*batch h w 3"]]:
    """Return the rays through all pixel centres, in the world.

    Args:
        c2w: camera poses.
        intrinsics: pinhole matrices in pixels of this ``height`` and ``width``.
        height: image height in pixels; row 0 is the top.
        width: image width in pixels.

    Returns:
        rays_o: origins, equal over each image.
        rays_d: directions of unit length.
    """
    pixels = pixel_centres(height, width, c2w).flatten(0, 1)
    rays_o, rays_d = pixel_rays(pixels, c2w, intrinsics)
    shape = (*c2w.shape[:-2], height, width, 3)
    return rays_o.reshape(shape), rays_d.reshape(shape)


def pixel_centres(height: int, width: int, like: Tensor) -> Float[Tensor, "h w 2"]:
    """Return (column, row) of every pixel's centre, in the type and on the device of ``like``."""
    columns = torch.arange(width, dtype=like.dtype, device=like.device) + 0.5
    rows = torch.arange(height, dtype=like.dtype, device=like.device) + 0.5
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)


def pixel_rays(
    pixels: Float[Tensor, "*#batch n 2"],
    c2w: Float[Tensor, "*batch 4 4"],
    intrinsics: Float[Tensor, "*batch 3 3"],
) -> tuple[Float[Tensor, "*batch n 3"], Float[Tensor, "*batch n 3"]]:
    """Return the rays through given points of images, in the world.

    Args:
        pixels: (column, row) in pixels, the first pixel's centre at (0.5, 0.5).
        c2w: camera poses.
        intrinsics: pinhole matrices in pixels.

    Returns:
        rays_o: origins, equal over each image.
        rays_d: directions of unit length.
    """
    focal_x, focal_y = intrinsics[..., 0, 0, None], intrinsics[..., 1, 1, None]
    center_x, center_y = intrinsics[..., 0, 2, None], intrinsics[..., 1, 2, None]
    x = (pixels[..., 0] - center_x) / focal_x
    y = -(pixels[..., 1] - center_y) / focal_y
    directions = torch.stack([x, y, -torch.ones_like(x)], dim=-1)
    rotation = c2w[..., :3, :3]
    rays_d = torch.nn.functional.normalize(directions @ rotation.transpose(-1, -2), dim=-1)
    rays_o = c2w[..., None, :3, 3].expand_as(rays_d)
    return rays_o, rays_d


def project_points(
    points: Float[Tensor, "*batch n 3"],
    c2w: Float[Tensor, "*batch 4 4"],
    intrinsics: Float[Tensor, "*batch 3 3"],
) -> tuple[Float[Tensor, "*batch n 2"], Float[Tensor, "*batch n"]]:
    """Project world points into the image.

    Returns:
        pixels: (column, row) in pixels, outside of the image too; meaningless where z_depth <= 0.
        z_depth: distance in front of the camera's plane, negative behind it. Not the Euclidean
            distance that renderers return as ``depth``.
    """
    w2c = invert_pose(c2w)
    in_camera = points @ w2c[..., :3, :3].transpose(-1, -2) + w2c[..., None, :3, 3]
    z_depth = -in_camera[..., 2]
    # OpenCV's axes (y down, z forward) turn the pinhole matrix into its usual product.
    in_image = torch.stack([in_camera[..., 0], -in_camera[..., 1], z_depth], dim=-1)
    homogeneous = in_image @ intrinsics.transpose(-1, -2)
    return homogeneous[..., :2] / homogeneous[..., 2:], z_depth


def seen_share(
    points: Float[Tensor, "n 3"],
    c2w: Float[Tensor, "m 4 4"],
    intrinsics: Float[Tensor, "m 3 3"],
    height: int,
    width: int,
) -> Float[Tensor, "n"]:
    """Share of the different cameras in whose image each point lies, in [0, 1].

    Equal cameras count once; what stands before a point does not matter. Memory is that of one
    camera's projection.
    """
    cameras = torch.cat([c2w.flatten(1), intrinsics.flatten(1)], dim=1).unique(dim=0).to(points)
    seen = torch.zeros_like(points[:, 0])
    for camera in cameras:
        pose, matrix = camera[:16].view(4, 4), camera[16:].view(3, 3)
        pixels, z_depth = project_points(points, pose, matrix)
        size = pixels.new_tensor([width, height])
        seen += (z_depth > 0) & (pixels >= 0).all(dim=-1) & (pixels <= size).all(dim=-1)
    return seen / len(cameras)


def points_from_depth(
    rays_o: Float[Tensor, "*batch 3"],
    rays_d: Float[Tensor, "*batch 3"],
    depth: Float[Tensor, "*batch 1"],
) -> Float[Tensor, "*batch 3"]:
    """Return the world points at Euclidean distance ``depth`` along unit rays."""
    return rays_o + depth * rays_d


def ndc_rays(
    rays_o: Float[Tensor, "*batch 3"],
    rays_d: Float[Tensor, "*batch 3"],
    scale: Float[Tensor, "*batch 2"],
    near: float = 1.0,
) -> tuple[Float[Tensor, "*batch 3"], Float[Tensor, "*batch 3"]]:
    """Return rays in normalised device coordinates, for scenes that all cameras face along -z.

    A world point (x, y, z) becomes (-s_x x / z, -s_y y / z, 1 + 2 near / z), so the plane
    z = -near is -1 and infinity is +1. Rays start on the near plane; with the parameter in [0, 1]
    they end at infinity. NeRF (arXiv 2003.08934), appendix C.

    Args:
        rays_o: world origins, before the near plane or behind it.
        rays_d: world directions of any length; those that do not point towards -z have no image.
        scale: (2 f_x / W, 2 f_y / H), focal lengths and image size in pixels.
        near: distance of the near plane from the world's origin.

    Returns:
        rays_o: origins with z = -1.
        rays_d: directions, not of unit length.
    """
    shift = -(near + rays_o[..., 2:]) / rays_d[..., 2:]
    start = rays_o + shift * rays_d
    z = start[..., 2:]
    origins = torch.cat([-scale * start[..., :2] / z, 1 + 2 * near / z], dim=-1)
    slopes = rays_d[..., :2] / rays_d[..., 2:] - start[..., :2] / z
    return origins, torch.cat([-scale * slopes, -2 * near / z], dim=-1)


def ndc_distance(
    parameter: Float[Tensor, "*batch 1"],
    rays_o: Float[Tensor, "*batch 3"],
    rays_d: Float[Tensor, "*batch 3"],
    near: float = 1.0,
) -> Float[Tensor, "*batch 1"]:
    """Return the world distance along a unit ray that has a given parameter on its NDC ray.

    Args:
        parameter: position on the ray of `ndc_rays`, in [0, 1); 1 is infinitely far.
        rays_o: world origins of the same rays.
        rays_d: world directions of unit length.
        near: as given to `ndc_rays`.
    """
    shift = -(near + rays_o[..., 2:]) / rays_d[..., 2:]
    return shift - near * parameter / ((1 - parameter) * rays_d[..., 2:])


def relative_distance(
    distance: float | Float[Tensor, "*batch"], fovy_rad: float | Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Return distance / tan(fovy / 2), which keeps the visible half height equal to ``distance``.

    This is MVDream's reading of a camera distance (`relative_radius`).
    """
    return torch.as_tensor(distance) / torch.tan(0.5 * torch.as_tensor(fovy_rad))


def multiview_azimuths(n_view: int, start_deg: float = 0.0, span_deg: float = 360.0) -> Tensor:
    """Return ``n_view`` azimuths in degrees, equally spaced over ``span_deg`` from ``start_deg``.

    The end of the span is left out: four views over a full turn are 90 degrees apart.
    """
    if n_view < 1:
        raise ValueError(f"n_view is {n_view}; expected at least 1 view.")
    return start_deg + torch.arange(n_view, dtype=torch.get_default_dtype()) * (span_deg / n_view)


def turntable_azimuths(n_views: int, repeat_first: bool = False) -> Float[Tensor, "n_views"]:
    """Return the azimuths in degrees of one full turn that starts at the front.

    Args:
        n_views: number of views, at least 1.
        repeat_first: True ends at 360 degrees (upstream's test video), False one step before
            it (upstream's validation views, and videos that loop).
    """
    if n_views < 1:
        raise ValueError(f"n_views is {n_views}; expected at least 1 view.")
    if repeat_first:
        return torch.linspace(0.0, 360.0, n_views)
    return torch.linspace(0.0, 360.0, n_views + 1)[:n_views]


def turntable(
    n_views: int, elevation_deg: float, distance: float, repeat_first: bool = False
) -> Float[Tensor, "n_views 4 4"]:
    """Return the poses of one full turn at a constant elevation; see `turntable_azimuths`."""
    return camera_from_orbit(elevation_deg, turntable_azimuths(n_views, repeat_first), distance)


def stop_and_sweep_path(
    n_frames: int, n_stops: int = 4, sweep_factor: int = 1
) -> tuple[Float[Tensor, "n_views"], Float[Tensor, "n_views"]]:
    """Walk around a moving scene, playing the whole clip at every stop and on every way between.

    The camera stands for ``n_frames`` at azimuths 0, 90, 180, ... and then turns by 90 degrees
    within ``sweep_factor`` further clips. This is 4D-fy's default test path.

    Args:
        n_frames: views per clip, at least 1.
        n_stops: number of stops.
        sweep_factor: clips played during one turn.

    Returns:
        azimuth_deg: azimuths in degrees.
        frame_times: scene times in [0, 1], one per view.
    """
    sections = []
    for stop in range(n_stops):
        start = 90.0 * stop
        sections.append(torch.full((n_frames,), start))
        sections.append(torch.linspace(start, start + 90.0, n_frames * sweep_factor))
    azimuth_deg = torch.cat(sections)
    clip = torch.linspace(0.0, 1.0, n_frames)
    return azimuth_deg, clip.repeat(len(azimuth_deg) // n_frames)


def motion_smooth_path(
    n_times: int, n_stops: int = 4, drop_repeats: bool = True
) -> tuple[Float[Tensor, "n_views"], Float[Tensor, "n_views"]]:
    """Walk around a moving scene while its clip plays twice: 4D-fy's `motion_smooth`.

    The camera stands at azimuths 360, 270, 180, ... for n_times / n_stops views each and turns
    back by 90 degrees within as many; time never stops. With 64 times and 4 stops: 124 views.

    Args:
        n_times: times over the clip; a multiple of ``n_stops``.
        n_stops: number of stops, even.
        drop_repeats: leave out the first view of each turn, which repeats the stop, and as many
            times at the ends of the two clips (`motion_smooth`); False is `motion_smooth_full`.

    Returns:
        azimuth_deg: azimuths in degrees.
        frame_times: scene times in [0, 1], one per view.

    Raises:
        ValueError: if the times cannot be divided evenly.
    """
    if n_stops < 2 or n_stops % 2 or n_times < n_stops or n_times % n_stops:
        raise ValueError(
            f"{n_times} times cannot be shared by {n_stops} stops; expected an even number of "
            f"stops and a multiple of it as the number of times."
        )
    n_section = n_times // n_stops
    sections = []
    for stop in range(n_stops):
        start = 90.0 * (n_stops - stop)
        sections.append(torch.full((n_section,), start))
        turn = torch.linspace(start, start - 90.0, n_section)
        sections.append(turn[1:] if drop_repeats else turn)
    clip = torch.linspace(0.0, 1.0, n_times)
    if drop_repeats:
        clip = clip[: n_times - n_stops // 2]
    return torch.cat(sections), clip.repeat(2)
