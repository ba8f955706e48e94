"""When items run: the gate, the pace, the end, and who edits which camera."""

import pytest

from custom.fourd.editing.options import edit_options
from custom.fourd.editing.plan import Window, make_plan
from custom.fourd.editing.schedule import deal, make_schedule, steps_needed

FRAMES = [(camera, time) for camera in range(4) for time in range(10)]


def made(max_steps=100, n_ranks=1, **keys):
    options = edit_options({"warm_up_steps": 2, "sequence_length": 2, **keys})
    plan = make_plan(options, FRAMES)
    return plan, options, make_schedule(plan, options, max_steps, n_ranks)


def test_every_item_runs_once_in_the_order_of_the_plan():
    plan, _, schedule = made()
    assert [item for turn in schedule for item in turn.items()] == list(plan.items)
    steps = [turn.step for turn in schedule]
    assert steps == sorted(steps)


def test_key_times_come_before_training_and_windows_are_spread_over_it():
    # 2 rounds and 1 painting; then 4 cameras x 5 windows, 100 steps: one each 5 steps.
    _, _, schedule = made()
    assert [turn.step for turn in schedule] == [0, 0, 0, *range(0, 100, 5)]
    _, _, schedule = made(turn_interval_steps=2, items_per_turn=4)
    assert [turn.step for turn in schedule] == [0, 0, 0, 0, 2, 4, 6, 8]
    assert [len(turn.items()) for turn in schedule] == [1, 1, 1, 4, 4, 4, 4, 4]


@pytest.mark.parametrize(("fraction", "frames"), [(0.5, 20), (0.99, 40), (1.0, 40)])
def test_training_waits_for_a_share_of_the_frames(fraction, frames):
    _, _, schedule = made(min_edit_fraction=fraction)
    n_waited = next((i for i, turn in enumerate(schedule) if turn.step > 0), len(schedule))
    # The first turn of training is at step 0, too.
    waited = schedule[: n_waited - (n_waited < len(schedule))]
    written = {frame for turn in waited for item in turn.items() for frame in item.writes()}
    assert len(written) >= frames
    fewer = {f for turn in waited[:-1] for item in turn.items() for f in item.writes()}
    assert len(fewer) < fraction * len(FRAMES)


def test_training_lasts_until_the_last_edit_is_learnt():
    _, options, schedule = made(post_edit_steps=30)
    assert max(turn.step for turn in schedule) <= 70
    assert steps_needed(schedule, options, 100) == 100
    _, options, schedule = made(turn_interval_steps=10, post_edit_steps=30)
    assert steps_needed(schedule, options, 100) == 19 * 10 + 30
    _, options, schedule = made(max_steps=8)
    assert steps_needed(schedule, options, 8) == 20, "the last of 20 turns comes before a step, too"


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("order", ["release", "paper", "single_view"])
def test_cameras_are_shared_out_and_each_stays_in_order(n_ranks, order):
    plan, _, _ = made(order=order, passes=2)
    owner, seen, stage = {}, [], 0
    for shares in deal(plan, 2, n_ranks):
        assert len(shares) == n_ranks and all(len(share) <= 2 for share in shares)
        stages = {item.stage for share in shares for item in share}
        assert len(stages) == 1 and min(stages) >= stage, "a stage waits for the one before"
        (stage,) = stages
        for rank, share in enumerate(shares):
            seen += share
            for item in share:
                if isinstance(item, Window):
                    assert owner.setdefault(item.camera, rank) == rank
    assert sorted(i.id for i in seen) == sorted(i.id for i in plan.items)
    for camera in owner:
        ours = [i for i in seen if isinstance(i, Window) and i.camera == camera]
        assert ours == [i for i in plan.items if isinstance(i, Window) and i.camera == camera]
    assert len(set(owner.values())) == min(n_ranks, 4)
