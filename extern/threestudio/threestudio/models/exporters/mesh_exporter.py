"""A scene as a triangle mesh."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import chunk_batch

COLOR_CHUNK = 2**18


@threestudio.register("mesh-exporter")
class MeshExporter(Exporter):
    """The isosurface as Wavefront OBJ with the material's albedo at the vertices."""

    @dataclass
    class Config(Exporter.Config):
        fmt: str = "obj-mtl"
        """obj has vertex colours; obj-mtl (textures) needs xatlas and is answered by obj."""
        save_name: str = "model"
        """Stem of the file."""
        save_normal: bool = False
        """Write vertex normals."""
        save_uv: bool = True
        """Write texture coordinates; of obj-mtl."""
        save_texture: bool = True
        """Write colours: textures, or vertex colours with "obj"."""
        texture_size: int = 1024
        """Of obj-mtl."""
        texture_format: str = "jpg"
        """Of obj-mtl."""
        xatlas_chart_options: dict[str, Any] = field(default_factory=dict)
        """Of obj-mtl."""
        xatlas_pack_options: dict[str, Any] = field(default_factory=dict)
        """Of obj-mtl."""
        context_type: str = "gl"
        """Of obj-mtl."""
        frame_time: float | None = None
        """Scene time in [0, 1] of the exported mesh; None is the geometry's default."""

    cfg: Config

    def __call__(self) -> list[ExporterOutput]:
        """Extract the mesh and return one OBJ file; see `BaseImplicitGeometry.isosurface`."""
        if self.cfg.fmt not in ("obj", "obj-mtl"):
            raise ValueError(f"exporter.fmt is {self.cfg.fmt!r}; expected 'obj' or 'obj-mtl'.")
        if self.cfg.fmt == "obj-mtl":
            threestudio.warn(
                "exporter.fmt obj-mtl needs xatlas, which is not supported yet; "
                "vertex colours are written instead (obj)."
            )
        mesh = self.geometry.isosurface(frame_time=self.cfg.frame_time)
        if self.cfg.save_texture:
            colors = surface_albedo(self.geometry, self.material, mesh.v_pos, self.cfg.frame_time)
            mesh.set_vertex_color(colors)
        params = {
            "mesh": mesh,
            "save_mat": False,
            "save_normal": self.cfg.save_normal,
            "save_uv": False,
            "save_vertex_color": self.cfg.save_texture,
        }
        return [ExporterOutput(f"{self.cfg.save_name}.obj", "obj", params)]


@torch.no_grad()
def surface_albedo(
    geometry: BaseImplicitGeometry,
    material: BaseMaterial,
    points: Float[Tensor, "n_points 3"],
    frame_time: float | None = None,
) -> Float[Tensor, "n_points 3"]:
    """Return the material's albedo in [0, 1] at world points, at one scene time in [0, 1].

    Args:
        geometry, material: parts of one scene.
        points: world positions.
        frame_time: the time; None is the geometry's default.

    Raises:
        ValueError: the material exports no albedo.
    """
    times = None if frame_time is None else points.new_full((points.shape[0],), frame_time)

    def albedo(points: Tensor, frame_times: Tensor | None) -> Tensor:
        keywords = {} if frame_times is None else {"frame_times": frame_times}
        exported = geometry.export(points=points, **keywords)
        maps = material.export(points=points, **exported)
        if "albedo" not in maps:
            raise ValueError(
                f"{type(material).__name__} exports no albedo; "
                "set system.exporter.save_texture=false."
            )
        return maps["albedo"]

    return chunk_batch(albedo, COLOR_CHUNK, points, times)
