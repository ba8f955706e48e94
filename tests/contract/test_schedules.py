"""Scheduled scalars: section 1.5, every form and marker, by hand."""

import math

import pytest
from omegaconf import OmegaConf
from threestudio.utils.misc import C


@pytest.mark.parametrize("value", [3, 0.25, -1.0])
def test_a_number_is_itself(value):
    assert C(value, 5, 100) == value


@pytest.mark.parametrize(
    ("schedule", "step", "value"),
    [
        # Three items start at 0.
        ([1.0, 3.0, 10], 0, 1.0),
        ([1.0, 3.0, 10], 5, 2.0),
        ([1.0, 3.0, 10], 99, 3.0),
        # Four items: constant before the first and after the last marker.
        ([100, 0.98, 0.02, 200], 50, 0.98),
        ([100, 0.98, 0.02, 200], 125, 0.74),
        ([100, 0.98, 0.02, 200], 200, 0.02),
        ([100, 0.98, 0.02, 200], 10**6, 0.02),
        # Six: through (100, 7), (150, 5), (200, 10).
        ([100, 7.0, 5.0, 150, 10.0, 200], 0, 7.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 125, 6.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 150, 5.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 160, 6.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 300, 10.0),
        # Eight: through (0, 0), (10, 1), (20, 0), (40, 4).
        ([0, 0.0, 1.0, 10, 0.0, 20, 4.0, 40], 5, 0.5),
        ([0, 0.0, 1.0, 10, 0.0, 20, 4.0, 40], 15, 0.5),
        ([0, 0.0, 1.0, 10, 0.0, 20, 4.0, 40], 25, 1.0),
        ([0, 0.0, 1.0, 10, 0.0, 20, 4.0, 40], 40, 4.0),
    ],
)
def test_value_at_a_step(schedule, step, value):
    assert C(OmegaConf.create(schedule), 0, step) == pytest.approx(value)
    assert C(schedule, 0, step) == pytest.approx(value)  # upstream wants OmegaConf's list


def test_an_int_marker_counts_steps_and_a_float_marker_epochs():
    in_steps, in_epochs = OmegaConf.create([0, 0.0, 1.0, 10]), OmegaConf.create([0, 0.0, 1.0, 10.0])
    assert C(in_steps, epoch=5, global_step=2) == pytest.approx(0.2)
    assert C(in_epochs, epoch=5, global_step=2) == pytest.approx(0.5)
    # The epoch of an endless dataset stays 0, and so does the schedule.
    assert C(in_epochs, epoch=0, global_step=10**6) == 0.0


def test_exponential_interpolation_is_linear_in_the_logarithm():
    schedule = OmegaConf.create([0, 1.0, 100.0, 10])
    assert C(schedule, 0, 5, interpolation="exp") == pytest.approx(10.0)
    assert C(schedule, 0, 2, interpolation="exp") == pytest.approx(math.exp(0.2 * math.log(100)))


@pytest.mark.parametrize("schedule", [[1.0], [1.0, 2.0], [0, 1.0, 2.0, 3, 4.0]])
def test_other_lengths_are_refused(schedule):
    with pytest.raises((ValueError, AssertionError)):
        C(OmegaConf.create(schedule), 0, 0)


def test_equal_markers_and_odd_tails_do_not_pass_unnoticed():
    """Upstream divides by zero at the first and ignores the tail of the second."""
    jump = OmegaConf.create([0, 1.0, 1.0, 10, 5.0, 10])
    assert C(jump, 0, 9) == 1.0 and C(jump, 0, 10) == 5.0
    with pytest.raises(ValueError, match="7 items"):
        C(OmegaConf.create([0, 1.0, 2.0, 10, 5.0, 20, 6.0]), 0, 0)
