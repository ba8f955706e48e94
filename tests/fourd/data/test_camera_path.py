"""Camera paths by hand, and their poses read back as nerfstudio reads them."""

import json
import math

import numpy as np
import pytest
import torch

from custom.fourd.data.camera_path import camera_path, transforms_json
from custom.fourd.ops.camera import camera_rays, intrinsics_from_fovy


def test_an_orbit_turns_once_and_does_not_show_the_first_view_twice():
    path = camera_path("orbit", 4, elevation_deg=0.0, distance=2.0)
    expected = torch.tensor([[2.0, 0, 0], [0, 2, 0], [-2, 0, 0], [0, -2, 0]])
    torch.testing.assert_close(path.c2w[:, :3, 3], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(path.frame_times, torch.tensor([0, 1 / 3, 2 / 3, 1]))
    assert len(path) == 4 and float(path.fovy[0]) == pytest.approx(math.radians(40))


def test_a_fixed_camera_stands_while_time_goes_on():
    path = camera_path("fixed", 3, azimuth_deg=90.0, elevation_deg=0.0, distance=2.0)
    assert torch.equal(path.c2w[0], path.c2w[2])
    torch.testing.assert_close(path.c2w[0, :3, 3], torch.tensor([0.0, 2, 0]), atol=1e-6, rtol=0)
    assert path.frame_times.tolist() == [0.0, 0.5, 1.0]
    assert camera_path("fixed", 1).frame_times.tolist() == [0.0]


@pytest.mark.parametrize("asked, given", [(48, 52), (124, 124), (1, 4), (5, 12)])
def test_motion_smooth_takes_the_next_length_that_it_can(asked, given):
    path = camera_path("motion_smooth", asked)
    assert len(path) == given
    assert path.frame_times[0] == 0 and 0 <= path.frame_times.min() <= path.frame_times.max() <= 1
    # Up to the repeats that upstream leaves out, the clip plays twice.
    assert torch.equal(path.frame_times[: given // 2], path.frame_times[given // 2 :])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "spiral"}, "'spiral'; expected one of orbit, fixed, motion_smooth"),
        ({"n_frames": 0}, "has 0 frames; expected at least 1"),
        ({"fovy_deg": 180.0}, "fovy_deg is 180.0; expected more than 0"),
        ({"elevation_deg": 90.0}, "elevation_deg is 90.0 .*expected an elevation between"),
        ({"distance": 0.0}, "distance 0.0; expected"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        camera_path(**{"kind": "orbit", "n_frames": 4} | change)


def test_transforms_give_the_rays_of_the_path():
    """Rays by OpenCV's pixel formula and OpenGL's camera axes, as nerfstudio makes them."""
    path = camera_path("orbit", 3, elevation_deg=20.0)
    height, width = 6, 8
    read = json.loads(json.dumps(transforms_json(path, height, width, ["a", "b", "c"])))
    assert (read["w"], read["h"], read["camera_model"]) == (8, 6, "OPENCV")
    assert [frame["file_path"] for frame in read["frames"]] == ["a", "b", "c"]
    assert [frame["time"] for frame in read["frames"]] == [0.0, 0.5, 1.0]
    _, rays = camera_rays(path.c2w, intrinsics_from_fovy(path.fovy, height, width), height, width)
    column, row = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    local = np.stack([
        (column - read["cx"]) / read["fl_x"], -(row - read["cy"]) / read["fl_y"],
        -np.ones_like(column),
    ], -1)  # fmt: skip
    for frame, expected in zip(read["frames"], rays, strict=True):
        rotation = np.array(frame["transform_matrix"])[:3, :3]
        world = local @ rotation.T
        world /= np.linalg.norm(world, axis=-1, keepdims=True)
        assert np.allclose(world, expected.numpy(), atol=1e-6)
    with pytest.raises(ValueError, match="2 files for 3 views"):
        transforms_json(path, height, width, ["a", "b"])
