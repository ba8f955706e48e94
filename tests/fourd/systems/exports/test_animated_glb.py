"""The animated mesh, read by trimesh and by hand after the glTF 2.0 specification."""

import json
import struct

import numpy as np
import pytest
import torch
from threestudio.models.mesh import Mesh

from custom.fourd.systems.exports.animated_glb import animated_glb, srgb_to_linear


def triangle(height, rgb=(1.0, 0.5, 0.0), extra=0):
    """A triangle at a height, and further ones above it, so that topologies differ."""
    v_pos = torch.cat([
        torch.tensor([[0.0, 0.0, height + i], [1.0, 0.0, height + i], [0.0, 2.0, height + i]])
        for i in range(extra + 1)
    ])  # fmt: skip
    mesh = Mesh(v_pos, torch.arange(len(v_pos)).view(-1, 3))
    mesh.set_vertex_color(torch.tensor(rgb).expand(len(v_pos), 3))
    return mesh


def chunks(data):
    """The JSON and the binary chunk, with every length that the format states checked."""
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    start = 20 + size
    length, kind = struct.unpack_from("<I4s", data, start)
    assert kind == b"BIN\0" and start + 8 + length == len(data) and length % 4 == 0
    return json.loads(data[20:start]), data[start + 8 :]


def values(gltf, binary, index):
    accessor = gltf["accessors"][index]
    view = gltf["bufferViews"][accessor["bufferView"]]
    width = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
    kind = {5126: "<f4", 5123: "<u2", 5125: "<u4"}[accessor["componentType"]]
    assert view["byteOffset"] % 4 == 0
    found = np.frombuffer(binary, kind, accessor["count"] * width, view["byteOffset"])
    assert found.nbytes == view["byteLength"]
    return found.reshape(-1, width)


def visible(gltf, binary, seconds):
    """Nodes whose scale is 1 at a moment, by STEP interpolation: the last key not after it."""
    (animation,) = gltf["animations"]
    names = []
    for channel in animation["channels"]:
        sampler = animation["samplers"][channel["sampler"]]
        assert sampler["interpolation"] == "STEP" and channel["target"]["path"] == "scale"
        keys = values(gltf, binary, sampler["input"])[:, 0]
        scales = values(gltf, binary, sampler["output"])
        assert len(keys) == len(scales) and (np.diff(keys) > 0).all()
        scale = scales[max(np.searchsorted(keys, seconds, side="right") - 1, 0)]
        assert scale.tolist() in ([0, 0, 0], [1, 1, 1])
        if scale[0]:
            names.append(gltf["nodes"][channel["target"]["node"]]["name"])
    return names


MESHES = [triangle(0.0), triangle(1.0, (0.0, 0.0, 1.0), extra=2), triangle(2.0)]


def test_each_time_is_shown_alone_for_its_share_of_the_length():
    gltf, binary = chunks(animated_glb(MESHES, seconds=3.0))
    for moment, name in ((0.0, "time 0"), (0.99, "time 0"), (1.01, "time 1"), (1.99, "time 1"),
                         (2.01, "time 2"), (3.0, "time 2")):  # fmt: skip
        assert visible(gltf, binary, moment) == [name]
    key = gltf["accessors"][gltf["animations"][0]["samplers"][0]["input"]]
    assert (key["min"], key["max"]) == ([0.0], [3.0]), "the animation's range"


def test_without_animation_a_viewer_shows_the_first_time():
    gltf, _ = chunks(animated_glb(MESHES, seconds=1.0))
    root, *frames = gltf["nodes"]
    assert gltf["scenes"][gltf["scene"]]["nodes"] == [0] and root["children"] == [1, 2, 3]
    assert [node.get("scale") for node in frames] == [None, [0, 0, 0], [0, 0, 0]]


def test_trimesh_reads_vertices_faces_and_colours(tmp_path):
    import trimesh

    (tmp_path / "a.glb").write_bytes(animated_glb(MESHES, seconds=1.0))
    scene = trimesh.load(tmp_path / "a.glb", process=False)
    assert len(scene.geometry) == 3
    for mesh, read in zip(MESHES, scene.geometry.values(), strict=True):
        assert np.array_equal(read.vertices, mesh.v_pos.numpy())
        assert np.array_equal(read.faces, mesh.t_pos_idx.numpy())
        colors = read.visual.vertex_attributes["color"] / 65535
        # One half of display light is 0.2140 of linear light; 0 and 1 stay.
        expected = [1, 0.2140, 0] if mesh is not MESHES[1] else [0, 0, 1]
        assert np.allclose(colors[:, :3], expected, atol=1e-4) and (colors[:, 3] == 1).all()


def test_the_scene_stands_upright_and_faces_the_viewer(tmp_path):
    """glTF has y up and the front at +z; the scene has z up and its front at +x."""
    import trimesh

    mesh = triangle(0.0)
    mesh.v_pos = torch.tensor([[0.0, 0.0, 3.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    (tmp_path / "a.glb").write_bytes(animated_glb([mesh], seconds=1.0))
    (placed,) = trimesh.load(tmp_path / "a.glb", process=False).dump()
    expected = [[0, 3, 0], [0, 0, 2], [1, 0, 0]]
    assert np.allclose(placed.vertices, expected, atol=1e-6)


def test_bounds_and_kinds_that_the_specification_requires():
    gltf, binary = chunks(animated_glb([triangle(0.5)], seconds=1.0, extras={"prompt": "a ball"}))
    assert "animations" not in gltf and gltf["asset"]["extras"] == {"prompt": "a ball"}
    (primitive,) = gltf["meshes"][0]["primitives"]
    position = gltf["accessors"][primitive["attributes"]["POSITION"]]
    assert (position["min"], position["max"]) == ([0, 0, 0.5], [1, 2, 0.5])
    color = gltf["accessors"][primitive["attributes"]["COLOR_0"]]
    assert color["normalized"] and color["type"] == "VEC4" and color["componentType"] == 5123
    targets = [gltf["bufferViews"][gltf["accessors"][i]["bufferView"]]["target"]
               for i in (primitive["indices"], *primitive["attributes"].values())]  # fmt: skip
    assert targets == [34963, 34962, 34962]
    assert gltf["extensionsUsed"] == ["KHR_materials_unlit"]
    assert gltf["buffers"] == [{"byteLength": len(binary)}]


def test_large_meshes_get_wide_indices():
    wide = Mesh(torch.rand(70000, 3), torch.tensor([[0, 1, 69999]]))
    gltf, binary = chunks(animated_glb([wide], seconds=1.0))
    (primitive,) = gltf["meshes"][0]["primitives"]
    assert values(gltf, binary, primitive["indices"])[:, 0].tolist() == [0, 1, 69999]
    assert "COLOR_0" not in primitive["attributes"]


def test_a_time_without_surface_shows_nothing():
    gltf, binary = chunks(animated_glb([triangle(0.0), None], seconds=1.0))
    assert "mesh" not in gltf["nodes"][2] and len(gltf["meshes"]) == 1
    assert visible(gltf, binary, 0.7) == ["time 1"]


def test_refusals():
    with pytest.raises(ValueError, match="there is no mesh to write"):
        animated_glb([None, None], seconds=1.0)
    with pytest.raises(ValueError, match="lasts 0 s; expected more than 0"):
        animated_glb(MESHES, seconds=0)


def test_linear_light_by_the_standard_s_own_points():
    found = srgb_to_linear(np.array([0.0, 0.04045, 0.5, 1.0]))
    assert np.allclose(found, [0.0, 0.0031308, 0.21404, 1.0], atol=1e-5)
