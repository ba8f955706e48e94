"""The camera convention of the contract, as pure functions of angles.

World: right-handed, +z up, +x towards the viewer at azimuth 0, +y to the right as seen from there.
Camera: x right, y up, looking down -z (OpenGL and Blender). A pose ``c2w`` maps camera to world.
Every product below names its axis, so a batch of three cameras is treated as any other.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

# Below this sine of the angle between the line of sight and `up` there is no usable horizon.
_DEGENERATE_SINE = 1e-6


def _as_tensors(*values: float | Tensor | None) -> list[Tensor]:
    """Turn numbers into tensors of the first tensor's type and device, and broadcast them."""
    like = next((value for value in values if isinstance(value, Tensor)), torch.empty(()))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    tensors = [torch.as_tensor(value, dtype=dtype, device=like.device) for value in values]
    return list(torch.broadcast_tensors(*tensors))


def orbit_position(
    elevation_deg: float | Float[Tensor, "*batch"],
    azimuth_deg: float | Float[Tensor, "*batch"],
    distance: float | Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch 3"]:
    """Return the world position d (cos e cos a, cos e sin a, sin e) of a camera on an orbit.

    Args:
        elevation_deg: angle above the xy-plane, in [-90, 90] degrees.
        azimuth_deg: angle from +x towards +y, in degrees.
        distance: distance to the world's origin, in world units; positive.
    """
    elevation_deg, azimuth_deg, distance = _as_tensors(elevation_deg, azimuth_deg, distance)
    elevation, azimuth = torch.deg2rad(elevation_deg), torch.deg2rad(azimuth_deg)
    ground = torch.cos(elevation)
    direction = torch.stack(
        [ground * torch.cos(azimuth), ground * torch.sin(azimuth), torch.sin(elevation)], dim=-1
    )
    return distance[..., None] * direction


def look_at(
    position: Float[Tensor, "*batch 3"],
    center: Float[Tensor, "*batch 3"] | None = None,
    up: Float[Tensor, "*batch 3"] | None = None,
) -> Float[Tensor, "*batch 4 4"]:
    """Return the pose of a camera at ``position`` that looks at ``center``.

    With l = normalize(center - position), r = normalize(l x up) and u = normalize(r x l), the
    columns of the pose are (r, u, -l, position). Where the line of sight is parallel to ``up``,
    the camera is rolled as an orbit's would be at azimuth 0.

    Args:
        position: camera centre in the world.
        center: the point looked at, in the world; the origin if None.
        up: direction that shall point up in the image, of any length; +z if None.
    """
    if position.shape[-1] != 3:
        raise ValueError(
            f"position has shape {tuple(position.shape)}; expected (..., 3). Pass world positions."
        )
    center = torch.zeros_like(position) if center is None else center
    up = position.new_tensor([0.0, 0.0, 1.0]) if up is None else up
    position, center, up = torch.broadcast_tensors(position, center, up)
    lookat = torch.nn.functional.normalize(center - position, dim=-1)
    up = torch.nn.functional.normalize(up, dim=-1)
    right = torch.linalg.cross(lookat, up, dim=-1)
    parallel = right.norm(dim=-1, keepdim=True) < _DEGENERATE_SINE
    substitute = lookat[..., 2:] * position.new_tensor([1.0, 0.0, 0.0])
    right = torch.where(parallel, torch.linalg.cross(lookat, substitute, dim=-1), right)
    right = torch.nn.functional.normalize(right, dim=-1)
    return _assemble(right, lookat, position)


def camera_from_orbit(
    elevation_deg: float | Float[Tensor, "*batch"],
    azimuth_deg: float | Float[Tensor, "*batch"],
    distance: float | Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch 4 4"]:
    """Return the pose of a camera on an orbit around the world's origin, looking at it.

    The horizon follows the azimuth, r = (-sin a, cos a, 0), which equals `look_at` inside the
    open range of elevations and stays defined at the poles.

    Args:
        elevation_deg: angle above the xy-plane, in [-90, 90] degrees.
        azimuth_deg: angle from +x towards +y, in degrees.
        distance: distance to the world's origin, in world units; positive.
    """
    elevation_deg, azimuth_deg, distance = _as_tensors(elevation_deg, azimuth_deg, distance)
    position = orbit_position(elevation_deg, azimuth_deg, distance)
    lookat = -orbit_position(elevation_deg, azimuth_deg, torch.ones_like(distance))
    quarter_turn = torch.deg2rad(azimuth_deg) + math.pi / 2
    right = torch.stack(
        [torch.cos(quarter_turn), torch.sin(quarter_turn), torch.zeros_like(quarter_turn)], dim=-1
    )
    return _assemble(right, lookat, position)


def _assemble(right: Tensor, lookat: Tensor, position: Tensor) -> Tensor:
    """Stack unit right, unit line of sight and position into poses."""
    up = torch.nn.functional.normalize(torch.linalg.cross(right, lookat, dim=-1), dim=-1)
    c2w = torch.stack([right, up, -lookat, position], dim=-1)
    last_row = c2w.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*c2w.shape[:-2], 1, 4)
    return torch.cat([c2w, last_row], dim=-2)
