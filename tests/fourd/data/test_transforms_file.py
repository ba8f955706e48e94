"""Cameras in JSON: sizes, focal lengths and refusals, by hand."""

import math

import pytest
import torch

from custom.fourd.data.transforms_file import (
    distance_bounds,
    frame_intrinsics,
    frame_pose,
    frame_time,
    read_json,
)

IDENTITY = torch.eye(4).tolist()
FILE = {"fl_x": 50.0, "fl_y": 60.0, "cx": 21.0, "cy": 9.0, "w": 40, "h": 20}


def test_intrinsics_are_scaled_to_the_size_read():
    matrix = frame_intrinsics(FILE, {}, (40, 80), (10, 20), "a.json frame 0")
    assert matrix.tolist() == [[25.0, 0.0, 10.5], [0.0, 30.0, 4.5], [0.0, 0.0, 1.0]]
    own = frame_intrinsics(FILE, {"fl_x": 80.0}, (20, 40), (20, 40), "a.json frame 0")
    assert own[0, 0] == 80.0 and own[1, 1] == 60.0


def test_the_angle_of_d_nerf_is_horizontal():
    """A right angle over 40 pixels puts the image plane 20 away; the centre is the middle."""
    angle = {"camera_angle_x": math.pi / 2}
    matrix = frame_intrinsics(angle, {}, (20, 40), (20, 40), "a.json frame 0")
    expected = [[20.0, 0.0, 20.0], [0.0, 20.0, 10.0], [0.0, 0.0, 1.0]]
    assert torch.allclose(matrix, torch.tensor(expected))


@pytest.mark.parametrize(
    "facts, message",
    [
        ({}, "a.json frame 3: there is no focal length; expected fl_x or camera_angle_x"),
        (FILE | {"k1": 0.1}, "lens distortion k1 is 0.1; expected pictures without"),
        (FILE | {"camera_model": "OPENCV_FISHEYE"}, "camera_model is 'OPENCV_FISHEYE'"),
        (FILE | {"w": 30}, "its picture has 40 x 20 pixels, but the file says 30 x 20"),
    ],
)
def test_lenses_that_are_no_pinhole_are_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        frame_intrinsics(facts, {}, (20, 40), (20, 40), "a.json frame 3")


def test_poses_may_leave_the_last_row_out():
    pose = frame_pose({"transform_matrix": IDENTITY[:3]}, "a.json frame 1")
    assert torch.equal(pose, torch.eye(4))


@pytest.mark.parametrize(
    "matrix, message",
    [
        (None, "transform_matrix is missing or no matrix"),
        ([[1, "x"]], "transform_matrix is missing or no matrix"),
        (IDENTITY[:2], r"transform_matrix is \(2, 4\); expected 4 x 4"),
        ([[float("nan")] * 4] * 4, "its pose holds NaN"),
        ((2 * torch.eye(4)).tolist(), "not orthonormal"),
    ],
)
def test_poses_that_are_none_are_refused(matrix, message):
    frame = {} if matrix is None else {"transform_matrix": matrix}
    with pytest.raises(ValueError, match=f"a.json frame 1: .*{message}"):
        frame_pose(frame, "a.json frame 1")


def test_times():
    assert frame_time({}, "a") is None and frame_time({"time": 1}, "a") == 1.0
    for wrong in (1.5, -0.1, "0", True, float("nan")):
        with pytest.raises(ValueError, match=r"a.json frame 2: its time is .*; expected a number"):
            frame_time({"time": wrong}, "a.json frame 2")


def test_bounds_come_from_the_ball_of_content():
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[:, 2, 3] = torch.tensor([3.0, 5.0])
    assert distance_bounds(c2w, None, None, 2.0) == (1.0, 7.0)
    assert distance_bounds(c2w, 0.5, 9.0, 2.0) == (0.5, 9.0)
    assert distance_bounds(c2w, None, None, 4.0) == (pytest.approx(0.08), 9.0)


def test_files_that_are_no_json_are_named(tmp_path):
    with pytest.raises(ValueError, match="a.json is missing"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('{"frames": [')
    with pytest.raises(ValueError, match="a.json is no whole JSON file"):
        read_json(tmp_path / "a.json")
