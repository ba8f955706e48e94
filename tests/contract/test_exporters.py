"""Exporters and what they hand to the savers: sections 1.10 and 4.12."""

import numpy as np
import pytest
import threestudio
import torch
import trimesh
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.utils.base import BaseObject
from threestudio.utils.saving import SaverMixin


@pytest.fixture
def parts(small_geometry):
    """An opaque ball whose colour is one half everywhere."""
    geometry = threestudio.find("implicit-volume")({
        **small_geometry, "isosurface_resolution": 16, "isosurface_threshold": 5.0,
        "density_blob_scale": 20.0, "density_blob_std": 0.6,
    })  # fmt: skip
    for parameter in geometry.feature_network.parameters():
        torch.nn.init.zeros_(parameter)
    return {
        "geometry": geometry,
        "material": threestudio.find("no-material")({}),
        "background": threestudio.find("solid-color-background")({}),
    }


@pytest.fixture
def save(tmp_path):
    """Write an exporter's output as a system does, and return the folder."""
    saver = SaverMixin()
    saver.set_save_dir(str(tmp_path))

    def write(outputs):
        for output in outputs:
            assert isinstance(output, ExporterOutput)
            getattr(saver, f"save_{output.save_type}")(
                f"it7-export/{output.save_name}", **output.params
            )
        return tmp_path / "it7-export"

    return write


def test_an_exporter_is_configured_with_the_parts_of_a_scene(parts):
    class Own(Exporter):
        def __call__(self):
            return [ExporterOutput("a", "json", {"payload": {"radius": 1}})]

    exporter = Own({}, **parts)
    assert isinstance(exporter, BaseObject) and exporter.cfg.save_video is False
    assert exporter.geometry is parts["geometry"] and exporter.material is parts["material"]
    assert exporter.background is parts["background"]
    assert exporter()[0].save_type == "json"


def test_the_dummy_exports_nothing(parts):
    assert threestudio.find("dummy-exporter")({}, **parts)() == []


@pytest.mark.parametrize("fmt", ["obj", "obj-mtl"])
def test_a_mesh_opens_in_other_programs(parts, save, fmt):
    exporter = threestudio.find("mesh-exporter")(
        {"fmt": fmt, "save_name": "ball", "context_type": "cuda", "texture_size": 64}, **parts
    )
    folder = save(exporter())
    read = trimesh.load(folder / "ball.obj", process=False)
    # softplus(20 (1 - r / 0.6)) = 5 at r = 0.45.
    assert np.linalg.norm(read.vertices, axis=1).mean() == pytest.approx(0.45, abs=0.02)
    assert read.volume == pytest.approx(4 / 3 * np.pi * 0.45**3, rel=0.1)  # faces look outward
    visual = read.visual if read.visual.kind == "vertex" else read.visual.to_color()
    colours = visual.vertex_colors[:, :3]
    assert np.abs(colours.astype(int) - 127).max() <= 6


def test_normals_and_names_are_written_as_asked(parts, save):
    exporter = threestudio.find("mesh-exporter")(
        {"fmt": "obj", "save_normal": True, "save_texture": False}, **parts
    )
    text = (save(exporter()) / "model.obj").read_text().splitlines()
    vertices = [line.split()[1:] for line in text if line.startswith("v ")]
    normals = [line.split()[1:] for line in text if line.startswith("vn ")]
    assert len(vertices) == len(normals) and {len(v) for v in vertices} == {3}
    position, normal = np.array(vertices, float), np.array(normals, float)
    outward = position / np.linalg.norm(position, axis=1, keepdims=True)
    assert (normal * outward).sum(1).min() > 0.5


def test_an_unknown_format_is_refused(parts):
    with pytest.raises(ValueError, match="ply-x"):
        threestudio.find("mesh-exporter")({"fmt": "ply-x"}, **parts)()
