"""`--export` through the launcher, and every file that it writes opened by another reader."""

import json
import math

import numpy as np
import pytest
import threestudio
import torch
from PIL import Image
from threestudio.utils.checkpoint import save_checkpoint

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.renderers.scene import load_scene
from tests.fixtures.launched import launch, planned
from tests.fixtures.tiny_scenes import SYSTEM, MovingBall, PlaceColor, random_scene

STAGE_3 = "custom/configs/fourdfy_stage_3.yaml"
SMALL = [
    "system.exporter.n_frames=5", "system.exporter.fps=4", "system.exporter.page_views=4",
    "system.exporter.page_times=3", "system.exporter.sheet_views=2",
    "system.exporter.sheet_times=3", "system.exporter.mesh_times=3",
    "system.exporter.mesh_resolution=16",
]  # fmt: skip
FILES = {"scene.safetensors", "scene.mp4", "scene.gif", "scene-sheet.png", "scene.html",
         "scene.glb", "scene.obj", "transforms.json", "frames"}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Weights as a training at step 5 would leave them, without the training."""
    torch.manual_seed(0)
    config = planned(STAGE_3, "test")["system"] | {"weights": None}
    system = threestudio.find("fourdfy-system")(config)
    with torch.no_grad():
        for parameter in system.geometry.encoding.parameters():
            parameter.uniform_(-0.5, 0.5)
    path = tmp_path_factory.mktemp("weights") / "last.ckpt"
    payload = {
        "state_dict": system.state_dict(), "global_step": 5, "epoch": 0, "profile": "test",
        "config": {"system": config},
    }  # fmt: skip
    save_checkpoint(path, payload)
    return path


def export(folder, checkpoint, *overrides, config=STAGE_3):
    return launch("--export", folder, f"system.weights={checkpoint}", *overrides, config=config)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    run = export(tmp_path_factory.mktemp("export"), checkpoint, *SMALL)
    assert run.status == 0, run.errors
    return run


@pytest.fixture(scope="module")
def folder(exported):
    return exported.folder / "save" / "it5-export"


def test_it_writes_all_formats_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    assert not [path for path in folder.rglob(".*")], "no temporary file stays"


def test_the_video_has_the_path_s_frames_and_length(folder):
    import av

    with av.open(str(folder / "scene.mp4")) as container:
        (stream,) = container.streams.video
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.average_rate == 4 and len(frames) == 5
        assert float(stream.duration * stream.time_base) == pytest.approx(5 / 4)
    first = np.asarray(Image.open(folder / "frames" / "0000.png").convert("RGB"))
    assert first.shape == frames[0].shape == (16, 16, 3)
    assert np.abs(frames[0].astype(int) - first).mean() < 8
    with Image.open(folder / "scene.gif") as image:
        assert image.n_frames == 5 and image.size == (16, 16)


def test_the_frames_are_renders_of_the_poses(folder, checkpoint):
    """Poses, times and the scene, each read from its file, give the pictures in theirs."""
    poses = json.loads((folder / "transforms.json").read_text())
    assert len(poses["frames"]) == 5
    fovy = 2 * math.atan(poses["h"] / 2 / poses["fl_y"])
    scene = load_scene(folder / "scene.safetensors")
    for frame in (poses["frames"][0], poses["frames"][3]):
        images = scene.render(
            torch.tensor(frame["transform_matrix"])[None], torch.tensor([fovy]), poses["h"],
            poses["w"], torch.tensor([frame["time"]]), background=torch.ones(3),
        )  # fmt: skip
        stored = np.asarray(Image.open(folder / frame["file_path"]).convert("RGB")).astype(int)
        assert np.abs(stored - (images.rgb[0] * 255).numpy()).max() <= 1
    assert images.alpha.max() > 0.5


def test_the_scene_file_is_the_checkpoint_s_scene(folder, checkpoint):
    one, other = load_scene(folder / "scene.safetensors"), load_scene(checkpoint)
    state, expected = one.geometry.state_dict(), other.geometry.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[k], expected[k]) for k in state)
    assert one.recipe.global_step == 5 and one.recipe.profile == "test"
    assert one.recipe.prompt == "a red cube next to a blue sphere bouncing"
    assert one.recipe.system["geometry"] == other.recipe.system["geometry"]


def test_the_page_holds_the_grid(folder):
    text = (folder / "scene.html").read_text()
    data = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    assert data["azimuths_deg"] == [0, 90, 180, 270] and data["times"] == [0, 0.5, 1]
    assert data["seconds"] == 5 / 4 and [len(row) for row in data["frames"]] == [3] * 4
    assert "a red cube next to a blue sphere bouncing" in text and len(text) < 200_000


def test_the_sheet_shows_two_views_at_three_times(folder):
    with Image.open(folder / "scene-sheet.png") as image:
        width, height = image.size
    # Tiles of 16 pixels are enlarged to 96, with gutters and labels around them.
    assert 3 * 96 < width < 5 * 96 and 2 * 96 < height < 4 * 96


def test_the_meshes_open_elsewhere(folder):
    import trimesh

    scene = trimesh.load(folder / "scene.glb", process=False)
    assert len(scene.geometry) == 3, "one per time"
    for mesh in scene.geometry.values():
        assert len(mesh.vertices) > 50 and np.abs(mesh.vertices).max() <= 1
        colors = mesh.visual.vertex_attributes["color"]
        assert colors.shape == (len(mesh.vertices), 4) and colors[:, :3].std() > 0
    single = trimesh.load(folder / "scene.obj", process=False)
    first = next(iter(scene.geometry.values()))
    assert len(single.vertices) == len(first.vertices), "at time 0, as the first of the animation"
    assert np.allclose(single.vertices, first.vertices, atol=1e-5)
    assert single.visual.vertex_colors.shape == (len(single.vertices), 4)


def test_the_mesh_exporter_is_still_there(checkpoint, tmp_path):
    run = export(
        tmp_path, checkpoint, "system.exporter_type=mesh-exporter", "system.exporter.fmt=obj",
        "system.geometry.isosurface_resolution=10", "system.geometry.isosurface_threshold=1.0",
    )  # fmt: skip
    assert run.status == 0, run.errors
    assert [path.name for path in (run.folder / "save").rglob("*.*")] == ["model.obj"]


# Without the launcher


def exporter(moves=True, **config):
    """An exporter of the random scene, as a system would make it."""
    scene = random_scene()
    built = threestudio.find("scene-exporter")(
        config, geometry=scene.geometry, material=scene.material, background=scene.background
    )
    built.scene = scene
    built.see_view(view(moves))
    return built


def view(moves=True):
    batch = {
        "elevation": torch.tensor([20.0]), "camera_distances": torch.tensor([2.5]),
        "fovy": torch.tensor([math.radians(50)]), "height": 8, "width": 6,
    }  # fmt: skip
    return batch | ({"frame_times": torch.tensor([0.0])} if moves else {})


def outputs(built, folder):
    for out in built():
        if out.save_type == "with_writer":
            (folder / out.save_name).parent.mkdir(exist_ok=True)
            out.params["write"](str(folder / out.save_name))
        yield out


def test_cameras_are_those_of_the_test_views_unless_set(tmp_path):
    built = exporter(formats=["cameras"], n_frames=3, distance=4.0, path="fixed", azimuth_deg=90)
    *_, last = outputs(built, tmp_path)
    poses = last.params["payload"]
    place = np.array(poses["frames"][0]["transform_matrix"])[:3, 3]
    up = 4 * math.sin(math.radians(20))
    assert np.allclose(place, [0, 4 * math.cos(math.radians(20)), up], atol=1e-5)
    assert (poses["h"], poses["w"]) == (8, 6)
    assert poses["fl_y"] == pytest.approx(4 / math.tan(math.radians(25)))


def test_the_background_is_white_a_colour_or_the_scene_s_own(tmp_path):
    found = []
    for background in ([1.0, 1.0, 1.0], [1.0, 0.0, 0.0], None):
        built = exporter(formats=["cameras"], n_frames=1, background=background, distance=8.0)
        list(outputs(built, tmp_path))
        found.append(np.asarray(Image.open(tmp_path / "frames/0000.png"))[0, 0].tolist())
    assert found == [[255, 255, 255], [255, 0, 0], [51, 102, 153]]


def test_a_scene_at_rest_has_no_time(tmp_path, monkeypatch):
    monkeypatch.setattr(type(random_scene().geometry), "is_dynamic", False)
    built = exporter(n_frames=4, page_views=3, sheet_views=2, sheet_times=3, mesh_resolution=8)
    made = {out.save_name: out for out in outputs(built, tmp_path)}
    assert set(made) - {f"frames/{i:04d}.png" for i in range(4)} == FILES - {"frames"}
    assert all("time" not in f for f in made["transforms.json"].params["payload"]["frames"])
    glb = (tmp_path / "scene.glb").read_bytes()
    assert b'"animations"' not in glb
    page = (tmp_path / "scene.html").read_text()
    data = json.loads(page.partition('type="application/json">')[2].partition("</script>")[0])
    assert len(data["frames"]) == 48 and data["times"] == [0.0]


def test_a_threshold_that_nothing_reaches_stops_an_export_of_meshes():
    built = exporter(formats=["glb", "obj"], mesh_threshold=1e6, mesh_resolution=4, mesh_times=2)
    message = (
        r"no mesh for glb and obj: nothing reaches the threshold 1e\+06: the field lies in "
        r"\[.*\]. Set system.exporter.mesh_threshold inside that range"
    )
    with pytest.raises(ValueError, match=message):
        list(built())


def test_meshes_that_fail_beside_other_formats_are_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(threestudio.logger, "propagate", True)
    built = exporter(formats=["scene", "glb"], mesh_threshold=1e6, mesh_resolution=4, mesh_times=2)
    assert [out.save_name for out in outputs(built, tmp_path)] == ["scene.safetensors"]
    assert "no mesh for glb: nothing reaches the threshold 1e+06" in caplog.text


class Vanishing(MovingBall):
    """A ball that is gone in the second half of the clip."""

    def forward_density(self, points, frame_times=None):
        if frame_times is None:
            frame_times = points.new_zeros(points.shape[:-1])
        return super().forward_density(points, frame_times) * (frame_times[..., None] < 0.5)


def test_a_time_without_surface_is_told_and_left_empty(tmp_path, caplog, monkeypatch):
    import trimesh

    monkeypatch.setattr(threestudio.logger, "propagate", True)
    built = exporter(formats=["glb", "obj"], mesh_times=4, mesh_resolution=12, obj_time=1.0)
    built.scene.geometry, built.scene.material = Vanishing({"radius": 1.0}), PlaceColor({})
    assert [out.save_name for out in outputs(built, tmp_path)] == ["scene.glb"]
    assert "3 of 5 times have no surface" in caplog.text
    assert "no mesh for obj at time 1" in caplog.text
    assert len(trimesh.load(tmp_path / "scene.glb").geometry) == 2


def test_keys_are_checked_when_it_is_built():
    with pytest.raises(ValueError, match="system.exporter.fps is 0; expected at least 1"):
        exporter(fps=0)


def test_a_system_that_attaches_nothing_is_named():
    built = exporter()
    built.scene = None
    with pytest.raises(ValueError, match="needs the system's renderer"):
        next(built())


def test_only_the_first_process_exports(monkeypatch):
    monkeypatch.setattr("custom.fourd.systems.scene_exporter.get_rank", lambda: 1)
    assert list(exporter()()) == []


def test_attach_takes_what_the_scene_file_records():
    scene = random_scene()

    class System:
        cfg = threestudio.utils.config.OmegaConf.create(
            SYSTEM | {"prompt_processor": {"prompt": "x"}}
        )
        true_global_step, profile, renderer = 9, "paper", scene.renderer

    built = exporter()
    built.attach(System())
    recipe = built.scene.recipe
    assert (recipe.global_step, recipe.prompt, recipe.profile) == (9, "x", "paper")
