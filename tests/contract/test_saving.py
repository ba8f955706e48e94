"""The savers of every system, each file opened by an independent reader: section 1.9."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from threestudio.models.mesh import Mesh
from threestudio.utils.saving import SaverMixin


@pytest.fixture
def saver(tmp_path):
    made = SaverMixin()
    made.set_save_dir(str(tmp_path / "save"))
    return made


def pixels(path):
    return np.asarray(Image.open(path))


def quadrants():
    """[4, 6, 3]: red above green on the left, blue above white on the right."""
    image = torch.zeros(4, 6, 3)
    image[:2, :3, 0] = 1
    image[2:, :3, 1] = 1
    image[:2, 3:, 2] = 1
    image[2:, 3:] = 1
    return image


def test_the_folder_is_not_known_during_construction(tmp_path):
    made = SaverMixin()
    with pytest.raises(ValueError):
        made.get_save_dir()
    made.set_save_dir(str(tmp_path))
    assert made.get_save_path("a/b/c.png") == str(tmp_path / "a/b/c.png")
    assert (tmp_path / "a" / "b").is_dir()


@pytest.mark.parametrize("data_format", ["HWC", "CHW"])
def test_rgb_pictures_keep_place_and_colour(saver, data_format):
    image = quadrants() if data_format == "HWC" else quadrants().permute(2, 0, 1)
    path = saver.save_rgb_image("x/a.png", image * 2 - 1, data_format, data_range=(-1, 1))
    assert path == str(Path(saver.get_save_dir()) / "x" / "a.png")
    read = pixels(path)
    assert read.shape == (4, 6, 3)
    assert [read[y, x].tolist() for y, x in ((0, 0), (3, 0), (0, 5), (3, 5))] == [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    ]  # fmt: skip


def test_more_than_three_channels_are_tiles_side_by_side(saver):
    image = torch.linspace(0, 1, 7).expand(2, 3, 7)
    read = pixels(saver.save_rgb_image("a.png", image))
    assert read.shape == (2, 9, 3)
    assert read[0, 0].tolist() == [0, 42, 85] and read[0, 8].tolist() == [255, 0, 0]


def test_values_are_stretched_unless_a_range_is_given(saver):
    ramp = torch.tensor([[2.0, 3.0, 4.0]])
    stretched = pixels(saver.save_grayscale_image("a.png", ramp, cmap=None))
    assert stretched[0, :, 0].tolist() == [0, 127, 255] and stretched.shape == (1, 3, 3)
    fixed = pixels(saver.save_grayscale_image("b.png", ramp, data_range=(0, 4), cmap=None))
    assert fixed[0, :, 0].tolist() == [127, 191, 255]


@pytest.mark.parametrize(
    ("cmap", "low", "high"), [("jet", "blue", "red"), ("spectral", "red", "blue")]
)
def test_colour_maps_have_their_ends(saver, cmap, low, high):
    read = pixels(saver.save_grayscale_image("a.png", torch.tensor([[0.0, 1.0]]), cmap=cmap))
    names = {"red": 0, "green": 1, "blue": 2}
    assert read[0, 0].argmax() == names[low] and read[0, 1].argmax() == names[high]


def test_magma_goes_from_black_to_pale(saver):
    read = pixels(saver.save_grayscale_image("a.png", torch.tensor([[0.0, 1.0]]), cmap="magma"))
    assert read[0, 0].max() < 10 and read[0, 1].min() > 150


@pytest.mark.parametrize("cmap", ["checkerboard", "color"])
def test_texture_coordinates(saver, cmap):
    v, u = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    read = pixels(saver.save_uv_image("a.png", torch.stack([u, v], -1), cmap=cmap))
    assert read.shape == (32, 32, 3)
    if cmap == "color":
        assert read[0, -1].tolist() == [255, 0, 0] and read[-1, 0].tolist() == [0, 255, 0]
    else:
        assert len(np.unique(read)) == 2


def test_a_grid_has_rows_of_mixed_tiles(saver):
    small = {"type": "rgb", "img": torch.ones(2, 2, 3), "kwargs": {"data_format": "HWC"}}
    gray = {"type": "grayscale", "img": torch.zeros(4, 4), "kwargs": {"cmap": None}}
    uv = {"type": "uv", "img": torch.zeros(4, 4, 2), "kwargs": {"cmap": "color"}}
    assert pixels(saver.save_image_grid("row.png", [small, gray])).shape == (4, 8, 3)
    read = pixels(saver.save_image_grid("rows.png", [[small, gray, uv], [gray]]))
    assert read.shape == (8, 12, 3)
    assert read[:4, :4].min() == 255 and read[4:, 4:].max() == 0  # empty places are black
    for align, shape in (("min", (2, 4)), (6, (6, 12)), ((3, 5), (3, 10))):
        assert pixels(saver.save_image_grid("a.png", [small, gray], align)).shape[:2] == shape


def test_a_grid_may_carry_a_line_of_text_for_each_row(saver):
    item = {"type": "rgb", "img": torch.full((40, 90, 3), 0.5), "kwargs": {}}
    plain = pixels(saver.save_image_grid("a.png", [[item], [item]], name="train", step=3))
    texts = pixels(saver.save_image_grid("b.png", [[item], [item]], texts=["one", ""]))
    assert (plain != texts)[:40].any() and not (plain != texts)[40:].any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_pictures_as_they_are(saver, dtype):
    depth = np.arange(12, dtype=dtype).reshape(3, 4) * np.iinfo(dtype).max // 11
    assert np.array_equal(pixels(saver.save_image("a.png", depth)), depth)


def test_a_cubemap_is_a_cross(saver):
    faces = [torch.full((2, 2, 3), index / 10) for index in range(1, 7)]
    read = pixels(saver.save_cubemap("a.png", faces))
    assert read.shape == (6, 8, 3)
    assert set(np.unique(read)) == {0, *(int(25.5 * k) for k in range(1, 7))}


def test_data_json_state_and_files(saver, tmp_path):
    arrays = np.load(saver.save_data("d", {"a": torch.arange(3), "b": np.ones((2, 2))}))
    assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"].sum() == 4
    assert np.load(saver.save_data("e", torch.ones(3))).tolist() == [1, 1, 1]
    payload = json.loads(Path(saver.save_json("f.json", {"x": [1, 2.5]})).read_text())
    assert payload == {"x": [1, 2.5]}
    state = torch.load(saver.save_state_dict("g.pt", {"w": torch.ones(2)}), weights_only=True)
    assert state["w"].tolist() == [1, 1]
    (tmp_path / "source.bin").write_bytes(b"\x00\x01")
    assert Path(saver.save_file("h/i.bin", str(tmp_path / "source.bin"))).read_bytes() == b"\0\x01"


def test_data_is_converted_wherever_it_stands(saver):
    got = saver.convert_data({"a": torch.ones(2), "b": [torch.zeros(1), np.ones(1)]})
    assert isinstance(got["a"], np.ndarray) and all(isinstance(x, np.ndarray) for x in got["b"])
    with pytest.raises(TypeError):
        saver.convert_data(object())


@pytest.fixture
def frames(saver):
    """Twelve grays of even size, beside a picture that is none of them."""
    for index in range(12):
        saver.save_rgb_image(f"it5-test/{index}.png", torch.full((16, 32, 3), index / 12))
    saver.save_rgb_image("it5-test/depth_3.jpg", torch.ones(16, 32, 3))
    return saver


def test_frames_become_a_video_in_the_order_of_their_numbers(frames):
    path = frames.save_img_sequence(
        "it5-test", "it5-test", r"(\d+)\.png", save_format="mp4", fps=30, name="test", step=5
    )
    assert path.endswith("it5-test.mp4")
    with av.open(path) as video:
        stream = video.streams.video[0]
        assert stream.average_rate == 30 and (stream.height, stream.width) == (16, 32)
        levels = [frame.to_ndarray(format="rgb24").mean() / 255 for frame in video.decode(stream)]
    assert levels == pytest.approx([index / 12 for index in range(12)], abs=0.03)


def test_frames_become_a_gif(frames):
    path = frames.save_img_sequence("turn", "it5-test", r"(\d+)\.png", save_format="gif", fps=10)
    with Image.open(path) as gif:
        assert gif.n_frames == 12 and gif.info["duration"] == 100


@pytest.fixture
def square():
    """Two triangles with colours, and texture coordinates that have an up and a down."""
    mesh = Mesh(
        torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 2, 0], [0, 2, 0]]),
        torch.tensor([[0, 1, 2], [0, 2, 3]]),
    )
    mesh.set_vertex_color(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]))
    return mesh


def read_obj(paths):
    path = [paths] if isinstance(paths, str) else paths
    (obj,) = [name for name in path if name.endswith(".obj")]
    return obj, trimesh.load(obj, process=False)


def test_a_mesh_with_vertex_colours(saver, square):
    path, read = read_obj(saver.save_obj("m.obj", square, save_vertex_color=True))
    assert np.allclose(read.vertices, square.v_pos) and np.array_equal(read.faces, square.t_pos_idx)
    assert read.visual.vertex_colors[:, :3].tolist() == [
        [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    ]  # fmt: skip


def test_a_mesh_with_material_texture_and_normals(saver, square):
    class Textured:
        """What an unwrapped mesh offers."""

        v_pos, t_pos_idx, v_nrm = square.v_pos, square.t_pos_idx, square.v_nrm
        v_tex = torch.tensor([[0.0, 0.0], [1, 0], [1, 1], [0, 1], [0.5, 0.25]])
        t_tex_idx = torch.tensor([[0, 1, 2], [0, 2, 4]])

    paths = saver.save_obj(
        "m.obj", Textured, save_mat=True, save_normal=True, save_uv=True, map_Kd=quadrants(),
        map_Pm=torch.full((4, 6), 0.5), map_format="png",
    )  # fmt: skip
    obj, read = read_obj(paths)
    folder = Path(obj).parent
    names = {path.name for path in folder.iterdir()}
    assert names == {"m.obj", "m.mtl", "texture_kd.png", "texture_metallic.png"}
    assert np.array_equal(pixels(folder / "texture_kd.png")[0, 0], [255, 0, 0])
    material = (folder / "m.mtl").read_text()
    assert "map_Kd texture_kd.png" in material and "map_Pm texture_metallic.png" in material
    text = Path(obj).read_text()
    assert (
        "mtllib m.mtl" in text and "f 1/1/1 2/2/2 3/3/3" in text and "f 1/1/1 3/3/3 4/5/4" in text
    )
    assert "vt 0.5 0.75" in text  # v is flipped
    assert np.allclose(np.abs(read.vertex_normals[:, 2]), 1.0) and read.visual.uv is not None


def test_bare_geometry(saver, square):
    read = trimesh.load(saver.save_mesh("m.ply", square.v_pos, square.t_pos_idx), process=False)
    assert np.allclose(read.vertices, square.v_pos) and read.area == pytest.approx(2.0)


def test_half_precision_and_gradients_are_no_obstacle(saver):
    image = torch.rand(4, 4, 3, dtype=torch.bfloat16).requires_grad_()
    assert pixels(saver.save_rgb_image("a.png", image)).shape == (4, 4, 3)


def test_wandb_is_off_unless_enabled(saver):
    saver.create_loggers({"wandb": {"enable": False, "project": "p", "name": None}})
    assert saver.get_loggers() == []
    saver.create_loggers({})
    assert saver.get_loggers() == []
