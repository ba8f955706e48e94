"""Rows of poses_bounds.npy, worked out by hand, and what is wrong with others."""

import math

import numpy as np
import pytest
import torch

from custom.fourd.data.llff_poses import average_pose, normalise_cameras, read_poses_bounds

# A camera at (1, 2, 3) that looks along the world's -y with its up along z: right is then
# forward x up = -y cross z = -x. Columns of a row are down, right, backward, position, (H, W, f).
HAND_MADE = [
    [0, -1, 0, 1, 40],
    [0, 0, 1, 2, 60],
    [-1, 0, 0, 3, 55],
]


def rows(count=2):
    row = np.concatenate([np.array(HAND_MADE, dtype=np.float64).flatten(), [0.5, 9.0]])
    table = np.stack([row] * count)
    table[:, 3] += np.arange(count)
    return table


def saved(tmp_path, table):
    np.save(tmp_path / "poses_bounds.npy", table)
    return tmp_path / "poses_bounds.npy"


def test_a_row_worked_out_by_hand(tmp_path):
    cameras = read_poses_bounds(saved(tmp_path, rows()))
    right, up, backward, position = cameras.c2w[1, :3].unbind(dim=-1)
    assert right.tolist() == [-1, 0, 0] and up.tolist() == [0, 0, 1]
    assert backward.tolist() == [0, 1, 0] and position.tolist() == [2, 2, 3]
    assert cameras.sizes[0].tolist() == [40, 60] and float(cameras.focal[0]) == 55
    assert cameras.bounds[1].tolist() == [0.5, 9.0]
    assert len(cameras.without(0)) == 1 and float(cameras.without(0).c2w[0, 0, 3]) == 2


def turned(azimuth):
    """A pose at (sin a, 0, cos a) looking at the origin, up along y."""
    s, c = math.sin(azimuth), math.cos(azimuth)
    return torch.tensor(
        [[c, 0, s, s], [0, 1, 0, 0], [-s, 0, c, c], [0, 0, 0, 1]], dtype=torch.float64
    )


def test_the_average_of_an_arc_is_its_middle():
    pose = average_pose(torch.stack([turned(0.2), turned(1.0)]))
    expected = turned(0.6)
    expected[:3, 3] *= math.cos(0.4)
    assert torch.allclose(pose, expected, atol=1e-12)


def test_cameras_all_around_have_no_average():
    poses = torch.stack([turned(angle) for angle in (0, math.pi / 2, math.pi, 1.5 * math.pi)])
    with pytest.raises(ValueError, match="cancel, so they have no average .*normalise: none"):
        average_pose(poses)


def test_normalised_cameras_face_minus_z_and_the_way_back_is_exact(tmp_path):
    table = rows(3)
    table[:, 15] = [0.5, 0.4, 0.7]
    cameras = read_poses_bounds(saved(tmp_path, table))
    moved, back = normalise_cameras(cameras)
    assert torch.allclose(average_pose(moved.c2w), torch.eye(4).double(), atol=1e-12)
    assert float(moved.bounds.min()) == pytest.approx(1 / 1.08)
    # The three cameras stood one apart along x; the new unit is 1.08 * 0.4.
    gap = (moved.c2w[1, :3, 3] - moved.c2w[0, :3, 3]).norm()
    assert float(gap) == pytest.approx(1 / (1.08 * 0.4))
    places = moved.c2w[:, :3, 3] @ back[:3, :3].T + back[:3, 3]
    assert torch.allclose(places, cameras.c2w[:, :3, 3], atol=1e-12)


def broken(change):
    table = rows(3)
    change(table)
    return table


@pytest.mark.parametrize(
    "table, message",
    [
        (np.zeros((2, 15)), r"shape \(2, 15\) .* expected \(cameras, 17\)"),
        (np.array(["a"]), r"shape \(1,\)"),
        (broken(lambda t: t.__setitem__((1, 2), np.nan)), "row 1: its pose holds NaN"),
        (broken(lambda t: t.__setitem__((2, 1), -1.2)), "row 2: the rotation .* not orthonormal"),
        (broken(lambda t: t.__setitem__((0, 1), 1.0)), "row 0: the rotation .* is a reflection"),
        (broken(lambda t: t.__setitem__((1, 14), -5)), r"row 1: height, width and focal are"),
        (broken(lambda t: t.__setitem__((1, 16), 0.1)), r"row 1: its bounds are \[0.5, 0.1\]"),
    ],
)
def test_broken_rows_are_named(tmp_path, table, message):
    with pytest.raises(ValueError, match=f"poses_bounds.npy .*{message}"):
        read_poses_bounds(saved(tmp_path, table))


def test_a_missing_or_cut_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="poses_bounds.npy is missing; expected one row of 17"):
        read_poses_bounds(tmp_path / "poses_bounds.npy")
    path = saved(tmp_path, rows())
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ValueError, match="poses_bounds.npy is no whole array file"):
        read_poses_bounds(path)
