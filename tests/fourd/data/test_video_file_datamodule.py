"""A single video as a scene, with and without known cameras."""

import json
import math

import pytest
import threestudio
import torch

from custom.fourd.world.capture import path_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_mp4, write_video

SCENE = parse_caption("a yellow torus bouncing")


def module(path, **keys):
    return threestudio.find("video-file-datamodule")({"dataroot": str(path)} | keys)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    capture = path_capture(SCENE, 5, 32)
    write_video(path, capture)
    return path, capture


def test_known_cameras_and_colours_come_back(written):
    path, capture = written
    scene = module(path).scene
    assert torch.allclose(scene.c2w, capture.c2w, atol=1e-6) and scene.cameras() == [0]
    assert torch.allclose(scene.frame_times, capture.frame_times)
    truth = capture.render()[0]
    error = (scene.frames / 255.0 - truth).square().mean(dim=(1, 2, 3))
    assert float(-10 * torch.log10(error.max())) > 36
    focal = 16 / math.tan(math.radians(20))
    assert float(scene.intrinsics[2, 1, 1]) == pytest.approx(focal, rel=1e-5)


def test_an_unknown_camera_stands_where_the_keys_say(tmp_path):
    write_video(tmp_path / "clip.mp4", path_capture(SCENE, 6, 32, swing_deg=0), cameras=False)
    data = module(
        tmp_path / "clip.mp4", camera_distance=2.0, azimuth_deg=90.0, fovy_deg=90.0,
        hold_out_every=3, downsample=2, scene_radius=1.0, frame_list="0:5",
    )  # fmt: skip
    data.setup()
    scene = data.scene
    # From +y, looking at the origin: right is -x, up is z, backward is y.
    expected = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 1, 2], [0, 1, 0, 0], [0, 0, 0, 1]])
    assert torch.allclose(scene.c2w, expected.expand(5, 4, 4), atol=1e-6)
    assert float(scene.intrinsics[0, 0, 0]) == pytest.approx(8.0)
    assert scene.held_out.tolist() == [False, True, False, False, True]
    assert (scene.near, scene.far) == (1.0, 3.0)
    assert scene.frame_times.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert len(data.test_dataset) == 2


def edited(written, folder, change):
    path, _ = written
    (folder / "clip.mp4").write_bytes(path.read_bytes())
    content = json.loads(path.with_suffix(".json").read_text())
    change(content)
    (folder / "poses.json").write_text(json.dumps(content))
    return {"path": folder / "clip.mp4", "cameras": str(folder / "poses.json")}


def test_one_pose_serves_all_frames(written, tmp_path):
    keys = edited(written, tmp_path, lambda c: c.update(frames=c["frames"][:1]))
    scene = module(**keys).scene
    assert torch.equal(scene.c2w, scene.c2w[:1].expand(5, 4, 4))
    assert torch.allclose(scene.frame_times, torch.linspace(0, 1, 5))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["frames"].pop(), "poses.json lists 4 poses, but .*clip.mp4 has 5 frames"),
        (lambda c: c["frames"][3].update(time=0.25), "frame 3: its time 0.25 does not follow 0.5"),
        (lambda c: c["frames"][3].pop("time"), "frame 3: it has no time, while others have"),
        (lambda c: c["frames"][2].pop("transform_matrix"), "frame 2: its transform_matrix"),
        (lambda c: c.update(h=64), "frame 0: its picture has 32 x 32 pixels, but the file says"),
        (lambda c: c.pop("fl_x"), "frame 0: there is no focal length"),
    ],
)
def test_poses_that_do_not_fit_are_refused(written, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        _ = module(**edited(written, tmp_path, change)).scene


def test_a_cut_video_is_refused_at_the_door(written, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(written[0].read_bytes()[:-20])
    with pytest.raises(ValueError, match="clip.mp4 is cut"):
        module(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"hold_out_every": 1}, "data.hold_out_every is 1; expected 0, or 2 and more"),
        ({"fovy_deg": 180}, "data.fovy_deg has the value 180"),
        ({"camera_distance": 0}, "data.camera_distance has the value 0"),
        ({"cameras": "gone.json"}, "gone.json is missing"),
        ({"near": 5.0, "far": 1.0}, "near is 5.0 and far 1.0"),
    ],
)
def test_keys_that_cannot_work_are_refused(written, keys, message):
    with pytest.raises(ValueError, match=message):
        _ = module(written[0], **keys).scene


def test_a_single_frame_is_a_still(tmp_path):
    write_mp4(tmp_path / "one.mp4", torch.zeros(1, 32, 32, 3, dtype=torch.uint8))
    scene = module(tmp_path / "one.mp4").scene
    assert scene.frame_times.tolist() == [0.0] and len(scene) == 1
