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
from threestudio.models.mesh import Mesh
from threestudio.models.uv_atlas import bake
from threestudio.utils.ops import chunk_batch

COLOR_CHUNK = 2**18
# Keys of a Wavefront material, by what materials export.
TEXTURES = {
    "albedo": "map_Kd",
    "metallic": "map_Pm",
    "roughness": "map_Pr",
    "bump": "map_Bump",
}


@threestudio.register("mesh-exporter")
class MeshExporter(Exporter):
    """The isosurface as Wavefront OBJ with the material's albedo as textures or at the vertices."""

    @dataclass
    class Config(Exporter.Config):
        fmt: str = "obj-mtl"
        """obj has vertex colours, obj-mtl a material file and textures."""
        save_name: str = "model"
        """Stem of the file."""
        save_normal: bool = False
        """Write vertex normals."""
        save_uv: bool = True
        """Write texture coordinates; of obj-mtl, whose textures need them."""
        save_texture: bool = True
        """Write colours: textures, or vertex colours with "obj"."""
        texture_size: int = 1024
        """Texels a side at most, of obj-mtl; more where so many triangles need them."""
        texture_format: str = "jpg"
        """Suffix of the textures, of obj-mtl; png keeps colours exactly."""
        xatlas_chart_options: dict[str, Any] = field(default_factory=dict)
        """Of the original's unwrapping; not used, since every triangle is a chart of its own."""
        xatlas_pack_options: dict[str, Any] = field(default_factory=dict)
        """As above."""
        context_type: str = "gl"
        """Of the original's rasteriser; not used, since no triangle is rasterised."""
        frame_time: float | None = None
        """Scene time in [0, 1] of the exported mesh; None is the geometry's default."""

    cfg: Config

    def __call__(self) -> list[ExporterOutput]:
        """Extract the mesh and return one OBJ file; see `BaseImplicitGeometry.isosurface`.

        Raises:
            ValueError: an unknown format, or a material that exports no colour.
        """
        if self.cfg.fmt not in ("obj", "obj-mtl"):
            raise ValueError(f"exporter.fmt is {self.cfg.fmt!r}; expected 'obj' or 'obj-mtl'.")
        mesh = self.geometry.isosurface(frame_time=self.cfg.frame_time)
        textured = self.cfg.fmt == "obj-mtl"
        params = {
            "mesh": mesh,
            "save_mat": textured,
            "save_normal": self.cfg.save_normal,
            "save_uv": textured and self.cfg.save_uv,
            "save_vertex_color": not textured and self.cfg.save_texture,
        }
        if self.cfg.save_texture and textured:
            params.update(self._textures(mesh), map_format=self.cfg.texture_format)
        elif self.cfg.save_texture:
            colors = surface_albedo(self.geometry, self.material, mesh.v_pos, self.cfg.frame_time)
            mesh.set_vertex_color(colors)
        return [ExporterOutput(f"{self.cfg.save_name}.obj", "obj", params)]

    def _textures(self, mesh: Mesh) -> dict[str, Float[Tensor, "S S C"]]:
        """The material's maps as textures, by the names of a Wavefront material."""
        if not self.cfg.save_uv:
            raise ValueError(
                "exporter.save_uv is false and save_texture is true; a texture needs coordinates. "
                "Set both, or neither."
            )
        atlas = mesh.unwrap_uv(texture_size=self.cfg.texture_size)
        if atlas.size_px > self.cfg.texture_size:
            threestudio.warn(
                "exporter.texture_size is %d, which is too small for %d triangles; the texture has "
                "%d texels a side. A lower geometry.isosurface_resolution makes fewer triangles.",
                self.cfg.texture_size, atlas.n_triangles, atlas.size_px,
            )  # fmt: skip
        maps = bake(
            atlas,
            mesh.v_pos,
            mesh.t_pos_idx,
            lambda points: surface_maps(self.geometry, self.material, points, self.cfg.frame_time),
        )
        named = {TEXTURES[name]: maps[name] for name in TEXTURES if name in maps}
        return {
            key: value[..., 0] if value.shape[-1] == 1 else value for key, value in named.items()
        }


@torch.no_grad()
def surface_albedo(
    geometry: BaseImplicitGeometry,
    material: BaseMaterial,
    points: Float[Tensor, "n_points 3"],
    frame_time: float | None = None,
) -> Float[Tensor, "n_points 3"]:
    """Return the material's albedo in [0, 1] at world points; see `surface_maps`."""
    return surface_maps(geometry, material, points, frame_time)["albedo"]


@torch.no_grad()
def surface_maps(
    geometry: BaseImplicitGeometry,
    material: BaseMaterial,
    points: Float[Tensor, "n_points 3"],
    frame_time: float | None = None,
) -> dict[str, Float[Tensor, "n_points C"]]:
    """Return what the material exports at world points, at one scene time in [0, 1].

    Args:
        geometry, material: parts of one scene.
        points: world positions.
        frame_time: the time; None is the geometry's default.

    Returns:
        "albedo" and, as the material has them, "metallic", "roughness" and "bump".

    Raises:
        ValueError: the material exports no albedo.
    """
    times = None if frame_time is None else points.new_full((points.shape[0],), frame_time)

    def maps(points: Tensor, frame_times: Tensor | None) -> dict[str, Tensor]:
        keywords = {} if frame_times is None else {"frame_times": frame_times}
        exported = geometry.export(points=points, **keywords)
        found = material.export(points=points, **exported)
        if "albedo" not in found:
            raise ValueError(
                f"{type(material).__name__} exports no albedo; "
                "set system.exporter.save_texture=false."
            )
        return {name: found[name] for name in TEXTURES if name in found}

    return chunk_batch(maps, COLOR_CHUNK, points, times)
