"""The mesh exporter on a scene whose shape and colour are known."""

import logging

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


def test_textures_fall_back_with_one_line(caplog, monkeypatch):
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    with caplog.at_level(logging.WARNING, logger=threestudio.logger.name):
        (output,) = build()()
    assert output.save_type == "obj"
    assert [record for record in caplog.records if "needs xatlas" in record.getMessage()]


def test_refusals():
    with pytest.raises(ValueError, match="exporter.fmt is 'ply'; expected 'obj' or 'obj-mtl'"):
        build(fmt="ply")()
    from threestudio.models.materials.base import BaseMaterial

    with pytest.raises(ValueError, match="BaseMaterial exports no albedo"):
        build(fmt="obj", material=BaseMaterial({}))()


def test_dummy_and_base():
    dummy = build("dummy-exporter")
    assert dummy() == [] and isinstance(dummy, Exporter)
    assert dummy.geometry.cfg.isosurface_resolution == 16
    assert dummy.background.cfg.n_output_dims == 3
