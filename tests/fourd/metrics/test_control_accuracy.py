"""Which time and view an image shows, on scenes that are written down by hand."""

import math

import pytest
import torch

from custom.fourd.metrics.control_accuracy import (
    Candidates,
    azimuth_gaps_deg,
    followed,
    frame_gaps,
    pixel_features,
    reversal,
)


def bar(column, size=16, width=2):
    """A white bar on black, `width` pixels wide."""
    image = torch.zeros(size, size, 3)
    image[:, column : column + width] = 1.0
    return image


def candidates(columns, gaps):
    rgb = torch.stack([bar(column) for column in columns])
    return Candidates.of(rgb, pixel_features(rgb), gaps)


def features_of(column):
    return pixel_features(bar(column)[None])[0]


def test_frames_between_times_by_hand():
    times = torch.arange(4) / 4
    assert frame_gaps(times).tolist() == [[0, 1, 2, 3], [1, 0, 1, 2], [2, 1, 0, 1], [3, 2, 1, 0]]
    around = frame_gaps(times, loops=True)
    assert around[0].tolist() == [0, 1, 2, 1]
    ends_at_one = torch.linspace(0, 1, 5)
    assert frame_gaps(ends_at_one, loops=True)[0].tolist() == [0, 1, 2, 1, 0]
    assert frame_gaps(torch.zeros(1)).tolist() == [[0]]


def test_angles_go_the_short_way():
    gaps = azimuth_gaps_deg(torch.tensor([0.0, 90.0, 350.0, 710.0]))
    assert gaps[0].tolist() == [0, 90, 10, 10]
    assert gaps[1, 2] == 100


def test_features_are_means_of_squares():
    image = torch.zeros(1, 32, 32, 3)
    image[0, :2, :2, 0] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = pixel_features(image)
    assert found.shape == (1, 16 * 16 * 3)
    assert found[0, 0] == 0.5 and found.sum() == 0.5


def test_the_nearest_true_image_is_what_an_image_shows():
    moving = candidates([0, 3, 6, 9], frame_gaps(torch.arange(4) / 4))
    assert moving.find(features_of(6), requested=2) == (2, 0)
    assert moving.find(features_of(7), requested=0) == (2, 2)
    assert moving.find(features_of(0) * 0.8, requested=3) == (0, 3)


def test_moments_that_look_alike_count_as_one():
    """Up and down again: what is nearest to the second image may as well be the fourth."""
    swinging = candidates([0, 3, 6, 3], frame_gaps(torch.arange(4) / 4))
    assert swinging.look_alike[1].tolist() == [False, True, False, True]
    assert swinging.find(features_of(3), requested=3) == (3, 0)
    assert swinging.find(features_of(3), requested=2) == (1, 1)
    assert swinging.find(features_of(6), requested=3) == (2, 1)


def test_images_differ_from_one_step_of_eight_bits_on():
    rgb = torch.full((3, 8, 8, 3), 0.5)
    rgb[1] += 0.9 / 255
    rgb[2] += 1.2 / 255
    found = Candidates.of(rgb, pixel_features(rgb, 4), frame_gaps(torch.arange(3.0))).look_alike
    assert found[0].tolist() == [True, True, False]


def test_sizes_that_disagree_are_refused():
    with pytest.raises(ValueError, match="3 images, 3 features and 4 gaps; expected one of each"):
        candidates([0, 1, 2], frame_gaps(torch.arange(4.0)))


def test_correlation_by_hand():
    assert followed([0, 1, 2], [1, 3, 5]) == pytest.approx(1.0)
    assert followed([0, 1, 2], [2, 1, 0]) == pytest.approx(-1.0)
    # Pearson of (0, 1, 2, 3) and (0, 2, 1, 3): 4 / 5.
    assert followed([0, 1, 2, 3], [0, 2, 1, 3]) == pytest.approx(0.8)
    assert followed([0, 1, 2], [1, 1, 1]) is None


def test_angles_are_compared_around_the_circle():
    requested = [350.0, 10.0, 180.0]
    assert followed(requested, [355.0, 15.0, 185.0], period=360.0) > 0.98
    assert followed(requested, [-10.0, 370.0, 180.0], period=360.0) == pytest.approx(1.0)
    assert followed([0.0, 180.0], [180.0, 0.0], period=360.0) == pytest.approx(-1.0)


def test_a_turned_sign_must_turn_the_change():
    left, right = features_of(0)[None], features_of(9)[None]
    exact = reversal(right, left, right, left)
    assert (exact.correlation, exact.share) == (pytest.approx(1.0), 1.0)
    against = reversal(left, right, right, left)
    assert (against.correlation, against.share) == (pytest.approx(-1.0), 0.0)
    asleep = reversal(left, left, right, left)
    assert (asleep.correlation, asleep.share) == (0.0, 0.0)
    assert reversal(right, left, left, left) is None


def test_a_half_hearted_reversal_is_between():
    """One of two probes reacts: the correlation is 1 / sqrt 2 by Pythagoras."""
    left, right = features_of(0)[None], features_of(9)[None]
    true = torch.cat([right, right]), torch.cat([left, left])
    found = reversal(torch.cat([right, left]), torch.cat([left, left]), *true)
    assert found.correlation == pytest.approx(math.sqrt(0.5))
    assert found.share == 0.5
