"""A scene as a triangle mesh."""

from dataclasses import dataclass, field
from typing import Any

import torch

import threestudio
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.models.mesh import Mesh
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
            self._color_vertices(mesh)
        params = {
            "mesh": mesh,
            "save_mat": False,
            "save_normal": self.cfg.save_normal,
            "save_uv": False,
            "save_vertex_color": self.cfg.save_texture,
        }
        return [ExporterOutput(f"{self.cfg.save_name}.obj", "obj", params)]

    @torch.no_grad()
    def _color_vertices(self, mesh: Mesh) -> None:
        times = None
        if self.cfg.frame_time is not None:
            times = mesh.v_pos.new_full((mesh.v_pos.shape[0],), self.cfg.frame_time)

        def albedo(points: torch.Tensor, frame_times: torch.Tensor | None) -> torch.Tensor:
            keywords = {} if frame_times is None else {"frame_times": frame_times}
            exported = self.geometry.export(points=points, **keywords)
            maps = self.material.export(points=points, **exported)
            if "albedo" not in maps:
                raise ValueError(
                    f"{type(self.material).__name__} exports no albedo; "
                    "set system.exporter.save_texture=false."
                )
            return maps["albedo"]

        mesh.set_vertex_color(chunk_batch(albedo, COLOR_CHUNK, mesh.v_pos, times))
