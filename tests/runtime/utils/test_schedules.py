"""Scheduled scalars, against values worked out by hand."""

import math

import pytest
from omegaconf import OmegaConf
from threestudio.utils.schedules import C, C_max, schedule_points


@pytest.mark.parametrize(
    "schedule, step, expected",
    [
        (0.3, 77, 0.3),
        (5, 77, 5),
        ([1.0, 3.0, 100], 0, 1.0),  # the short form starts at step 0
        ([1.0, 3.0, 100], 25, 1.5),
        ([10, 1.0, 3.0, 110], 5, 1.0),  # constant before
        ([10, 1.0, 3.0, 110], 60, 2.0),
        ([10, 1.0, 3.0, 110], 500, 3.0),  # constant after
        ([100, 7.0, 5.0, 150, 10.0, 200], 100, 7.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 125, 6.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 150, 5.0),
        ([100, 7.0, 5.0, 150, 10.0, 200], 175, 7.5),
        ([100, 7.0, 5.0, 150, 10.0, 200], 999, 10.0),
        ([0, 1.0, 2.0, 10, 4.0, 20, 0.0, 30], 25, 2.0),
        ([0, 0.0, 0.0, 10, 1.0, 10], 9, 0.0),  # equal markers jump, where upstream divides by 0
        ([0, 0.0, 0.0, 10, 1.0, 10], 10, 1.0),
    ],
)
@pytest.mark.parametrize("container", [list, tuple, OmegaConf.create])
def test_value_at_a_step(schedule, step, expected, container):
    value = container(schedule) if isinstance(schedule, list) else schedule
    assert C(value, epoch=0, global_step=step) == pytest.approx(expected)


def test_a_float_end_marker_counts_epochs():
    assert C([0, 0.0, 1.0, 10.0], epoch=5, global_step=1000) == pytest.approx(0.5)
    assert C([0, 0.0, 1.0, 10], epoch=5, global_step=0) == pytest.approx(0.0)


def test_exponential_interpolation_is_linear_in_the_logarithm():
    halfway = C([0, 1.0, 100.0, 10], 0, 5, interpolation="exp")
    assert halfway == pytest.approx(math.sqrt(1.0 * 100.0))


def test_largest_value():
    assert C_max(4) == 4
    assert C_max([0, 0.98, 0.02, 8000]) == 0.98
    assert C_max([100, 7.0, 5.0, 150, 10.0, 200]) == 10.0
    assert C_max([500.0, 3.0, 100]) == 500.0  # a marker is not a value


@pytest.mark.parametrize("items", [[1.0], [1.0, 2.0], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 7]])
def test_a_list_of_another_length_is_refused(items):
    with pytest.raises(ValueError, match=rf"has {len(items)} items; expected \[v0, v1, s1\]"):
        schedule_points(items)


def test_malformed_schedules_are_refused():
    with pytest.raises(ValueError, match="descending markers"):
        C([10, 0.0, 1.0, 5], 0, 0)
    with pytest.raises(ValueError, match="not a number"):
        C([0, "a", 1.0, 5], 0, 0)
    with pytest.raises(ValueError, match="expected a number or a list"):
        C("0.5", 0, 0)
    with pytest.raises(ValueError, match="expected 'linear' or 'exp'"):
        C([0, 0.0, 1.0, 5], 0, 0, interpolation="cubic")
    with pytest.raises(ValueError, match="both values must be positive"):
        C([0, 0.0, 1.0, 5], 0, 0, interpolation="exp")
