"""Which pairs are drawn: uniform, spread over the distances, the same on any number of ranks."""

from collections import Counter

import pytest
import torch
from threestudio.data.camera_sampling import ItemSpan
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.data.pair_cells import orbit_cameras, view_gaps_deg
from custom.fourd.data.pair_sampling import (
    KINDS,
    PairChoice,
    PairSampler,
    TimePairs,
    TrainCells,
    ViewPairs,
    step_quantiles,
)

MIX = {"time": 0.35, "view": 0.35, "both": 0.25, "identity": 0.05}


def train_cells(n_times=8, n_cameras=12, even=False):
    azimuths = [360.0 * place / n_cameras for place in range(n_cameras)]
    gaps = view_gaps_deg(orbit_cameras([15.0], azimuths, 3.0, 40.0))
    # Places as a split leaves them: every second time, cameras from the fifth on.
    times = list(range(0, 2 * n_times, 2))
    cameras = list(range(5, 5 + n_cameras))
    return TrainCells(times, cameras, TimePairs(n_times, even), ViewPairs(gaps, even))


def span(step=0, count=100, first=0, total=None):
    return ItemSpan(step, first, count, total or count)


def columns(choice):
    return torch.stack(list(vars(choice).values()), dim=-1).tolist()


def middles(n):
    return [(place + 0.5) / n for place in range(n)]


@pytest.fixture(autouse=True)
def seed():
    set_experiment_seed(3)
    yield
    set_experiment_seed(0)


def test_quantiles_address_every_ordered_pair_once_nearest_first():
    pairs = TimePairs(5)
    found = [pairs.at(q) for q in middles(20)]
    assert sorted(found) == [(i, j) for i in range(5) for j in range(5) if i != j]
    gaps = [abs(i - j) for i, j in found]
    assert gaps == sorted(gaps) and len(pairs) == 20
    assert pairs.at(0.0) == (0, 1) and pairs.at(1 - 1e-12) == (4, 0)


def test_quantiles_address_every_ordered_pair_of_cameras_once_nearest_first():
    gaps = torch.tensor([[0.0, 30, 90], [30, 0, 60], [90, 60, 0]])
    pairs = ViewPairs(gaps)
    found = [pairs.at(q) for q in middles(6)]
    assert [{i, j} for i, j in found] == [{0, 1}, {0, 1}, {1, 2}, {1, 2}, {0, 2}, {0, 2}]
    assert len(set(found)) == 6 and len(pairs) == 6


def test_even_distances_share_the_draws_alike():
    """Of 5 times the distance 4 has 2 of 20 pairs, but a quarter of the draws."""
    counts = Counter(abs(i - j) for i, j in map(TimePairs(5, even=True).at, middles(400)))
    assert counts == {1: 100, 2: 100, 3: 100, 4: 100}
    gaps = torch.tensor([[0.0, 30, 90], [30, 0, 30], [90, 30, 0]])
    views = Counter(map(ViewPairs(gaps, even=True).at, middles(400)))
    assert views[(0, 2)] == views[(2, 0)] == 100 and views[(0, 1)] == 50


def test_a_single_time_or_camera_has_no_pairs():
    assert len(TimePairs(1)) == 0 and len(ViewPairs(torch.zeros(1, 1))) == 0


def test_a_step_has_the_mix_exactly_and_pairs_of_every_kind_differ_as_they_should():
    choice = PairSampler([train_cells()], MIX).draw(span())
    kinds = Counter(KINDS[kind] for kind in choice.kind.tolist())
    assert kinds == {"time": 35, "view": 35, "both": 25, "identity": 5}
    for _, kind, i, j, a, b in columns(choice):
        assert (i != j) == (KINDS[kind] in ("time", "both"))
        assert (a != b) == (KINDS[kind] in ("view", "both"))


def test_draws_stay_among_the_cells_of_training():
    cells = train_cells(4, 3)
    choice = PairSampler([cells], MIX).draw(span(count=300))
    assert set(choice.frame_i.tolist()) | set(choice.frame_j.tolist()) == set(cells.times)
    assert set(choice.camera_a.tolist()) | set(choice.camera_b.tolist()) == set(cells.cameras)


def test_pairs_in_time_are_uniform_in_direction_and_place():
    """The reference implementation drew its conditions early: P(d > 0) 0.64, mean index 61."""
    sampler = PairSampler([train_cells()], {**MIX, "time": 1, "view": 0, "both": 0, "identity": 0})
    counts = Counter()
    for step in range(12):
        choice = sampler.draw(span(step, 56))
        # 56 ordered pairs of 8 times, and one draw in each part of [0, 1): each comes once.
        pairs = list(zip(choice.frame_i.tolist(), choice.frame_j.tolist(), strict=True))
        assert len(set(pairs)) == 56
        counts.update(choice.camera_a.tolist())
    assert len(counts) == 12 and max(counts.values()) < 2 * min(counts.values())


def test_a_small_step_reaches_far_and_near():
    sampler = PairSampler([train_cells()], {**MIX, "time": 1, "view": 0, "both": 0, "identity": 0})
    for step in range(20):
        choice = sampler.draw(span(step, 8))
        gaps = (choice.frame_j - choice.frame_i).abs() // 2
        # Of 56 pairs, 26 have gaps 1 and 2, and 12 have 5 to 7.
        assert int((gaps <= 2).sum()) in (3, 4) and int((gaps >= 5).sum()) in (1, 2)


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_share_the_step_of_one_process(n_ranks):
    sampler = PairSampler([train_cells(), train_cells(3, 5)], MIX, 0.1)
    whole = columns(sampler.draw(span(7, 24)))
    count = 24 // n_ranks
    parts = [sampler.draw(span(7, count, rank * count, 24)) for rank in range(n_ranks)]
    assert [row for part in parts for row in columns(part)] == whole


def test_steps_and_seeds_differ_and_repeat():
    sampler = PairSampler([train_cells()], MIX)
    first = columns(sampler.draw(span(1)))
    assert columns(sampler.draw(span(1))) == first != columns(sampler.draw(span(2)))
    set_experiment_seed(4)
    assert columns(sampler.draw(span(1))) != first


def test_scenes_share_a_step_alike():
    choice = PairSampler([train_cells()] * 4, MIX).draw(span(count=8))
    assert Counter(choice.scene.tolist()) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_video_shows_what_it_can_in_the_same_ratio():
    assert train_cells(8, 1).shares(MIX).tolist() == pytest.approx([0.875, 0, 0, 0.125])
    assert train_cells(1, 8).shares(MIX).tolist() == pytest.approx([0, 0.875, 0, 0.125])
    assert train_cells().shares(MIX).tolist() == pytest.approx([0.35, 0.35, 0.25, 0.05])
    choice = PairSampler([train_cells(8, 1)], MIX).draw(span(count=40))
    assert Counter(choice.kind.tolist()) == {0: 35, 3: 5}


def test_a_scene_without_any_kind_of_the_mix_is_refused():
    mix = {"time": 0.0, "view": 1.0, "both": 1.0, "identity": 0.0}
    with pytest.raises(ValueError, match=r"8 training times and 1 training cameras, and data\.mix"):
        PairSampler([train_cells(8, 1)], mix)


def test_single_pictures_come_from_scenes_that_are_one():
    scenes = [train_cells(), train_cells(1, 1), train_cells(1, 1)]
    choice = PairSampler(scenes, MIX, 0.1).draw(span())
    single = [row for row in columns(choice) if KINDS[row[1]] == "single"]
    assert len(single) == 10 and {row[0] for row in single} == {1, 2}
    assert all(i == j and a == b for _, _, i, j, a, b in single)
    assert {row[0] for row in columns(choice) if row not in single} == {0}
    without = PairSampler([train_cells()], MIX, 0.1).draw(span())
    assert Counter(without.kind.tolist())[KINDS.index("single")] == 10
    only = PairSampler([train_cells(1, 1)], MIX).draw(span(count=4))
    assert {KINDS[kind] for kind in only.kind.tolist()} == {"single"}


def test_quantiles_of_a_step_lie_one_in_each_part():
    drawn = step_quantiles(span(count=10), "pair-time")
    assert sorted(int(value * 10) for value in drawn) == list(range(10))
    assert step_quantiles(span(count=10), "pair-view") != drawn


def test_a_choice_is_made_of_rows():
    choice = PairChoice.of_rows([(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)])
    assert choice.frame_j.tolist() == [3, 9] and len(choice) == 2
    assert len(PairChoice.of_rows([])) == 0
