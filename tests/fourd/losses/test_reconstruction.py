"""Losses of a field fitted to videos, by hand."""

import math

import pytest
import torch

from custom.fourd.losses.reconstruction import (
    color_loss,
    space_variation_loss,
    surface_variation_loss,
    time_variation_loss,
)


def test_colours_by_hand():
    rgb, seen = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.3, 0.5, 0.6]])
    assert color_loss(rgb, seen) == pytest.approx((0.09 + 0.0 + 0.16) / 3)
    eps = 1e-3
    expected = (math.sqrt(0.09 + eps**2) + math.sqrt(0.16 + eps**2) - 2 * eps) / 3
    assert color_loss(rgb, seen, "charbonnier") == pytest.approx(expected, abs=1e-6)
    assert color_loss(seen, seen, "charbonnier") == pytest.approx(0.0, abs=1e-7)


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="color_loss is 'l1'; expected one of mse, charbonnier"):
        color_loss(torch.zeros(1, 3), torch.zeros(1, 3), "l1")


def linear(points, frame_times):
    """2 x + 5 t: its variation is known."""
    return 2 * points[:, :1] + 5 * frame_times[:, None]


def test_variation_of_a_linear_field():
    points, times = torch.zeros(3, 3), torch.tensor([0.0, 0.5, 1.0])
    offsets = torch.tensor([[0.1, 9.0, 0.0], [-0.3, 0.0, 9.0], [0.0, 0.0, 0.0]])
    space = space_variation_loss(linear, points, times, offsets)
    assert space == pytest.approx(2 * (0.1 + 0.3) / 3)
    # At the end of time the step goes backwards; nothing is asked for outside [0, 1].
    assert time_variation_loss(linear, points, times, 0.2) == pytest.approx(1.0)
    # A step of 0.7 from 0.5 leaves [0, 1] on both sides: it ends at 0, as far as there is time.
    assert time_variation_loss(linear, points, times, 0.7) == pytest.approx(
        5 * (0.7 + 0.5 + 0.7) / 3
    )


def test_variation_on_surfaces_counts_pairs_by_their_weights():
    rgb = torch.tensor([[0.1, 0.2, 0.3], [1.0, 1.0, 1.0], [0.5, 0.5, 0.5]])
    beside = torch.tensor([[0.4, 0.2, 0.0], [0.0, 0.0, 0.0], [0.8, 0.5, 0.5]])
    loss = surface_variation_loss(rgb, beside, torch.tensor([1.0, 0.0, 0.5]))
    assert float(loss) == pytest.approx((0.2 + 0.5 * 0.1) / 1.5)
    assert float(surface_variation_loss(rgb, beside, torch.zeros(3))) == 0.0
