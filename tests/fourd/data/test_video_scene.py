"""Scenes of videos: order, look-up, and every refusal, by hand-made frames."""

import pytest
import torch

from custom.fourd.data.video_scene import VideoScene, check_intrinsics, check_pose


def scene_of(cameras=3, times=4, **changes):
    """A scene whose frames are numbered: red is the camera, green the time."""
    pairs = [(c, t) for c in range(cameras) for t in range(times)]
    n = len(pairs)
    frames = torch.zeros(n, 2, 3, 3, dtype=torch.uint8)
    for row, (camera, time) in enumerate(pairs):
        frames[row, ..., 0], frames[row, ..., 1] = camera, time
    ids = torch.tensor(pairs)
    parts = {
        "frames": frames,
        "c2w": torch.eye(4).repeat(n, 1, 1),
        "intrinsics": torch.tensor([[5.0, 0, 1.5], [0, 5.0, 1.0], [0, 0, 1]]).repeat(n, 1, 1),
        "camera_ids": ids[:, 0],
        "time_ids": ids[:, 1],
        "frame_times": ids[:, 1] / (times - 1),
        "held_out": ids[:, 0] == 0,
        "near": 0.5,
        "far": 4.0,
        "names": [f"cam{c:02d}.mp4 frame {t}" for c, t in pairs],
    }
    return VideoScene(**parts | changes)


def test_rows_are_found_by_camera_and_time():
    scene = scene_of()
    assert (scene.height, scene.width, len(scene)) == (2, 3, 12)
    assert scene.cameras() == [0, 1, 2] and scene.times() == [0, 1, 2, 3]
    row = scene.index(2, 1)
    assert scene.frames[row, 0, 0, :2].tolist() == [2, 1]
    with pytest.raises(KeyError, match="camera 7 has no frame at time_id 1; cameras are"):
        scene.index(7, 1)


def test_training_reads_no_held_out_frame_unless_told_to():
    scene = scene_of()
    assert set(scene.camera_ids[scene.train_rows()].tolist()) == {1, 2}
    assert scene.camera_ids[scene.eval_rows()].tolist() == [0] * 4
    leaky = scene_of(train_on_held_out=True)
    assert len(leaky.train_rows()) == 12 and len(leaky.eval_rows()) == 4


def test_rows_of_a_camera_and_of_evaluation_go_by_time_in_any_file_order():
    scene = scene_of()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    shuffled = scene_of(
        **{k: getattr(scene, k)[order] for k in ("frames", "camera_ids", "time_ids")},
        **{k: getattr(scene, k)[order] for k in ("frame_times", "held_out")},
        names=[scene.names[row] for row in order],
    )
    assert shuffled.frames[shuffled.camera_rows(1), 0, 0, 1].tolist() == [0, 1, 2, 3]
    assert shuffled.frames[shuffled.eval_rows(), 0, 0, 1].tolist() == [0, 1, 2, 3]


def test_without_a_held_out_camera_all_frames_are_evaluated():
    scene = scene_of(held_out=torch.zeros(12, dtype=torch.bool))
    assert scene.eval_rows().tolist() == list(range(12))
    assert len(scene.train_rows()) == 12


def changed(key, row, value):
    tensor = getattr(scene_of(), key).clone()
    tensor[row] = torch.as_tensor(value, dtype=tensor.dtype)
    return {key: tensor}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"frames": torch.zeros(0, 2, 3, 3, dtype=torch.uint8)}, r"\(0, 2, 3, 3\).*not empty"),
        ({"frames": torch.zeros(12, 2, 3, 3)}, "frames has shape .*float32; expected .*uint8"),
        ({"c2w": torch.eye(4).repeat(11, 1, 1)}, r"c2w has shape \(11, 4, 4\)"),
        ({"masks": torch.zeros(12, 3, 3, dtype=torch.uint8)}, r"masks has shape \(12, 3, 3\)"),
        ({"names": ["one"]}, "names has 1 entries for 12 frames"),
        ({"near": 4.0}, "near is 4.0 and far 4.0; expected 0 < near < far"),
        ({"held_out": torch.ones(12, dtype=torch.bool)}, "all 12 frames are held out"),
        (changed("c2w", 5, float("nan")), "cam01.mp4 frame 1: its pose holds NaN"),
        (changed("frame_times", 6, 1.5), "cam01.mp4 frame 2: its time is 1.5; expected"),
        (changed("frame_times", 6, float("nan")), "cam01.mp4 frame 2: its time is nan"),
        (changed("frame_times", 6, 0.5), "one per time_id"),
        (changed("time_ids", 6, 1), "one per time_id"),
        (changed("camera_ids", 7, 0), "cam01.mp4 frame 3 and cam00.mp4 frame 3 are both camera 0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        scene_of(**changes)


def test_times_must_grow_with_their_ids():
    times = scene_of().frame_times.flip(0)
    with pytest.raises(ValueError, match="frame 1: time .* at time_id 1 follows time 1.0 at"):
        scene_of(frame_times=times)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda p: p.mul_(2), r"a.json row 3: the rotation .* not orthonormal .* off by 3"),
        (lambda p: p[:, 0].neg_(), "a.json row 3: the rotation of its pose is a reflection"),
        (lambda p: p[3].copy_(torch.tensor([1.0, 2, 3, 1])), "the last row of its pose is"),
        (lambda p: p[0, 3].fill_(float("inf")), "NaN or infinity"),
    ],
)
def test_a_pose_is_rigid(change, message):
    pose = torch.eye(4)
    check_pose(pose, "a.json row 3")
    change(pose)
    with pytest.raises(ValueError, match=message):
        check_pose(pose, "a.json row 3")


@pytest.mark.parametrize("place, value", [((0, 0), 0.0), ((1, 1), -2.0), ((0, 1), 0.1)])
def test_intrinsics_are_a_pinhole(place, value):
    matrix = torch.tensor([[5.0, 0, 1.5], [0, 5.0, 1.0], [0, 0, 1]])
    check_intrinsics(matrix, "cam00")
    matrix[place] = value
    with pytest.raises(ValueError, match="cam00: its intrinsics are"):
        check_intrinsics(matrix, "cam00")
