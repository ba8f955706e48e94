"""Curves of motion by hand, by law, and on the world's truth: right, at rest, reversed, half."""

import math

import pytest
import torch

from custom.fourd.metrics.motion import (
    CURVE_OF_MOTION,
    CURVES,
    area_curve,
    best_static_psnr,
    centroid_path,
    clip_psnr,
    compare_curves,
    compare_motions,
    image_change,
)
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from custom.fourd.world.vocabulary import MOTIONS, SHAPES

N_VIEWS, TIMES, SIZE_PX = 4, torch.linspace(0, 1, 8), 24


def film(caption, times=TIMES):
    """Truth of evenly spaced cameras at `times`: rgb and alpha [v t h w c]."""
    azimuths = 360 / N_VIEWS * (torch.arange(N_VIEWS) + 0.25).repeat_interleave(len(times))
    c2w = camera_from_orbit(torch.full_like(azimuths, 15.0), azimuths, 3.0)
    fovy = torch.full_like(azimuths, math.radians(40))
    images = render(parse_caption(caption), c2w, fovy, SIZE_PX, SIZE_PX, times.repeat(N_VIEWS))
    return tuple(part.unflatten(0, (N_VIEWS, len(times))) for part in (images.rgb, images.alpha))


def agreement(caption, times):
    """A scene that plays the truth's poses at other times, against the truth."""
    (motion,) = [item.motion for item in parse_caption(caption).objects if item.motion]
    return compare_motions([motion], *film(caption, times), *film(caption))[motion]


# By hand


def test_centroid_by_hand():
    alpha = torch.zeros(1, 3, 4, 8, 1)
    alpha[0, 0, 0, 7] = 1.0  # the top right corner's pixel
    alpha[0, 1, 1, 2], alpha[0, 1, 3, 2] = 0.75, 0.25
    path = centroid_path(alpha)
    assert path[0, 0].tolist() == [3.5 / 4, -1.5 / 4]
    assert path[0, 1].tolist() == [-1.5 / 4, (-0.5 * 0.75 + 1.5 * 0.25) / 4]
    assert path[0, 2].tolist() == [0, 0], "an empty image is centred"


def test_area_by_hand():
    alpha = torch.zeros(1, 2, 4, 4, 1)
    alpha[0, 1, :2, :2], alpha[0, 1, 3, 3] = 1.0, 0.5
    assert area_curve(alpha).tolist() == [[[0.0], [4.5 / 16]]]


def test_image_change_is_the_mean_colour_of_cells():
    rgb = torch.rand(2, 3, 8, 4, 3, generator=torch.Generator().manual_seed(0))
    cells = image_change(rgb, cells=2).view(2, 3, 3, 2, 2)
    expected = rgb[1, 2, 4:, :2].mean(dim=(0, 1))
    torch.testing.assert_close(cells[1, 2, :, 1, 0], expected)


def test_static_picture_by_hand():
    truth = torch.zeros(1, 2, 2, 2, 1)
    truth[0, 1] = 1.0  # black, then white: the best picture is grey
    assert best_static_psnr(truth)[0].tolist() == pytest.approx([-10 * math.log10(0.25)] * 2)
    assert clip_psnr(truth, truth).tolist() == [[100.0, 100.0]]


# Laws of a comparison


@pytest.fixture
def curve():
    return torch.rand(3, 6, 2, generator=torch.Generator().manual_seed(1))


def test_a_constant_offset_of_a_view_does_not_matter(curve):
    found = compare_curves(curve + torch.tensor([5.0, -2.0, 0.1])[:, None, None], curve)
    assert found.correlation == pytest.approx(1, abs=1e-5)
    assert found.amplitude_ratio == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("factor", "sign"), [(0.5, 1), (2.0, 1), (-0.5, -1)])
def test_amplitude_and_direction_are_told_apart(curve, factor, sign):
    found = compare_curves(factor * curve, curve)
    assert found.correlation == pytest.approx(sign, abs=1e-6)
    assert found.amplitude_ratio == pytest.approx(abs(factor), abs=1e-6)


def test_rest_against_motion_is_zero_even_with_rounding_noise(curve):
    noise = 1e-5 * torch.rand(curve.shape, generator=torch.Generator().manual_seed(2))
    for still in (torch.zeros_like(curve), curve[:, :1].expand_as(curve), 0.3 + noise):
        found = compare_curves(still, curve)
        assert found.correlation == 0 and found.amplitude_ratio < 1e-3


def test_a_truth_at_rest_has_no_answer(curve):
    found = compare_curves(curve, torch.full_like(curve, 0.2))
    assert math.isnan(found.correlation) and math.isnan(found.amplitude_ratio)


def test_a_view_counts_by_how_much_moves_in_it():
    """Two views of a straight motion, the second along it: its noise is no mistake of the scene."""
    truth = torch.stack([torch.linspace(-1, 1, 5), torch.zeros(5)]).unsqueeze(-1)
    ours = truth.clone()
    ours[1, :, 0] = 0.05 * torch.tensor([1.0, -1, 1, -1, 1])
    assert compare_curves(ours, truth).correlation > 0.99
    assert math.isnan(compare_curves(ours[1:], truth[1:]).correlation)


def test_correlation_is_pearsons(curve):
    other = torch.rand(1, 40, 1, generator=torch.Generator().manual_seed(3))
    truth = torch.rand(1, 40, 1, generator=torch.Generator().manual_seed(4))
    expected = torch.corrcoef(torch.stack([other.flatten(), truth.flatten()]))[0, 1]
    assert compare_curves(other, truth).correlation == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("shape", [(3, 5, 2), (3, 6, 1)])
def test_curves_of_different_times_are_refused(curve, shape):
    with pytest.raises(ValueError, match=r"expected the same \(views, times, values\)"):
        compare_curves(torch.zeros(shape), curve)


def test_a_single_time_is_refused(curve):
    with pytest.raises(ValueError, match="at least 2 times. Render both at the same times"):
        compare_curves(curve[:, :1], curve[:, :1])


# On the world's truth


def test_every_motion_word_has_a_curve():
    assert set(CURVE_OF_MOTION) == set(MOTIONS) and set(CURVE_OF_MOTION.values()) == set(CURVES)


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_truth_agrees_with_itself_and_rest_does_not(motion):
    caption = f"a red cube {motion}"
    right = agreement(caption, TIMES)
    assert right.correlation == pytest.approx(1, abs=1e-6)
    assert right.amplitude_ratio == pytest.approx(1, abs=1e-6)
    still = agreement(caption, torch.zeros_like(TIMES))
    assert still.correlation == 0 and still.amplitude_ratio == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("motion", ["sliding", "growing", "shrinking"])
def test_a_reversed_motion_is_negative(motion):
    found = agreement(f"a blue sphere {motion}", 1 - TIMES)
    assert found.correlation < -0.9
    assert found.amplitude_ratio == pytest.approx(1, abs=1e-4)


def test_an_orbit_the_other_way_round_is_told_from_the_right_one():
    """Half of the path is shared, its other half is negative."""
    assert abs(agreement("a blue sphere orbiting", 1 - TIMES).correlation) < 0.4


@pytest.mark.parametrize("motion", ["sliding", "bouncing"])
def test_half_of_the_way_is_half_of_the_amplitude(motion):
    turn = torch.sin(2 * math.pi * TIMES)
    way = turn * 0.5 if motion == "sliding" else turn * math.sqrt(0.5)
    found = agreement(f"a small green sphere {motion}", torch.asin(way) / (2 * math.pi) % 1)
    assert found.correlation > 0.99
    assert found.amplitude_ratio == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_spin_is_told_from_its_reverse_and_from_another_speed(shape):
    caption = f"a red {shape} spinning"
    assert agreement(caption, 1 - TIMES).correlation < 0.25
    assert agreement(caption, TIMES / 2).correlation < 0.25


def test_a_blurred_spin_is_still_right():
    """What distillation does to edges is no mistake of the motion."""
    rgb, alpha = film("a yellow cube spinning")
    flat = rgb.flatten(0, 1).movedim(-1, 1)
    soft = torch.nn.functional.avg_pool2d(flat, 3, 1, 1, count_include_pad=False)
    found = compare_motions(
        ["spinning"], soft.movedim(1, -1).view_as(rgb), alpha, rgb, alpha
    )["spinning"]
    assert found.correlation > 0.85 and 0.6 < found.amplitude_ratio < 1


def test_no_other_static_picture_is_better():
    truth = film("a red cube orbiting")[0]
    best = best_static_psnr(truth)
    error = 10 ** (-best / 10)
    for other in (truth[:, :1], truth.mean(dim=1, keepdim=True) + 0.01, truth.median(1, True)[0]):
        theirs = 10 ** (-clip_psnr(other.expand_as(truth), truth) / 10)
        assert (error.mean(dim=1) <= theirs.mean(dim=1) + 1e-7).all()
    assert (best_static_psnr(truth[:, :1].expand_as(truth)) == 100).all()
