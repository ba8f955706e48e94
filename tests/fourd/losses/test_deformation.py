"""Squared total variation of a rendered displacement, by hand."""

import pytest
import torch

from custom.fourd.losses.deformation import deformation_loss


def test_each_axis_by_hand():
    """3 x (differences) / 3 channels, one axis at a time."""
    still = torch.full((2, 2, 2, 3), 0.7)
    assert deformation_loss(still) == 0
    moved = still.clone()
    moved[1] += 0.5  # four pixels, three channels, one step in time
    assert deformation_loss(moved).item() == pytest.approx(3 * (4 * 3 * 0.25) / 3)
    row = still.clone()
    row[:, 1, :, 0] += 2.0  # two frames, two columns, one channel
    assert deformation_loss(row).item() == pytest.approx(3 * (2 * 2 * 4.0) / 3)
    corner = torch.zeros(2, 2, 2, 3)
    corner[0, 0, 0, 2] = 1.0  # one difference along each of the three axes
    assert deformation_loss(corner).item() == pytest.approx(3 * 3 / 3)


def test_clips_are_averaged_and_not_compared():
    stream = torch.Generator().manual_seed(1)
    clips = torch.randn(2, 3, 4, 5, 3, generator=stream)
    one, other = deformation_loss(clips[0]), deformation_loss(clips[1])
    both = deformation_loss(clips.flatten(0, 1), num_frames=3)
    torch.testing.assert_close(both, (one + other) / 2)
    assert deformation_loss(clips[:, :1].flatten(0, 1), 1) < both


def test_the_gradient_is_that_of_differences():
    deformation = torch.randn(3, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(deformation_loss, (deformation,))


def test_frames_must_be_whole_clips():
    with pytest.raises(ValueError, match="deformation has 5 frames; expected a multiple of"):
        deformation_loss(torch.zeros(5, 2, 2, 3), 4)
