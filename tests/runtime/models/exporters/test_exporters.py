"""The mesh exporter on a scene whose shape and colour are known."""

import logging
import math

import numpy as np
import pytest
import threestudio
import torch
from threestudio.models.exporters.base import Exporter
from threestudio.models.geometry.base import BaseImplicitGeometry


class ColoredBall(BaseImplicitGeometry):
    """A ball of radius 0.5 (0.3 at time 1) whose colour is its position."""

    def forward_field(self, points, frame_times=None):
        radius = 0.5 if frame_times is None else 0.5 - 0.2 * frame_times[..., None]
        return radius - points.norm(dim=-1, keepdim=True), None

    def forward_level(self, field, threshold):
        return threshold - field

    def export(self, points, frame_times=None, **kwargs):
        return {"features": points + 0.5 + (0.0 if frame_times is None else 0.1)}


def build(name="mesh-exporter", material=None, **config):
    geometry = ColoredBall({"isosurface_resolution": 16, "isosurface_threshold": 0.0})
    material = material or threestudio.find("no-material")({"color_activation": "none"})
    background = threestudio.find("solid-color-background")({})
    return threestudio.find(name)(
        config, geometry=geometry, material=material, background=background
    )


def test_obj_with_vertex_colours():
    (output,) = build(fmt="obj", save_name="ball", save_normal=True)()
    assert (output.save_name, output.save_type) == ("ball.obj", "obj")
    mesh = output.params.pop("mesh")
    assert output.params == {
        "save_mat": False,
        "save_normal": True,
        "save_uv": False,
        "save_vertex_color": True,
    }
    assert torch.allclose(mesh.v_rgb, (mesh.v_pos + 0.5).clamp(0, 1), atol=1e-6)
    assert (mesh.v_pos.norm(dim=-1) - 0.5).abs().max() < 0.01


def test_the_file_reads_back(tmp_path):
    """Through the system's saver to disk, and back by another library's reader."""
    import trimesh
    from threestudio.utils.saving import SaverMixin

    saver = SaverMixin()
    saver.set_save_dir(tmp_path)
    (output,) = build(fmt="obj", save_normal=True)()
    getattr(saver, f"save_{output.save_type}")(f"it1-export/{output.save_name}", **output.params)
    read = trimesh.load(tmp_path / "it1-export" / "model.obj", process=False)
    mesh = output.params["mesh"]
    assert read.is_watertight and read.volume > 0
    assert torch.allclose(torch.tensor(read.vertices).float(), mesh.v_pos, atol=1e-5)
    colors = torch.tensor(read.visual.vertex_colors[:, :3]).float() / 255
    assert torch.allclose(colors, mesh.v_rgb, atol=2 / 255)


def test_at_a_time():
    (output,) = build(fmt="obj", frame_time=1.0)()
    mesh = output.params["mesh"]
    assert (mesh.v_pos.norm(dim=-1) - 0.3).abs().max() < 0.01
    assert torch.allclose(mesh.v_rgb, mesh.v_pos + 0.6, atol=1e-6)


def test_without_colour():
    (output,) = build(fmt="obj", save_texture=False)()
    assert output.params["mesh"].v_rgb is None and not output.params["save_vertex_color"]


class TestTextures:
    def export(self, folder, material=None, **config):
        """Write as a system does, and read back by another library."""
        import trimesh
        from threestudio.utils.saving import SaverMixin

        saver = SaverMixin()
        saver.set_save_dir(folder)
        (output,) = build(material=material, **config)()
        saver.save_obj(output.save_name, **output.params)
        return trimesh.load(folder / "model.obj", process=False)

    @pytest.mark.parametrize(
        ("suffix", "largest", "mean"), [("png", 0.005, 0.0025), ("jpg", 0.3, 0.03)]
    )
    def test_between_the_corners_the_colour_is_the_scenes(self, tmp_path, suffix, largest, mean):
        """The colour is linear in the position, so that bilinear reading has to give it back.

        Eight bits cut off up to 1 / 255. A jpg has half as many texels for hue, so that single
        triangles lend theirs to neighbours.
        """
        read = self.export(tmp_path, texture_size=512, texture_format=suffix)
        assert (tmp_path / f"texture_kd.{suffix}").is_file() and (tmp_path / "model.mtl").is_file()
        assert read.volume == pytest.approx(4 / 3 * math.pi * 0.125, rel=0.05)
        shares = torch.rand((len(read.faces), 3), generator=torch.Generator().manual_seed(0))
        shares = (shares / shares.sum(-1, keepdim=True)).numpy()[..., None]
        points = (read.vertices[read.faces] * shares).sum(1)
        places = (read.visual.uv[read.faces] * shares).sum(1)
        picture = np.asarray(read.visual.material.image.convert("RGB")) / 255.0
        found = bilinear(picture, places)
        error = np.abs(found - (points + 0.5).clip(0, 1))
        assert error.max() < largest and error.mean() < mean

    def test_a_texture_that_is_too_small_grows_with_one_line(self, tmp_path, caplog, monkeypatch):
        monkeypatch.setattr(threestudio.logger, "propagate", True)
        with caplog.at_level(logging.WARNING, logger=threestudio.logger.name):
            read = self.export(tmp_path, texture_size=16)
        # A set: handlers that other tests of the process left may show a record twice.
        (line,) = {m for m in caplog.messages if "texture_size is 16" in m}
        size = read.visual.material.image.size[0]
        assert f"the texture has {size} texels" in line and size > 16

    def test_all_maps_of_a_material(self, tmp_path):
        from threestudio.models.materials.base import BaseMaterial

        class Metal(BaseMaterial):
            def export(self, points, features, **kwargs):
                rough = torch.full_like(points[:, :1], 0.25)
                return {
                    "albedo": features,
                    "metallic": 1 - rough,
                    "roughness": rough,
                    "other": rough,
                }

        (output,) = build(material=Metal({}), texture_size=64)()
        maps = {key: value for key, value in output.params.items() if key.startswith("map_")}
        assert set(maps) == {"map_Kd", "map_Pm", "map_Pr", "map_format"}
        assert maps["map_Pr"].ndim == 2 and torch.allclose(maps["map_Pr"], torch.tensor(0.25))
        self.export(tmp_path, material=Metal({}), texture_size=64)
        assert "map_Pr texture_roughness.jpg" in (tmp_path / "model.mtl").read_text()

    def test_without_a_texture(self, tmp_path):
        (output,) = build(save_texture=False)()
        assert output.params["save_uv"] and output.params["save_mat"]
        assert "map_Kd" not in output.params


def bilinear(picture, places):
    """Read a picture at texture coordinates, v upwards, as a renderer does."""
    size = picture.shape[0]
    x, y = places[:, 0] * size - 0.5, (1 - places[:, 1]) * size - 0.5
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    total = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            weight = (1 - np.abs(x - left - dx)) * (1 - np.abs(y - top - dy))
            rows, columns = (top + dy).clip(0, size - 1), (left + dx).clip(0, size - 1)
            total = total + weight[:, None] * picture[rows, columns]
    return total


def test_refusals():
    with pytest.raises(ValueError, match="exporter.fmt is 'ply'; expected 'obj' or 'obj-mtl'"):
        build(fmt="ply")()
    with pytest.raises(ValueError, match="save_uv is false and save_texture is true; a texture n"):
        build(save_uv=False)()
    from threestudio.models.materials.base import BaseMaterial

    with pytest.raises(ValueError, match="BaseMaterial exports no albedo"):
        build(fmt="obj", material=BaseMaterial({}))()


def test_dummy_and_base():
    dummy = build("dummy-exporter")
    assert dummy() == [] and isinstance(dummy, Exporter)
    assert dummy.geometry.cfg.isosurface_resolution == 16
    assert dummy.background.cfg.n_output_dims == 3
