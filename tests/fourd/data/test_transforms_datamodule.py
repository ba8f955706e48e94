"""Posed pictures with times: the world's truth comes back; streams, splits and refusals."""

import json

import pytest
import threestudio
import torch
from PIL import Image

from custom.fourd.world.capture import arc_azimuths, path_capture, rig_capture
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.writers import write_transforms

SCENE = parse_caption("a green cone spinning")


def module(path, **keys):
    return threestudio.find("transforms-datamodule")({"dataroot": str(path)} | keys)


@pytest.fixture
def rig(tmp_path):
    capture = rig_capture(SCENE, arc_azimuths(3), 3, 24)
    write_transforms(tmp_path / "rig", capture, held_out=[0])
    return tmp_path / "rig", capture


def edit(folder, change, name="transforms.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def test_a_rig_comes_back_exactly(rig):
    folder, capture = rig
    scene = module(folder).scene
    assert torch.equal(scene.frames, capture.frames())
    assert torch.allclose(scene.c2w, capture.c2w, atol=1e-6)
    assert torch.equal(scene.held_out, capture.camera_ids == 0)
    # Held-out cameras are numbered by their first frame, like the others.
    assert torch.equal(scene.camera_ids, capture.camera_ids)
    assert torch.equal(scene.time_ids, capture.time_ids)
    assert scene.near == pytest.approx(3 - 1.7321) and scene.far == pytest.approx(3 + 1.7321)


def test_a_moving_camera_is_one_stream(tmp_path):
    capture = path_capture(SCENE, 5, 24)
    write_transforms(tmp_path / "path", capture)
    scene = module(tmp_path / "path" / "transforms.json").scene
    assert scene.cameras() == [0] and scene.times() == [0, 1, 2, 3, 4]
    assert torch.allclose(scene.c2w, capture.c2w, atol=1e-6) and not scene.held_out.any()


def test_cameras_can_be_held_out_where_the_file_names_no_split(tmp_path):
    write_transforms(tmp_path / "rig", rig_capture(SCENE, arc_azimuths(3), 3, 24))
    scene = module(tmp_path / "rig", hold_out_cameras=[1], frame_list=[0, 2], downsample=2).scene
    assert set(scene.camera_ids[scene.held_out].tolist()) == {1} and len(scene) == 6
    assert scene.frame_times.unique().tolist() == [0.0, 1.0] and scene.height == 12
    with pytest.raises(ValueError, match="data.hold_out_cameras names camera 3"):
        _ = module(tmp_path / "rig", hold_out_cameras=[3]).scene


def d_nerf(folder):
    """Hand-made files as D-NeRF's: endings left out, alpha, an angle, splits by file."""
    folder.mkdir()
    for split, count in (("train", 3), ("val", 2), ("test", 2)):
        frames = []
        for index in range(count):
            pose = torch.eye(4)
            pose[2, 3] = 4.0 + index
            name = f"{split}_{index}"
            Image.new("RGBA", (16, 16), (0, 0, 0, 51 * index)).save(folder / f"{name}.png")
            frames.append(
                {
                    "file_path": f"./{name}",
                    "transform_matrix": pose.tolist(),
                    "time": index / (count - 1),
                }
            )
        content = {"camera_angle_x": 0.7, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(content))
    return folder


def test_d_nerf_s_layout(tmp_path):
    folder = d_nerf(tmp_path / "balls")
    scene = module(folder).scene
    assert scene.held_out.tolist() == [False] * 3 + [True] * 2
    assert scene.camera_ids.tolist() == [0, 0, 0, 1, 1]
    assert scene.time_ids.tolist() == [0, 1, 2, 0, 2]
    assert scene.frames[:, 0, 0, 0].tolist() == [255, 204, 153, 255, 204]
    assert float(scene.intrinsics[0, 0, 0]) == pytest.approx(21.9155, abs=1e-3)
    black = module(folder, background=[0, 0, 0], eval_split="test").scene
    assert black.frames[2].max() == 0 and "test_1" in black.names[-1]
    with pytest.raises(ValueError, match="data.eval_split is 'night', but .* holds no"):
        module(folder, eval_split="night")


def test_frames_may_name_their_camera(rig):
    folder, _ = rig

    def label(content):
        content.pop("val_filenames")
        for index, frame in enumerate(content["frames"]):
            frame["camera_id"] = "left" if index < 3 else f"right{index // 3}"

    edit(folder, label)
    assert module(folder).scene.camera_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def drop_picture(folder):
    (folder / "images" / "01_0001.png").unlink()


def cut_picture(folder):
    path = folder / "images" / "01_0001.png"
    path.write_bytes(path.read_bytes()[:60])


def other_size(folder):
    Image.new("RGB", (20, 24)).save(folder / "images" / "01_0001.png")


def nan_pose(folder):
    edit(folder, lambda c: c["frames"][4]["transform_matrix"][0].__setitem__(3, float("nan")))


def skewed_pose(folder):
    edit(folder, lambda c: c["frames"][4]["transform_matrix"][0].__setitem__(0, 3.0))


def no_time(folder):
    edit(folder, lambda c: c["frames"][4].pop("time"))


def twice(folder):
    edit(folder, lambda c: c["frames"][4].update(time=0.0))


def no_frames(folder):
    edit(folder, lambda c: c.update(frames=[]))


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop_picture, r"frame 4 .*01_0001.png\): its picture .* is missing \(1 of 9 are\)"),
        (cut_picture, "01_0001.png is no whole picture"),
        (other_size, "01_0001.png is 20 x 24 pixels; expected 24 x 24 like"),
        (nan_pose, r"transforms.json frame 4 \(.*01_0001.png\): its pose holds NaN"),
        (skewed_pose, "transforms.json frame 4 .* not orthonormal"),
        (no_time, "transforms.json frame 4 .* has no time, while others have"),
        (twice, "transforms.json frame 4 .* are both camera 1 at time_id 0"),
        (no_frames, "transforms.json lists no frames"),
    ],
)
def test_broken_folders_are_refused(rig, damage, message):
    damage(rig[0])
    with pytest.raises(ValueError, match=message):
        _ = module(rig[0]).scene


def test_a_folder_without_the_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds neither transforms.json nor transforms_train"):
        module(tmp_path)
