"""Triangle meshes of a scene over time, in the colours that its renders show.

Every time has its own topology: the surface is cut out of a density anew. One threshold holds for
all times, so that nothing swells or shrinks because the threshold does. A coarse look at the whole
box finds where the scene ever is; the grid proper covers that part only.

A radiance field has no colour of its surface: at a low density the colour is what nothing ever
looked at. So a vertex takes the colour that a ray sees which meets it head-on, composited over a
thin layer below the surface as the volume renderer does.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from threestudio.models.exporters.mesh_exporter import surface_albedo
from threestudio.models.mesh import Mesh
from threestudio.utils.ops import chunk_batch
from torch import Tensor

from custom.fourd.ops.surface_nets import surface_nets
from custom.fourd.renderers.scene import Scene

FIELD_CHUNK = 2**17
COARSE_RESOLUTION = 32  # cells per axis of the look at the whole box
OPACITY_LAYER = 0.05  # of the box's half-width; how thick the layer is whose opacity is compared
COLOR_LAYER = (0.03, -0.12)  # of the half-width, from outside to inside along the normal
COLOR_SAMPLES = 8
OTSU_BINS = 256
OUTLIER_SHARE = 0.01  # parts with fewer of the faces are dust


@dataclass
class SceneMeshes:
    """One mesh per scene time; None where nothing reaches the threshold."""

    meshes: list[Mesh | None]
    """Vertices in world units with colours in [0, 1], as renders show them (sRGB)."""
    threshold: float
    """Level of the surface."""
    field_range: tuple[float, float]
    """Lowest and highest value of the field over all grid points and times."""

    @property
    def is_empty(self) -> bool:
        """Whether no time has a surface."""
        return all(mesh is None for mesh in self.meshes)

    def advice(self) -> str:
        """One sentence for a surface that is missing: what was found, and what to set."""
        low, high = self.field_range
        if high - low < 1e-6:
            return (
                f"the field is {high:.4g} everywhere, so there is no surface to find; train longer."
            )
        return (
            f"nothing reaches the threshold {self.threshold:.4g}: the field lies in "
            f"[{low:.4g}, {high:.4g}]. Set system.exporter.mesh_threshold inside that range, "
            f"{(low + high) / 2:.3g} for example, or to null, or train longer."
        )


def scene_meshes(
    scene: Scene,
    frame_times: Sequence[float] | None,
    resolution: int = 64,
    threshold: float | None = None,
    report: Callable[[int], None] = lambda done: None,
) -> SceneMeshes:
    """Cut the surface out of a scene's geometry at some scene times; not differentiable.

    Args:
        scene: its geometry is implicit, or has an `isosurface` of its own.
        frame_times: scene times in [0, 1]; None is one mesh at the geometry's own time.
        resolution: cells along the longest side of where the scene ever is.
        threshold: level of the surface. None takes, of a density, the one that best separates
            full from empty space over all times (see `separating_density`), and of another field
            (a signed distance) the geometry's `isosurface_threshold`.
        report: called with the number of times that are done.

    Raises:
        ValueError: `resolution` is below 2, or the geometry cannot be meshed.
    """
    if resolution < 2:
        raise ValueError(f"mesh_resolution is {resolution}; expected at least 2 cells per axis.")
    times: list[float | None] = [None] if frame_times is None else [float(t) for t in frame_times]
    geometry = scene.geometry
    if not hasattr(geometry, "forward_level"):
        return _own_surface(scene, times)
    bbox = geometry.bbox.detach()
    coarse = [_field_values(geometry, _grid(bbox, COARSE_RESOLUTION), time) for time in times]
    values = torch.stack(coarse)
    if threshold is None:
        threshold = _default_threshold(geometry, values)
    found = SceneMeshes([], float(threshold), (float(values.min()), float(values.max())))
    box = _occupied_box(geometry, values, found.threshold)
    grid = None if box is None else _grid(box, resolution)
    for index, time in enumerate(times):
        mesh = None if grid is None else _extract(scene, grid, found.threshold, time)
        found.meshes.append(mesh)
        report(index + 1)
    return found


def separating_density(densities: Float[Tensor, "n_points"], radius: float) -> float:
    """The density that best separates full from empty space, by Otsu's method (1979).

    Densities are compared by the opacity of a thin layer, 1 - exp(-density * thickness), whose
    range is [0, 1): so a few very dense points do not decide. 0 where nothing is dense.

    Args:
        densities: at the points of a regular grid, per world unit.
        radius: half-width of the scene's box, in world units.
    """
    thickness = OPACITY_LAYER * radius
    opacity = 1.0 - torch.exp(-densities.clamp(min=0.0) * thickness)
    highest = float(opacity.max())
    if highest < 1e-6:
        return 0.0
    counts = torch.histc(opacity.detach().float(), OTSU_BINS, 0.0, highest).double()
    shares = counts / counts.sum()
    centers = (torch.arange(OTSU_BINS, device=shares.device) + 0.5) * (highest / OTSU_BINS)
    below = shares.cumsum(0)[:-1]
    mean_below, mean = (shares * centers).cumsum(0)[:-1], float((shares * centers).sum())
    variance = (mean * below - mean_below) ** 2 / (below * (1.0 - below)).clamp(min=1e-12)
    edge = (int(variance.argmax()) + 1) * highest / OTSU_BINS
    return -math.log(1.0 - edge) / thickness


def _grid(box: Float[Tensor, "2 3"], resolution: int) -> Float[Tensor, "nx ny nz 3"]:
    """World points of a grid whose cells are cubes, `resolution` of them along the longest side."""
    sides = box[1] - box[0]
    cell = float(sides.max()) / resolution
    axes = [
        torch.linspace(float(low), float(low + side), max(round(float(side) / cell), 1) + 1)
        for low, side in zip(box[0], sides, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).to(box)


@torch.no_grad()
def _field_values(
    geometry: Any, grid: Float[Tensor, "nx ny nz 3"], time: float | None
) -> Float[Tensor, "nx ny nz"]:
    takes_times = "frame_times" in inspect.signature(geometry.forward_field).parameters

    def query(points: Tensor) -> Tensor:
        if time is None or not takes_times:
            return geometry.forward_field(points)[0]
        return geometry.forward_field(points, frame_times=points.new_full((len(points),), time))[0]

    return chunk_batch(query, FIELD_CHUNK, grid.reshape(-1, 3)).reshape(grid.shape[:-1])


def _occupied_box(
    geometry: Any, values: Float[Tensor, "t nx ny nz"], threshold: float
) -> Float[Tensor, "2 3"] | None:
    """The box of all that is ever inside, a coarse cell larger; None where nothing is."""
    inside = (geometry.forward_level(values, threshold) < 0).any(dim=0)
    # A box that is full to its last point has no surface either.
    if not bool(inside.any()) or bool(inside.all()):
        return None
    places = inside.nonzero()
    low, high = places.amin(dim=0) - 1, places.amax(dim=0) + 1
    share = torch.stack([low, high]).clamp(0, COARSE_RESOLUTION) / COARSE_RESOLUTION
    return torch.lerp(geometry.bbox[0].expand(2, 3), geometry.bbox[1].expand(2, 3), share)


def _extract(
    scene: Scene, grid: Float[Tensor, "nx ny nz 3"], threshold: float, time: float | None
) -> Mesh | None:
    values = _field_values(scene.geometry, grid, time)
    v_pos, faces = surface_nets(scene.geometry.forward_level(values, threshold))
    if len(faces) == 0:
        return None
    size = torch.tensor(grid.shape[:3], device=grid.device) - 1
    v_pos = torch.lerp(grid[0, 0, 0].expand_as(v_pos), grid[-1, -1, -1], v_pos / size)
    mesh = Mesh(v_pos, faces).remove_outlier(OUTLIER_SHARE)
    mesh.set_vertex_color(_seen_colors(scene, mesh, time))
    return mesh


def _default_threshold(geometry: Any, values: Tensor) -> float:
    if _is_density(geometry, values):
        return separating_density(values.reshape(-1), float(geometry.cfg.radius))
    configured = geometry.cfg.get("isosurface_threshold", 0.0)
    return 0.0 if configured == "auto" else float(configured)


def _is_density(geometry: Any, values: Tensor) -> bool:
    """Whether the field is one of which more is inside, and that is never negative."""
    more_is_inside = bool((geometry.forward_level(values.new_ones(1, 1), 0.0) < 0).all())
    return more_is_inside and bool((values >= 0).all())


@torch.no_grad()
def _seen_colors(scene: Scene, mesh: Mesh, time: float | None) -> Float[Tensor, "n_vertices 3"]:
    geometry, material = scene.geometry, scene.material
    # What does not take times at the one place does not at the other.
    time = _known_time(geometry.forward_field, time)
    own = surface_albedo(geometry, material, mesh.v_pos, time)
    if not hasattr(geometry, "forward_density"):
        return own.clamp(0, 1)
    radius = float(geometry.cfg.radius)
    offsets = torch.linspace(*COLOR_LAYER, COLOR_SAMPLES).to(mesh.v_pos) * radius
    points = mesh.v_pos[:, None] + offsets[None, :, None] * mesh.v_nrm[:, None]
    flat = points.reshape(-1, 3).clamp(-radius, radius)
    times = None if time is None else flat.new_full((len(flat),), time)
    density = chunk_batch(geometry.forward_density, FIELD_CHUNK, flat, times)
    opacity = 1 - torch.exp(-density.view(-1, COLOR_SAMPLES) * (offsets[0] - offsets[1]))
    passed = torch.cumprod(1 - opacity, dim=1).roll(1, dims=1)
    passed[:, 0] = 1.0
    weights = opacity * passed
    colors = surface_albedo(geometry, material, flat, time).view(-1, COLOR_SAMPLES, 3)
    total = weights.sum(1, keepdim=True)
    seen = (weights[..., None] * colors).sum(1) / total.clamp(min=1e-6)
    return torch.where(total > 1e-4, seen, own).clamp(0, 1)


def _known_time(method: Callable, time: float | None) -> float | None:
    """The time, for a method that takes times; foreign ones are called without."""
    return time if "frame_times" in inspect.signature(method).parameters else None


def _own_surface(scene: Scene, times: list[float | None]) -> SceneMeshes:
    """The mesh that an explicit geometry is, the same at all times."""
    if not hasattr(scene.geometry, "isosurface"):
        raise ValueError(
            f"{type(scene.geometry).__name__} has neither a field nor an isosurface, so it cannot "
            "be meshed; leave glb and obj out of system.exporter.formats."
        )
    mesh = scene.geometry.isosurface()
    mesh.set_vertex_color(
        surface_albedo(scene.geometry, scene.material, mesh.v_pos).detach().clamp(0, 1)
    )
    return SceneMeshes([mesh] * len(times), 0.0, (0.0, 0.0))
