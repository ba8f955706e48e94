"""The class vector of cameras: MVDream's sixteen numbers, then ours, by hand and by law."""

import math

import pytest
import torch

from custom.fourd.diffusion.camera_vector import (
    CAMERA_VECTOR_SIZE,
    VIDEO_VECTOR_SIZE,
    camera_and_time,
    camera_vector,
    spin_logit,
    video_class_vector,
)
from custom.fourd.ops.camera import camera_from_orbit


def orbit(elevations, azimuths, distance=2.0):
    elevations, azimuths = (torch.tensor(v, dtype=torch.float64) for v in (elevations, azimuths))
    return camera_from_orbit(elevations, azimuths, torch.tensor(distance).double())


def test_the_published_vector_by_hand():
    """At the front: right is +y, up +z, backward +x, and the position is a unit away."""
    numbers = camera_vector(orbit([0.0], [0.0]), torch.tensor([0.7]).double())
    expected = [[0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(
        numbers.view(4, 4), torch.tensor(expected).double(), atol=1e-7, rtol=0
    )


def test_the_published_vector_is_mvdreams_blender_camera():
    """MVDream builds its cameras by Blender's rule; ours at azimuth a is theirs at a, for its
    dataset's front is at azimuth 90: rotation about z by a + 90, then by 90 - elevation about x."""
    elevations, azimuths = [0.0, 15.0, 30.0], [-40.0, 90.0, 200.0]
    ours = camera_vector(orbit(elevations, azimuths), torch.full((3,), 0.7).double())
    for row, elevation, azimuth in zip(ours, elevations, azimuths):
        e, a = math.radians(90 - elevation), math.radians(azimuth + 90)
        about_x = torch.tensor(
            [[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]]
        ).double()
        about_z = torch.tensor(
            [[math.cos(a), -math.sin(a), 0], [math.sin(a), math.cos(a), 0], [0, 0, 1]]
        ).double()
        rotation = about_z @ about_x
        expected = torch.eye(4).double()
        expected[:3, :3], expected[:3, 3] = rotation, rotation[:, 2]
        torch.testing.assert_close(row.view(4, 4), expected, atol=1e-6, rtol=0)


def test_the_embedded_vector_by_hand():
    fovy = math.radians(40)
    numbers = camera_vector(
        orbit([30.0], [50.0], 3.0), torch.tensor([fovy]).double(), "embedded"
    )[0]
    a, e = math.radians(50), math.radians(30)
    expected = []
    for angle, harmonics in ((a, (1, 2, 3, 4, 6)), (e, (1, 4))):
        for harmonic in harmonics:
            expected += [math.cos(harmonic * angle), math.sin(harmonic * angle)]
    expected += [math.log(3 * math.tan(fovy / 2)), math.log(math.tan(fovy / 2))]
    assert numbers[16:].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["mvdream", "embedded"])
def test_sizes_purity_and_periodicity(kind):
    c2w = orbit([10.0, 10.0, 10.0], [25.0, 385.0, -335.0])
    kept, fovy = c2w.clone(), torch.full((3,), 0.7).double()
    numbers = camera_vector(c2w, fovy, kind)
    assert numbers.shape == (3, CAMERA_VECTOR_SIZE[kind])
    assert torch.equal(c2w, kept), "the input is never written to"
    torch.testing.assert_close(numbers, numbers[:1].expand_as(numbers), atol=1e-6, rtol=0)


def test_what_each_kind_knows_of_distance_and_opening():
    near, far = orbit([10.0], [70.0], 2.0), orbit([10.0], [70.0], 4.0)
    narrow, wide = torch.tensor([0.4]).double(), torch.tensor([0.9]).double()
    torch.testing.assert_close(
        camera_vector(near, narrow), camera_vector(far, wide), atol=1e-7, rtol=0
    )
    change = camera_vector(far, narrow, "embedded") - camera_vector(near, narrow, "embedded")
    assert float(change[0, 30]) == pytest.approx(math.log(2)) and change[0, 31] == 0
    wider = camera_vector(near, wide, "embedded") - camera_vector(near, narrow, "embedded")
    grown = math.log(math.tan(0.45) / math.tan(0.2))
    assert wider[0, 30:].tolist() == pytest.approx([grown, grown])


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="'plucker' is no kind .*expected one of mvdream, embed"):
        camera_vector(orbit([0.0], [0.0]), torch.ones(1), "plucker")


def test_a_frame_is_told_camera_and_time_by_hand():
    fovy, pose = torch.tensor([0.7]).double(), orbit([10.0], [50.0], 3.0)
    numbers = camera_and_time(pose, fovy, torch.tensor([0.3]).double())[0]
    assert torch.equal(numbers[:32], camera_vector(pose, fovy, "embedded")[0])
    turn, azimuth = 2 * math.pi * 0.3, math.radians(50)
    expected = [0.3]
    for harmonic in (1, 2, 3, 4):
        expected += [math.cos(harmonic * turn), math.sin(harmonic * turn)]
    for harmonic in (1, 2, 3, 4, 6):
        expected += [math.cos(harmonic * (azimuth - turn)), math.sin(harmonic * (azimuth - turn))]
    assert numbers[32:].tolist() == pytest.approx(expected, abs=1e-6)


def states_that_spin(*logits: float) -> torch.Tensor:
    states = torch.randn(len(logits), 5, 24, generator=torch.Generator().manual_seed(0)).double()
    states[:, 4, 16] = torch.tensor(logits).double() / 4
    return states


def test_words_times_time_by_hand():
    """Every number of time times every one of sixteen channels of the last token, by two loops."""
    poses, fovy = orbit([10.0, 20.0], [50.0, 60.0]), torch.full((2,), 0.7).double()
    times, states = torch.tensor([0.3, 0.9]).double(), states_that_spin(-1e3, -1e3)
    numbers = video_class_vector(poses, fovy, times, states)
    alone = camera_and_time(poses, fovy, times)
    assert numbers.shape == (2, VIDEO_VECTOR_SIZE) == (2, 355)
    assert torch.equal(numbers[:, :51], alone), "nothing spins: camera and time as they are"
    expected = [
        [float(states[row, 4, channel] * alone[row, 32 + number])
         for channel in range(16) for number in range(19)]
        for row in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(numbers[:, 51:], torch.tensor(expected).double())


def test_harmonics_are_of_the_azimuth_that_a_spinning_object_sees():
    """By hand for all, a third and nothing of the scene spinning; nothing else of 51 differs."""
    poses, fovy = orbit([10.0] * 3, [50.0] * 3), torch.full((3,), 0.7).double()
    times, shares = torch.full((3,), 0.3).double(), (1.0, 1 / 3, 0.0)
    states = states_that_spin(1e3, -math.log(2), -1e3)
    assert torch.sigmoid(spin_logit(states)).tolist() == pytest.approx(shares)
    numbers = video_class_vector(poses, fovy, times, states)
    still, seen = math.radians(50), math.radians(50) - 2 * math.pi * 0.3
    for row, share in enumerate(shares):
        expected = []
        for harmonic in (1, 2, 3, 4, 6):
            for wave in (math.cos, math.sin):
                both = wave(harmonic * seen), wave(harmonic * still)
                expected.append(share * both[0] + (1 - share) * both[1])
        assert numbers[row, 16:26].tolist() == pytest.approx(expected, abs=1e-6)
    alone = camera_and_time(poses, fovy, times)
    assert torch.equal(numbers[:, :16], alone[:, :16])
    assert torch.equal(numbers[:, 26:51], alone[:, 26:])


def test_turning_with_a_spinning_object_keeps_its_azimuth():
    fovy = torch.full((2,), 0.7).double()
    poses = orbit([10.0, 10.0], [50.0, 50.0 + 90.0])
    numbers = camera_and_time(poses, fovy, torch.tensor([0.0, 0.25]).double())
    torch.testing.assert_close(numbers[0, -10:], numbers[1, -10:])
    assert (numbers[0, :41] - numbers[1, :41]).abs().max() > 0.1
