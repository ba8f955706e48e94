"""The camera convention: hand-computed poses, laws of rotations, the poles, any batch size."""

import math

import numpy as np
import pytest
import torch
from threestudio.utils.camera import camera_from_orbit, look_at, orbit_position

# Poses of a camera at distance 2, worked out on paper: columns right, up, backward, position.
HAND_COMPUTED = {
    "front": ((0.0, 0.0), [[0, 0, 1, 2], [1, 0, 0, 0], [0, 1, 0, 0]]),
    "right": ((0.0, 90.0), [[-1, 0, 0, 0], [0, 0, 1, 2], [0, 1, 0, 0]]),
    "back": ((0.0, 180.0), [[0, 0, -1, -2], [-1, 0, 0, 0], [0, 1, 0, 0]]),
    "left": ((0.0, -90.0), [[1, 0, 0, 0], [0, 0, -1, -2], [0, 1, 0, 0]]),
    "above": ((90.0, 0.0), [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 2]]),
    "below": ((-90.0, 0.0), [[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, -2]]),
    "half up": (
        (30.0, 0.0),
        [
            [0, -0.5, math.sqrt(0.75), math.sqrt(3.0)],
            [1, 0, 0, 0],
            [0, math.sqrt(0.75), 0.5, 1.0],
        ],
    ),
}


def reference_pose(position, center, up):
    """The contract's formula, one camera at a time, in numpy's double precision."""
    lookat = (center - position) / np.linalg.norm(center - position)
    right = np.cross(lookat, up)
    right = right / np.linalg.norm(right)
    true_up = np.cross(right, lookat)
    pose = np.eye(4)
    pose[:3] = np.stack([right, true_up, -lookat, position], axis=-1)
    return pose


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_orbit_pose_equals_the_one_worked_out_by_hand(name):
    (elevation_deg, azimuth_deg), expected = HAND_COMPUTED[name]
    pose = camera_from_orbit(elevation_deg, azimuth_deg, 2.0)
    assert torch.allclose(pose[:3], torch.tensor(expected, dtype=torch.float32), atol=1e-6)
    assert pose[3].tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", HAND_COMPUTED)
def test_looking_at_the_origin_gives_the_orbits_pose(name):
    (elevation_deg, azimuth_deg), expected = HAND_COMPUTED[name]
    pose = look_at(orbit_position(elevation_deg, azimuth_deg, 2.0))
    assert torch.allclose(pose[:3], torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_position_is_measured_from_x_towards_y_and_z():
    position = orbit_position(torch.tensor([0.0, 60.0]), torch.tensor([30.0, 0.0]), 4.0)
    expected = torch.tensor([[4 * math.sqrt(0.75), 2.0, 0.0], [2.0, 0.0, 4 * math.sqrt(0.75)]])
    assert torch.allclose(position, expected, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_every_batch_size_agrees_with_one_camera_at_a_time(batch):
    """A cross product without its axis would run along the batch at batch size 3."""
    stream = torch.Generator().manual_seed(batch)
    position = torch.randn(batch, 3, generator=stream, dtype=torch.float64) + 2.0
    center = 0.3 * torch.randn(batch, 3, generator=stream, dtype=torch.float64)
    up = torch.randn(batch, 3, generator=stream, dtype=torch.float64)
    poses = look_at(position, center, up)
    for index in range(batch):
        expected = reference_pose(position[index].numpy(), center[index].numpy(), up[index].numpy())
        np.testing.assert_allclose(poses[index].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (3, 3)])
def test_rotations_are_proper_and_look_at_the_origin(shape):
    stream = torch.Generator().manual_seed(7)
    elevation_deg = 178.0 * torch.rand(shape, generator=stream, dtype=torch.float64) - 89.0
    azimuth_deg = 720.0 * torch.rand(shape, generator=stream, dtype=torch.float64) - 360.0
    pose = camera_from_orbit(elevation_deg, azimuth_deg, 1.7)
    rotation, position = pose[..., :3, :3], pose[..., :3, 3]
    identity = torch.eye(3, dtype=torch.float64).expand(*shape, 3, 3)
    assert pose.shape == (*shape, 4, 4)
    assert torch.allclose(rotation.transpose(-1, -2) @ rotation, identity, atol=1e-12)
    assert torch.allclose(torch.linalg.det(rotation), torch.ones(shape, dtype=torch.float64))
    # The origin lies on the line of sight, 1.7 in front of the camera.
    assert torch.allclose(position - 1.7 * rotation[..., 2], torch.zeros_like(position), atol=1e-12)
    assert torch.allclose(rotation[..., 2, 0], torch.zeros(shape, dtype=torch.float64), atol=1e-12)
    assert (rotation[..., 2, 1] > 0).all()


def test_orbit_and_look_at_agree_inside_the_open_range():
    elevation_deg = torch.linspace(-89.0, 89.0, 31, dtype=torch.float64)[:, None]
    azimuth_deg = torch.linspace(-180.0, 180.0, 13, dtype=torch.float64)[None, :]
    orbit = camera_from_orbit(elevation_deg, azimuth_deg, 1.3)
    looking = look_at(orbit_position(elevation_deg, azimuth_deg, 1.3))
    assert torch.allclose(orbit, looking, atol=1e-12)


@pytest.mark.parametrize("elevation_deg", [-90.0, 90.0])
def test_orbit_is_continuous_at_the_poles_for_every_azimuth(elevation_deg):
    azimuth_deg = torch.arange(0.0, 360.0, 30.0, dtype=torch.float64)
    near = camera_from_orbit(elevation_deg * (1 - 1e-9), azimuth_deg, 1.0)
    assert torch.allclose(camera_from_orbit(elevation_deg, azimuth_deg, 1.0), near, atol=1e-6)


def test_looking_along_the_up_vector_still_gives_a_rotation():
    pose = look_at(torch.tensor([[0.0, 0.0, 3.0], [0.0, 0.0, -3.0], [2.0, 0.0, 3.0]]))
    rotation = pose[:, :3, :3]
    assert torch.allclose(rotation.mT @ rotation, torch.eye(3).expand(3, 3, 3), atol=1e-6)


def test_length_of_up_does_not_matter():
    position = torch.tensor([[1.0, 2.0, 0.5]])
    up = torch.tensor([[0.1, -0.2, 0.9]])
    assert torch.allclose(look_at(position, up=up), look_at(position, up=50.0 * up), atol=1e-6)


def test_numbers_and_tensors_broadcast_in_the_tensors_type():
    pose = camera_from_orbit(15.0, torch.tensor([0.0, 90.0], dtype=torch.float64), 1)
    assert pose.shape == (2, 4, 4) and pose.dtype == torch.float64
    assert camera_from_orbit(15, 0, 1).dtype == torch.get_default_dtype()
    assert camera_from_orbit(torch.tensor([10, 20]), 0, 1).is_floating_point()


def test_pose_is_differentiable_in_the_angles():
    angles = torch.tensor([20.0, 50.0, 1.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: camera_from_orbit(a[0], a[1], a[2]), (angles,))


def test_wrong_shape_is_refused_with_its_shape():
    with pytest.raises(ValueError, match=r"position has shape \(3, 2\); expected \(\.\.\., 3\)"):
        look_at(torch.zeros(3, 2))
