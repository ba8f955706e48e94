"""Which frames an edited scene is compared in, and what is written beside the truth."""

import pytest

from custom.fourd.systems.edit_evaluation import (
    MAX_PAIRS,
    _beside,
    _neighbours_in_time,
    _neighbours_in_view,
    _spread,
)
from tests.fixtures.edited_scenes import hand_made_scene


def test_pairs_in_time_are_of_one_camera():
    frames = hand_made_scene(3, 4)
    pairs = list(_neighbours_in_time(frames, [0, 1, 2, 3, 8, 9]))
    assert pairs == [(0, 1), (1, 2), (2, 3), (8, 9)]


def test_pairs_between_cameras_are_of_one_time_and_near():
    frames = hand_made_scene(3, 4)
    # Cameras stand in a row: the middle one is nearest to both others.
    assert list(_neighbours_in_view(frames, [0, 3, 8])) == [(0, 4), (3, 7), (8, 4)]
    assert list(_neighbours_in_view(hand_made_scene(1, 4), [0, 1])) == []


def test_many_pairs_are_thinned_evenly():
    assert _spread(list(range(5))) == [0, 1, 2, 3, 4]
    found = _spread(list(range(1000)))
    assert len(found) == MAX_PAIRS and (found[0], found[-1]) == (0, 999)


def test_figures_and_their_ratio():
    assert _beside("x", 3.0, 2.0, "truth") == {"x": 3.0, "x_truth": 2.0, "x_ratio": 1.5}
    assert _beside("x", None, 2.0, "truth")["x_ratio"] is None
    assert _beside("x", 3.0, 0.0, "truth")["x_ratio"] is None


@pytest.mark.parametrize("name", ["truth", "edit_buffer"])
def test_nothing_is_known_of_a_system_that_did_not_begin(name):
    from custom.fourd.systems.instruct4d_system import Instruct4dSystem

    assert getattr(Instruct4dSystem, name) is None
