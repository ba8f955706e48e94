"""Base classes of geometry: where density or distance lives, and how a mesh is cut out of it.

Shapes: ``*N`` any number of leading dimensions of points. Points are in world units.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.isosurface import IsosurfaceHelper, MarchingTetrahedraHelper
from threestudio.models.mesh import Mesh
from threestudio.utils.base import BaseModule
from threestudio.utils.ops import chunk_batch, scale_tensor

DEFAULT_ISOSURFACE_CHUNK = 2**18  # bounds the memory of a field query when the config names none


def contract_to_unisphere(
    x: Float[Tensor, "*N 3"], bbox: Float[Tensor, "2 3"], unbounded: bool = False
) -> Float[Tensor, "*N 3"]:
    """Map world points into the unit cube.

    Bounded: ``bbox`` becomes [0, 1]^3 and outside points are extrapolated. Unbounded (Mip-NeRF 360,
    eq. 10): the unit ball of the box keeps its shape in the inner half, [1/4, 3/4], and all of
    space lies in [0, 1]^3.
    """
    if not unbounded:
        return scale_tensor(x, bbox, (0.0, 1.0))
    x = scale_tensor(x, bbox, (-1.0, 1.0))
    mag = x.norm(dim=-1, keepdim=True).clamp(min=1.0)  # the unit ball stays as it is
    return (2.0 - 1.0 / mag) * x / mag / 4.0 + 0.5


class BaseGeometry(BaseModule):
    """A module that answers what is at a point."""

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config

    @staticmethod
    def create_from(
        other: "BaseGeometry", cfg: dict | None = None, copy_net: bool = True, **kwargs: Any
    ) -> "BaseGeometry":
        """Build a geometry of this class from one of another class."""
        raise TypeError(
            f"A {type(other).__name__} cannot be converted: the target class does not define "
            "create_from. Remove system.geometry_convert_from, or choose a geometry that has it."
        )

    def export(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what a material needs at the surface; nothing by default."""
        return {}


class BaseImplicitGeometry(BaseGeometry):
    """Geometry given by a function of position, inside the box of half-width ``radius``."""

    @dataclass
    class Config(BaseGeometry.Config):
        radius: float = 1.0
        """Half-width of the scene's box in world units."""
        isosurface: bool = True
        """Whether a mesh may be extracted."""
        isosurface_method: str = "mt"
        """Marching tetrahedra; "mc-cpu" is answered by them too."""
        isosurface_resolution: int = 128
        """Cells per axis."""
        isosurface_threshold: Any = 0.0
        """Level of the surface, or "auto": the mean of the field where it exceeds 1e-5."""
        isosurface_chunk: int = 0
        """Points per field query; 0 lets the program choose."""
        isosurface_coarse_to_fine: bool = True
        """Extract a second time inside the tight box of the first mesh, 10 % enlarged."""
        isosurface_deformable_grid: bool = False
        """Let the field move the grid's vertices; not supported by the extraction in code."""
        isosurface_remove_outliers: bool = True
        """Drop small connected parts."""
        isosurface_outlier_n_faces_threshold: Any = 0.01
        """Faces below which a part is dropped: a count (int), or a share of all faces (float)."""

    cfg: Config

    def configure(self) -> None:
        radius = float(self.cfg.radius)
        self.bbox: Float[Tensor, "2 3"]
        self.register_buffer("bbox", torch.tensor([[-radius] * 3, [radius] * 3]))
        self.isosurface_helper: IsosurfaceHelper | None = None
        self.unbounded: bool = False

    def forward(
        self,
        points: Float[Tensor, "*N 3"],
        output_normal: bool = False,
        frame_times: Float[Tensor, "*N"] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate the geometry; see the subclass for the keys."""
        raise NotImplementedError

    def forward_field(
        self, points: Float[Tensor, "*N 3"]
    ) -> tuple[Float[Tensor, "*N 1"], Float[Tensor, "*N 3"] | None]:
        """Return the scalar field to extract and, for deformable grids, vertex offsets or None."""
        raise NotImplementedError

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """Return a level set that is negative inside and zero on the surface."""
        raise NotImplementedError

    def isosurface(self, frame_time: float | None = None) -> Mesh:
        """Extract the surface as a triangle mesh in world units, at one scene time.

        Not differentiable. Raises ValueError when nothing reaches the threshold, naming the range
        of the field so that a threshold can be chosen.
        """
        if not self.cfg.isosurface:
            raise ValueError(
                f"isosurface of {type(self).__name__} is switched off; "
                "set system.geometry.isosurface=true to extract a mesh."
            )
        self._prepare_isosurface_helper()
        mesh = self._extract(self.bbox, fine=False, frame_time=frame_time)
        if self.cfg.isosurface_coarse_to_fine:
            low, high = mesh.v_pos.amin(dim=0), mesh.v_pos.amax(dim=0)
            margin = (high - low) * 0.1
            box = torch.stack([low - margin, high + margin])
            box = torch.stack([box[0].maximum(self.bbox[0]), box[1].minimum(self.bbox[1])])
            mesh = self._extract(box, fine=True, frame_time=frame_time)
        return mesh

    def _prepare_isosurface_helper(self) -> None:
        if self.isosurface_helper is not None:
            return
        method = self.cfg.isosurface_method
        if method not in ("mt", "mc-cpu"):
            raise ValueError(f"isosurface_method is {method!r}; expected 'mt' or 'mc-cpu'.")
        if self.cfg.isosurface_deformable_grid:
            raise ValueError(
                "isosurface_deformable_grid is not supported; set "
                "system.geometry.isosurface_deformable_grid=false."
            )
        if method == "mc-cpu":
            threestudio.info("isosurface_method mc-cpu is answered by marching tetrahedra (mt).")
        self.isosurface_helper = MarchingTetrahedraHelper(self.cfg.isosurface_resolution)

    @torch.no_grad()
    def _extract(
        self, box: Float[Tensor, "2 3"], fine: bool, frame_time: float | None
    ) -> Mesh:
        helper = self.isosurface_helper
        assert helper is not None
        query = self._field_query(box, frame_time)
        chunk = self.cfg.isosurface_chunk or DEFAULT_ISOSURFACE_CHUNK
        values = chunk_batch(query, chunk, helper.grid_vertices.to(self.bbox))
        threshold = self.cfg.isosurface_threshold
        if threshold == "auto":
            present = values > 1e-5
            threshold = float(values[present].mean()) if bool(present.any()) else 0.0
        level = self.forward_level(values, float(threshold))
        if not bool((level < 0).any()):
            raise ValueError(
                f"No surface at isosurface_threshold {float(threshold):.4g}: the field lies in "
                f"[{float(values.min()):.4g}, {float(values.max()):.4g}]. Train longer or set "
                "system.geometry.isosurface_threshold inside that range (or to auto)."
            )
        mesh = helper(level)
        mesh.v_pos = scale_tensor(mesh.v_pos, (0.0, 1.0), box)
        mesh.add_extra("bbox", box)
        if fine and self.cfg.isosurface_remove_outliers:
            mesh = mesh.remove_outlier(self.cfg.isosurface_outlier_n_faces_threshold)
        elif self.cfg.isosurface_remove_outliers and not self.cfg.isosurface_coarse_to_fine:
            mesh = mesh.remove_outlier(self.cfg.isosurface_outlier_n_faces_threshold)
        return mesh

    def _field_query(
        self, box: Float[Tensor, "2 3"], frame_time: float | None
    ) -> Callable[[Tensor], Tensor]:
        def query(unit_points: Tensor) -> Tensor:
            points = scale_tensor(unit_points, (0.0, 1.0), box)
            if frame_time is None:
                return self.forward_field(points)[0]
            times = points.new_full(points.shape[:-1], frame_time)
            return self.forward_field(points, frame_times=times)[0]

        return query


class BaseExplicitGeometry(BaseGeometry):
    """Geometry that is a mesh, inside the box of half-width ``radius``."""

    @dataclass
    class Config(BaseGeometry.Config):
        radius: float = 1.0
        """Half-width of the scene's box in world units."""
        shape_init: str = ""
        """How to start, in the subclass's words."""
        shape_init_params: Any = field(default_factory=dict)
        """Parameters of the start."""

    cfg: Config

    def configure(self) -> None:
        radius = float(self.cfg.radius)
        self.bbox: Float[Tensor, "2 3"]
        self.register_buffer("bbox", torch.tensor([[-radius] * 3, [radius] * 3]))
