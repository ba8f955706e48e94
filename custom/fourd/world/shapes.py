"""Exact first hits of rays with the world's shapes, in object space.

Legend: n rays; `rays_o`, `rays_d` are object-space origins and (not necessarily unit) directions,
so that a distance t means the point rays_o + t * rays_d in every space that is similar to it.
Origins lie outside the shapes. A missing ray has the distance inf. All shapes are centred near the
origin; z is up. Five are solved in closed form; the torus is sphere-traced and polished by Newton.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SPHERE_RADIUS = 0.85
CUBE_HALF_EDGE = 0.66
CYLINDER_RADIUS, CYLINDER_HALF_HEIGHT = 0.62, 0.70
CONE_RADIUS, CONE_BASE_Z, CONE_APEX_Z = 0.78, -0.70, 0.85
PYRAMID_HALF_BASE, PYRAMID_BASE_Z, PYRAMID_APEX_Z = 0.76, -0.62, 0.85
TORUS_MAJOR, TORUS_MINOR = 0.62, 0.24
"""The torus stands upright: its axis is x, so that its hole is seen from the front."""

BOUNDING_RADIUS = {
    "sphere": 0.86,
    "cube": 1.15,
    "cylinder": 0.94,
    "cone": 1.06,
    "torus": 0.87,
    "pyramid": 1.25,
}
"""Radius of a ball about the origin that holds the shape."""

TRACE_STEPS, GRAZING_ROUNDS, NEWTON_STEPS, TRACE_HIT = 48, 20, 3, 2e-6


def intersect(
    shape: str, rays_o: Float[Tensor, "n 3"], rays_d: Float[Tensor, "n 3"]
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n 3"]]:
    """First hit of each ray with a shape.

    Returns:
        distance along `rays_d` in units of its length (inf where the ray misses), and the outward
        unit normal in object space (zero where it misses).
    """
    distance = _INTERSECT[shape](rays_o, rays_d)
    hit = torch.isfinite(distance)
    points = rays_o + torch.where(hit, distance, 0.0).unsqueeze(-1) * rays_d
    normals = _NORMAL[shape](points) * hit.unsqueeze(-1)
    return distance, normals


def signed_distance(
    shape: str, points: Float[Tensor, "*batch 3"]
) -> Float[Tensor, "*batch"]:
    """Negative inside, positive outside, zero on the surface.

    The exact Euclidean distance for sphere and torus, a lower bound in magnitude for the others.
    """
    return _SIGNED[shape](points)


def _first(*candidates: Tensor) -> Tensor:
    return torch.stack(candidates).amin(dim=0)


def _solve_quadratic(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Ordered real roots of a t^2 + 2 b t + c; inf where there are none or a vanishes."""
    discriminant = b * b - a * c
    real = (discriminant >= 0) & (a.abs() > 1e-12)
    root = discriminant.clamp_min(0).sqrt()
    safe = torch.where(real, a, 1.0)
    low, high = (-b - root) / safe, (-b + root) / safe
    inf = torch.inf
    return (
        torch.where(real, torch.minimum(low, high), inf),
        torch.where(real, torch.maximum(low, high), inf),
    )


def _valid(distance: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep & torch.isfinite(distance) & (distance > 0), distance, torch.inf)


def _at(rays_o: Tensor, rays_d: Tensor, distance: Tensor) -> Tensor:
    return rays_o + torch.where(torch.isfinite(distance), distance, 0.0).unsqueeze(-1) * rays_d


def _plane_z(rays_o: Tensor, rays_d: Tensor, height: float) -> Tensor:
    slope = rays_d[:, 2]
    safe = torch.where(slope.abs() > 1e-12, slope, 1.0)
    return torch.where(slope.abs() > 1e-12, (height - rays_o[:, 2]) / safe, torch.inf)


def _sphere(rays_o: Tensor, rays_d: Tensor) -> Tensor:
    near, _ = _solve_quadratic(
        (rays_d * rays_d).sum(-1),
        (rays_o * rays_d).sum(-1),
        (rays_o * rays_o).sum(-1) - SPHERE_RADIUS**2,
    )
    return _valid(near, near > 0)


def _convex(rays_o: Tensor, rays_d: Tensor, faces: Tensor, offsets: Tensor) -> Tensor:
    """First hit with the polyhedron {x : faces @ x <= offsets}."""
    slope = rays_d @ faces.T
    gap = offsets - rays_o @ faces.T
    parallel = slope.abs() < 1e-12
    distance = gap / torch.where(parallel, 1.0, slope)
    enter = torch.where((slope < 0) & ~parallel, distance, -torch.inf).amax(-1)
    leave = torch.where((slope > 0) & ~parallel, distance, torch.inf).amin(-1)
    outside = (parallel & (gap < 0)).any(-1)
    return _valid(enter, (enter < leave) & ~outside)


def _cube_faces(like: Tensor) -> tuple[Tensor, Tensor]:
    eye = torch.eye(3, dtype=like.dtype, device=like.device)
    return torch.cat((eye, -eye)), like.new_full((6,), CUBE_HALF_EDGE)


def _pyramid_faces(like: Tensor) -> tuple[Tensor, Tensor]:
    height = PYRAMID_APEX_Z - PYRAMID_BASE_Z
    faces = like.new_tensor(
        [
            [height, 0, PYRAMID_HALF_BASE],
            [-height, 0, PYRAMID_HALF_BASE],
            [0, height, PYRAMID_HALF_BASE],
            [0, -height, PYRAMID_HALF_BASE],
            [0, 0, -1],
        ]
    )
    offsets = like.new_tensor([PYRAMID_HALF_BASE * PYRAMID_APEX_Z] * 4 + [-PYRAMID_BASE_Z])
    length = faces.norm(dim=-1)
    return faces / length.unsqueeze(-1), offsets / length


def _cylinder(rays_o: Tensor, rays_d: Tensor) -> Tensor:
    side, _ = _solve_quadratic(
        (rays_d[:, :2] ** 2).sum(-1),
        (rays_o[:, :2] * rays_d[:, :2]).sum(-1),
        (rays_o[:, :2] ** 2).sum(-1) - CYLINDER_RADIUS**2,
    )
    side = _valid(side, _at(rays_o, rays_d, side)[:, 2].abs() <= CYLINDER_HALF_HEIGHT)
    caps = []
    for height in (CYLINDER_HALF_HEIGHT, -CYLINDER_HALF_HEIGHT):
        cap = _plane_z(rays_o, rays_d, height)
        inside = (_at(rays_o, rays_d, cap)[:, :2] ** 2).sum(-1) <= CYLINDER_RADIUS**2
        caps.append(_valid(cap, inside))
    return _first(side, *caps)


def _cone(rays_o: Tensor, rays_d: Tensor) -> Tensor:
    slope = (CONE_RADIUS / (CONE_APEX_Z - CONE_BASE_Z)) ** 2
    from_apex = rays_o - rays_o.new_tensor([0.0, 0.0, CONE_APEX_Z])
    weight = rays_o.new_tensor([1.0, 1.0, -slope])
    near, far = _solve_quadratic(
        (rays_d * rays_d * weight).sum(-1),
        (from_apex * rays_d * weight).sum(-1),
        (from_apex * from_apex * weight).sum(-1),
    )
    candidates = []
    for lateral in (near, far):
        height = _at(rays_o, rays_d, lateral)[:, 2]
        candidates.append(_valid(lateral, (height >= CONE_BASE_Z) & (height <= CONE_APEX_Z)))
    base = _plane_z(rays_o, rays_d, CONE_BASE_Z)
    inside = (_at(rays_o, rays_d, base)[:, :2] ** 2).sum(-1) <= CONE_RADIUS**2
    return _first(*candidates, _valid(base, inside))


def _torus_distance(points: Tensor) -> Tensor:
    ring = torch.hypot(points[..., 1], points[..., 2]) - TORUS_MAJOR
    return torch.hypot(ring, points[..., 0]) - TORUS_MINOR


def _torus_normal(points: Tensor) -> Tensor:
    radius = torch.hypot(points[..., 1], points[..., 2]).clamp_min(1e-9)
    ring = (radius - TORUS_MAJOR) / radius
    normal = torch.stack((points[..., 0], points[..., 1] * ring, points[..., 2] * ring), dim=-1)
    return normal / normal.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def _torus(rays_o: Tensor, rays_d: Tensor) -> Tensor:
    bound, leave = _solve_quadratic(
        (rays_d * rays_d).sum(-1),
        (rays_o * rays_d).sum(-1),
        (rays_o * rays_o).sum(-1) - (TORUS_MAJOR + TORUS_MINOR) ** 2,
    )
    result = torch.full_like(bound, torch.inf)
    rays = torch.nonzero(torch.isfinite(bound) & (leave > 0)).squeeze(-1)
    if rays.numel() == 0:
        return result
    origins, directions, end = rays_o[rays], rays_d[rays], leave[rays]
    length = directions.norm(dim=-1)
    distance = bound[rays].clamp_min(0)
    for _ in range(TRACE_STEPS):
        gap = _torus_distance(origins + distance.unsqueeze(-1) * directions)
        distance = torch.minimum(distance + gap / length, end)
    # The few rays that graze it come nearer in ever smaller steps; they alone go on.
    for _ in range(GRAZING_ROUNDS):
        gap = _torus_distance(origins + distance.unsqueeze(-1) * directions)
        on = torch.nonzero((gap > TRACE_HIT) & (distance < end)).squeeze(-1)
        if on.numel() == 0:
            break
        reached, o, d = distance[on], origins[on], directions[on]
        for _ in range(TRACE_STEPS):
            gap = _torus_distance(o + reached.unsqueeze(-1) * d)
            reached = torch.minimum(reached + gap / length[on], end[on])
        distance[on] = reached
    hit = _torus_distance(origins + distance.unsqueeze(-1) * directions) <= TRACE_HIT
    for _ in range(NEWTON_STEPS):
        points = origins + distance.unsqueeze(-1) * directions
        gap, slope = _torus_distance(points), (_torus_normal(points) * directions).sum(-1)
        # No ray bends away from the surface faster than the tube does: with this slope it surely
        # meets it, and Newton converges. Others graze; tracing has put them in place.
        meets = (slope < 0) & (slope * slope > 4 / TORUS_MINOR * gap * length * length)
        distance = distance - torch.where(meets, gap / slope, 0.0)
    result[rays] = torch.where(hit & (distance < end), distance, torch.inf)
    return result


def _cylinder_normal(points: Tensor) -> Tensor:
    radius = points[..., :2].norm(dim=-1)
    on_cap = points[..., 2].abs() - CYLINDER_HALF_HEIGHT > radius - CYLINDER_RADIUS
    side = torch.cat((points[..., :2], torch.zeros_like(points[..., :1])), dim=-1)
    side = side / radius.clamp_min(1e-9).unsqueeze(-1)
    return torch.where(on_cap.unsqueeze(-1), _up(points) * points[..., 2:].sign(), side)


def _cone_normal(points: Tensor) -> Tensor:
    height = CONE_APEX_Z - CONE_BASE_Z
    radius = points[..., :2].norm(dim=-1).clamp_min(1e-9)
    side = torch.cat(
        (points[..., :2] / radius.unsqueeze(-1) * height, _up(points)[..., 2:] * CONE_RADIUS), -1
    ) / float((height**2 + CONE_RADIUS**2) ** 0.5)
    lateral = (radius - CONE_RADIUS * (CONE_APEX_Z - points[..., 2]) / height) * height
    on_base = CONE_BASE_Z - points[..., 2] > lateral / float((height**2 + CONE_RADIUS**2) ** 0.5)
    return torch.where(on_base.unsqueeze(-1), -_up(points), side)


def _up(like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_fill_(-1, torch.tensor(2, device=like.device), 1.0)


def _polyhedron_normal(faces_of):
    def normal(points: Tensor) -> Tensor:
        faces, offsets = faces_of(points)
        return faces[(points @ faces.T - offsets).argmax(dim=-1)]

    return normal


def _polyhedron_distance(faces_of):
    def distance(points: Tensor) -> Tensor:
        faces, offsets = faces_of(points)
        return (points @ faces.T - offsets).amax(dim=-1)

    return distance


def _cylinder_distance(points: Tensor) -> Tensor:
    radial = points[..., :2].norm(dim=-1) - CYLINDER_RADIUS
    return torch.maximum(radial, points[..., 2].abs() - CYLINDER_HALF_HEIGHT)


def _cone_distance(points: Tensor) -> Tensor:
    height = CONE_APEX_Z - CONE_BASE_Z
    radius = points[..., :2].norm(dim=-1)
    lateral = (radius * height - CONE_RADIUS * (CONE_APEX_Z - points[..., 2])) / float(
        (height**2 + CONE_RADIUS**2) ** 0.5
    )
    return torch.maximum(lateral, CONE_BASE_Z - points[..., 2])


_INTERSECT = {
    "sphere": _sphere,
    "cube": lambda o, d: _convex(o, d, *_cube_faces(o)),
    "cylinder": _cylinder,
    "cone": _cone,
    "torus": _torus,
    "pyramid": lambda o, d: _convex(o, d, *_pyramid_faces(o)),
}
_NORMAL = {
    "sphere": lambda p: p / p.norm(dim=-1, keepdim=True).clamp_min(1e-9),
    "cube": _polyhedron_normal(_cube_faces),
    "cylinder": _cylinder_normal,
    "cone": _cone_normal,
    "torus": _torus_normal,
    "pyramid": _polyhedron_normal(_pyramid_faces),
}
_SIGNED = {
    "sphere": lambda p: p.norm(dim=-1) - SPHERE_RADIUS,
    "cube": _polyhedron_distance(_cube_faces),
    "cylinder": _cylinder_distance,
    "cone": _cone_distance,
    "torus": _torus_distance,
    "pyramid": _polyhedron_distance(_pyramid_faces),
}
