"""Differences along a known motion, by hand."""

import math

import pytest
import torch

from custom.fourd.metrics.warp_consistency import mean_of, warped_difference

SIZE = 6


def picture(seed=0):
    return torch.rand(1, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))


def test_what_moves_along_the_flow_does_not_differ():
    image = picture()
    shifted = torch.roll(image, 1, dims=2)  # the content moves one pixel to the right
    flow = torch.zeros(1, 2, SIZE, SIZE)
    flow[:, 0] = 1.0
    seen = torch.ones(1, SIZE, SIZE, dtype=torch.bool)
    seen[:, :, -1] = False
    assert float(warped_difference(image, shifted, flow, seen)) == pytest.approx(0, abs=1e-6)
    assert float(warped_difference(image, shifted, 0 * flow, seen)) > 0.1
    # An offset in colour is what is measured.
    assert float(warped_difference(image, shifted + 0.1, flow, seen)) == pytest.approx(
        0.1, abs=1e-5
    )


def test_only_what_both_show_counts():
    seen = torch.zeros(1, SIZE, SIZE, dtype=torch.bool)
    flow, image, other = torch.zeros(1, 2, SIZE, SIZE), picture(), picture()
    other[0, 2, 3] += 0.3
    other[0, 5, 5] += 9.0
    seen[0, 2, 2:4] = True
    assert float(warped_difference(image, other, flow, seen)) == pytest.approx(0.15, abs=1e-6)
    assert math.isnan(float(warped_difference(image, other, flow, ~(seen | ~seen))))


def test_means_leave_out_what_is_unknown():
    assert mean_of([1.0, math.nan, 3.0]) == 2.0 and mean_of([math.nan]) is None
