"""What is trained on and what is scored: disjoint, far apart, and the same in every run."""

import functools
import itertools
import math

import pytest
import torch
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.data.pair_cells import CellSource, orbit_cameras, scene_times
from custom.fourd.data.pair_sampling import KINDS
from custom.fourd.data.pair_split import (
    PROTOCOLS,
    SplitOptions,
    scored_pairs,
    split_cells,
    union,
)


class Places(CellSource):
    """A scene without pictures."""

    def __init__(self, n_times=16, n_azimuths=16, elevations=(15.0,), start_deg=0.0):
        azimuths = [start_deg + 360.0 * place / n_azimuths for place in range(n_azimuths)]
        cameras = orbit_cameras(list(elevations), azimuths, 3.0, 40.0)
        super().__init__("scene", "", scene_times(n_times, False), cameras, 4, 4)

    def read_cell(self, time_id, camera_id):
        raise AssertionError("nothing is rendered to split a scene")


def rows(choice):
    return torch.stack(list(vars(choice).values()), dim=-1).tolist()


def test_even_frames_and_three_quarters_of_the_azimuths_are_trained_on():
    split = split_cells(Places(), SplitOptions())
    assert split.train_times == [0, 2, 4, 6, 8, 10, 12, 14]
    assert split.held_out_times == [1, 3, 5, 7, 9, 11, 13, 15]
    # The front is trained on; 45, 135, 225 and 315 degrees are not.
    assert split.held_out_cameras == [2, 6, 10, 14] and len(split.train_cameras) == 12
    cells = split.train_cells(Places().cameras, even=False)
    assert len(cells.time_pairs) == 8 * 7 and len(cells.view_pairs) == 12 * 11


def test_an_azimuth_is_held_out_at_every_elevation_wherever_the_list_begins():
    split = split_cells(Places(4, 8, elevations=(0.0, 30.0)), SplitOptions())
    assert split.held_out_cameras == [2, 6, 10, 14]
    # The same cameras listed from -90 degrees: 0 degrees is now the third of them.
    turned = split_cells(Places(4, 8, start_deg=-90.0), SplitOptions())
    assert turned.held_out_cameras == [0, 4]


@pytest.mark.parametrize(
    "keys, times, cameras",
    [
        ({"train_every_time": 1, "hold_out_azimuth_every": 0}, 0, 0),
        ({"train_every_time": 4, "hold_out_azimuth_every": 2}, 12, 8),
        ({"train_every_time": 3}, 10, 4),
    ],
)
def test_the_split_is_configurable(keys, times, cameras):
    split = split_cells(Places(), SplitOptions(**keys))
    assert (len(split.held_out_times), len(split.held_out_cameras)) == (times, cameras)
    assert len(split.train_times) + times == 16 and len(split.train_cameras) + cameras == 16


def test_a_single_camera_is_never_held_out():
    split = split_cells(Places(4, 1), SplitOptions(hold_out_azimuth_every=2))
    assert split.train_cameras == [0] and split.held_out_cameras == []
    split = split_cells(Places(1, 4), SplitOptions())
    assert split.train_times == [0] and split.held_out_times == []


@functools.cache
def brute_force(protocol, n=16):
    """All pairs as the requirement words them, on integers alone."""
    train_t, train_c = set(range(0, n, 2)), {c for c in range(n) if c % 4 != 2}
    found = []
    for i, j, a, b in itertools.product(range(n), repeat=4):
        if i not in train_t or a not in train_c:
            continue
        moves_time, moves_view = protocol in ("time", "both"), protocol in ("view", "both")
        turn = min(abs(a - b), n - abs(a - b)) * 360 / n
        time_ok = j not in train_t and abs(i - j) >= 4 if moves_time else i == j
        view_ok = b not in train_c and turn >= 45 if moves_view else a == b
        if time_ok and view_ok:
            found.append([5, KINDS.index(protocol), i, j, a, b])
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scored_pairs_are_all_unseen_ones_far_enough(protocol):
    split = split_cells(Places(), SplitOptions())
    choice = scored_pairs(Places(), split, SplitOptions(), 5, protocol, 0)
    assert rows(choice) == brute_force(protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_few_of_them_are_spread_over_the_distances(protocol):
    source, options = Places(), SplitOptions()
    split = split_cells(source, options)
    some = rows(scored_pairs(source, split, options, 5, protocol, 16))
    assert 13 <= len(some) <= 16 and all(row in brute_force(protocol) for row in some)
    times = {abs(row[2] - row[3]) for row in some}
    if protocol != "view":
        assert min(times) <= 5 and max(times) >= 11
    set_experiment_seed(77)
    try:
        assert rows(scored_pairs(source, split, options, 5, protocol, 16)) == some
    finally:
        set_experiment_seed(0)
    assert rows(scored_pairs(source, split, options, 6, protocol, 16)) != some


def test_gaps_are_those_of_the_options():
    options = SplitOptions(min_time_gap=0.75, min_angle_deg=180.0, hold_out_azimuth_every=2)
    split = split_cells(Places(), options)
    far = rows(scored_pairs(Places(), split, options, 0, "time", 0))
    assert {abs(row[2] - row[3]) for row in far} == {13, 15}
    # Held out are the odd azimuths, and what lies opposite an even one is even.
    assert rows(scored_pairs(Places(), split, options, 0, "view", 0)) == []


def test_a_video_is_scored_in_time_alone():
    source = Places(9, 1)
    split = split_cells(source, SplitOptions())
    found = {p: len(scored_pairs(source, split, SplitOptions(), 0, p, 0)) for p in PROTOCOLS}
    # Of 5 x 4 pairs, those at least 9 / 4 apart, so 3, 5 or 7: (0,3) (0,5) (0,7) (2,5) (2,7) (4,1)
    # (4,7) (6,1) (6,3) (8,1) (8,3) (8,5).
    assert found == {"time": 12, "view": 0, "both": 0}


def test_a_long_video_is_split_without_a_list_of_its_pairs():
    source = Places(1000, 1)
    choice = scored_pairs(source, split_cells(source, SplitOptions()), SplitOptions(), 0, "time", 8)
    assert len(choice) == 8
    gaps = (source.frame_times[choice.frame_i] - source.frame_times[choice.frame_j]).abs()
    assert float(gaps.min()) >= 0.25 and math.isfinite(float(gaps.max()))


def test_choices_are_joined_in_order():
    source, options = Places(), SplitOptions()
    split = split_cells(source, options)
    parts = [scored_pairs(source, split, options, 0, protocol, 3) for protocol in PROTOCOLS]
    joined = union(parts)
    assert len(joined) == sum(map(len, parts)) and rows(joined)[0] == rows(parts[0])[0]
    assert joined.kind.tolist() == sorted(joined.kind.tolist())
