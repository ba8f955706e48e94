"""Scheduled scalars beyond the contract's: tuples, the largest value, and what is refused."""

import pytest
from threestudio.utils.schedules import C, C_max, schedule_points


def test_a_tuple_is_a_schedule_too():
    assert C((10, 1.0, 3.0, 110), epoch=0, global_step=60) == pytest.approx(2.0)


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
