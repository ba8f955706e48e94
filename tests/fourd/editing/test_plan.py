"""Plans: the published numbers, every frame once, what reads what, and draws by item."""

from collections import Counter

import pytest
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.editing.options import edit_options
from custom.fourd.editing.plan import (
    KeyRound,
    RestPaint,
    TimeBlend,
    Window,
    key_strength,
    make_plan,
    window_slots,
)

CAMERAS, TIMES = range(1, 8), range(12)
FRAMES = [(camera, time) for camera in CAMERAS for time in TIMES]


@pytest.fixture(autouse=True)
def _seed():
    set_experiment_seed(0)


def plan(frames=FRAMES, **keys):
    return make_plan(edit_options(keys), frames)


def of(kind, found):
    return [item for item in found.items if isinstance(item, kind)]


def test_the_published_strengths_of_twelve_rounds():
    options = edit_options({})
    found = [key_strength(options, round_, 12) for round_ in range(12)]
    assert [(s.start, s.steps) for s in found] == [
        (1000, 20), (996, 19), (986, 19), (970, 19), (950, 19), (925, 18),
        (900, 18), (874, 17), (850, 17), (829, 16), (813, 16), (803, 16),
    ]  # fmt: skip


def test_the_release_edits_one_time_over_cameras_then_each_camera_along_time():
    found = plan()
    rounds, paints, windows = (of(kind, found) for kind in (KeyRound, RestPaint, Window))
    assert [item.stage for item in rounds] == list(range(12))
    for item in rounds:
        assert len(item.cameras) == 5 and item.cameras == tuple(sorted(item.cameras))
        assert sorted((*item.cameras, *item.targets)) == list(CAMERAS)
        assert (item.time, item.warp_ratio) == (0, 0.5)
    assert len({item.cameras for item in rounds}) > 3, "cameras are drawn anew"
    (paint,) = paints
    assert paint.stage == 12 and paint.cameras == rounds[-1].targets
    assert paint.anchor.frame == (rounds[-1].cameras[0], 0)
    assert found.blocking_stages == 13 and {item.stage for item in windows} == {13}
    assert [item.id for item in windows[:2]] == ["pass0/camera01/window000",
                                                 "pass0/camera01/window001"]  # fmt: skip


def test_windows_cover_each_frame_once_and_the_anchor_is_constant():
    found = plan()
    written = Counter(frame for item in of(Window, found) for frame in item.writes())
    assert written == Counter(FRAMES)
    made = {camera: rounds.id for rounds in of(KeyRound, found)[-1:] for camera in rounds.cameras}
    made |= {camera: p.id for p in of(RestPaint, found) for camera in p.cameras}
    for item in of(Window, found):
        assert item.anchor.frame == (item.camera, 0) and item.anchor.item == made[item.camera]
        assert item.reference == max(0, item.times[0] - 1)


def test_a_refreshed_anchor_is_read_as_it_stands():
    first, second, *_ = of(Window, plan(refresh_anchor=True))
    assert first.anchor.item is not None and second.anchor.item is None


@pytest.mark.parametrize("n_times", [1, 2, 5, 9, 12, 16])
@pytest.mark.parametrize(("length", "overlap"), [(2, 0), (5, 0), (2, 1), (5, 1), (3, 2), (5, 2)])
def test_slots_write_every_position_once_from_one_that_is_edited(n_times, length, overlap):
    edited = {0}
    written = Counter()
    for slot in window_slots(n_times, length, overlap):
        assert slot.reference in edited
        assert len(slot.diffused) <= length and set(slot.kept) <= set(slot.diffused)
        assert overlap == 0 or set(range(slot.diffused.start, slot.kept.start)) <= edited
        written.update(slot.kept)
        edited.update(slot.kept)
    first = 0 if overlap == 0 else 1
    assert written == Counter(range(first, n_times))


def test_the_published_windows_of_a_single_view():
    """Length 5, stride 4: warped from the first frame, the other four written."""
    slots = window_slots(10, 5, 1)
    assert [(s.reference, *s.kept) for s in slots] == [(0, 1, 2, 3, 4), (4, 5, 6, 7, 8), (8, 9)]


def test_a_single_view_repeats_windows_around_one_key_frame():
    found = plan([(0, time) for time in TIMES], order="single_view", passes=2)
    (key,) = of(KeyRound, found)
    assert (key.strength.start, key.strength.steps) == (1000, 20) and key.targets == ()
    windows = of(Window, found)
    assert {(w.id[:5], w.strength.start, w.strength.steps) for w in windows} == {
        ("pass0", 700, 5), ("pass1", 550, 3)}  # fmt: skip
    assert {w.anchor.item for w in windows} == {key.id} and {w.stage for w in windows} == {1, 2}
    for number in ("pass0", "pass1"):
        written = [f for w in windows if w.id.startswith(number) for f in w.writes()]
        assert sorted(written) == [(0, time) for time in TIMES[1:]]


def test_the_paper_carries_edited_videos_to_the_other_cameras():
    found = plan(order="paper", passes=3)
    rounds = of(KeyRound, found)
    assert [item.from_render for item in rounds] == [False, True, True]
    starts = [item.strength.start for item in rounds]
    assert starts == sorted(starts, reverse=True) and starts[0] == 1000 and starts[-1] < 900
    for number, item in enumerate(rounds):
        windows = [w for w in of(Window, found) if w.id.startswith(f"round{number}/")]
        assert Counter(f for w in windows for f in w.writes()) == Counter(FRAMES)
        ours = [w for w in windows if w.camera in item.cameras]
        others = [w for w in windows if w.camera not in item.cameras]
        assert {w.key_cameras for w in ours} == {()}
        assert {w.key_cameras for w in others} == {item.cameras}
        assert max(w.stage for w in ours) < min(w.stage for w in others)
        assert {w.from_render for w in windows} == {number > 0}


def test_the_baseline_edits_frames_alone():
    windows = of(Window, plan(order="frame_wise"))
    assert len(plan(order="frame_wise").items) == len(windows)
    assert {(w.reference, w.anchor, w.key_cameras) for w in windows} == {(None, None, ())}
    assert {(w.strength.start, w.strength.steps) for w in windows} == {(1000, 20)}


@pytest.mark.parametrize("order", ["release", "paper", "single_view"])
def test_a_camera_is_blended_along_time_once_its_windows_are_done(order):
    found = plan(order=order, passes=2, time_reach=2)
    blends = of(TimeBlend, found)
    assert Counter(item.camera for item in blends) == dict.fromkeys(CAMERAS, 2)
    for item in blends:
        assert item.times == tuple(TIMES) and item.reach == 2
        place = found.items.index(item)
        before = found.items[place - 1]
        assert isinstance(before, Window)
        assert (before.camera, before.stage, before.shard) == (item.camera, item.stage, item.shard)
        rest = found.items[place + 1 :]
        assert not any(isinstance(w, Window) and w.camera == item.camera and w.stage == item.stage
                       for w in rest)  # fmt: skip
    text = str(found)
    assert "times 0-11, averaged along the flow with 2 before and after" in text
    for keys in ({"time_reach": 0}, {"time_reach": 2, "use_flow": False}):
        assert not of(TimeBlend, plan(order=order, **keys))
    assert not of(TimeBlend, plan(order="frame_wise", time_reach=2))


def test_switches_take_their_part_out():
    found = plan(use_depth=False, order="paper")
    assert not any(item.targets for item in of(KeyRound, found))
    assert not any(item.key_cameras for item in of(Window, found))
    assert {w.reference for w in of(Window, plan(use_flow=False))} == {None}
    assert {w.anchor for w in of(Window, plan(use_anchor=False))} == {None}
    (first, *_) = of(RestPaint, plan(rest_anchor="chunk"))
    assert first.anchor.frame[0] == first.cameras[0] and first.anchor.item is None


def test_nothing_of_a_stage_reads_what_another_camera_writes_in_it():
    for order in ("release", "paper", "single_view"):
        for stage in plan(order=order, passes=2).stages():
            for item in stage:
                reads = {item.anchor.item} if getattr(item, "anchor", None) else set()
                same = {other.id for other in stage if other is not item}
                assert not reads & same
                if isinstance(item, Window):
                    writers = {o.camera for o in stage if isinstance(o, Window)}
                    assert not set(item.key_cameras) & writers


def test_ids_are_unique_and_decide_the_seed():
    items = plan(order="paper", passes=2).items
    assert len({item.id for item in items}) == len({item.seed for item in items}) == len(items)
    assert plan(order="paper", passes=2).items == items
    before = items[0].seed
    set_experiment_seed(1)
    assert items[0].seed != before
    again = plan(order="paper", passes=2).items
    assert again[0].cameras != items[0].cameras, "the seed decides the key cameras"


def test_cameras_without_the_first_time_are_edited_from_the_others():
    frames = [(0, time) for time in range(4)] + [(1, time) for time in range(2, 4)]
    found = plan(frames, warm_up_steps=1)
    assert of(KeyRound, found)[0].cameras == (0,)
    late = [w for w in of(Window, found) if w.camera == 1]
    assert late[0].reference is None and late[0].anchor.frame == (0, 0)


def test_a_plan_can_be_printed():
    lines = str(plan(order="paper")).splitlines()
    assert lines[0].startswith("round0/key: key round of cameras ")
    assert "T 1000 in 20 steps" in lines[0] and "onto" in lines[0]
    assert any("times 5-9, after 4, keys" in line for line in lines)
    assert len(lines) == len(plan(order="paper").items)


def test_rounds_may_have_fewer_cameras_than_windows_frames():
    found = plan(order="paper", key_cameras=2)
    assert [len(item.cameras) for item in of(KeyRound, found)] == [2]
    assert [len(item.cameras) for item in of(RestPaint, found)] == [5]
    assert max(len(w.times) for w in of(Window, found)) == 5


def test_nothing_to_edit_is_refused():
    with pytest.raises(ValueError, match="there is no frame to edit"):
        plan([])
