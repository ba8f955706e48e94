"""What an item reads, what it hands to the model, and what it returns."""

import math

import pytest
import torch
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.editing.buffer import EditBuffer
from custom.fourd.editing.options import Strength, edit_options
from custom.fourd.editing.plan import AnchorFrame, KeyRound, RestPaint, Window, make_plan
from custom.fourd.editing.worker import EditSources, EditWorker
from custom.fourd.world.capture import arc_azimuths, rig_capture
from custom.fourd.world.grammar import parse_caption
from tests.fixtures.edited_scenes import (
    SIZE,
    RecordingModel,
    StillFlow,
    filmed_scene,
    hand_made_scene,
)


@pytest.fixture(autouse=True)
def _seed():
    set_experiment_seed(0)


def worker(scene=None, depth=None, flow=None, **keys):
    scene = scene or hand_made_scene()
    no_depth = torch.zeros(scene.frames.shape[:3])
    sources = EditSources(
        model=RecordingModel(), prompt_embeddings=torch.zeros(3, 1, 1), scene=scene,
        buffer=EditBuffer(scene), flow=flow or StillFlow(),
        depth=lambda rows: (no_depth if depth is None else depth)[list(rows)],
        render=lambda rows: torch.full((len(rows), *scene.frames.shape[1:]), 0.125),
    )  # fmt: skip
    return EditWorker(sources, edit_options(keys))


def run(tested, *items):
    for item in items:
        result = tested.run(item)
        tested.buffer.commit(item.id, result.rows, result.images, 0)
    return result


def run_plan(tested, frames, **keys):
    plan = make_plan(edit_options({"warm_up_steps": 2, "sequence_length": 2, **keys}), frames)
    run(tested, *plan.items)
    return plan


FRAMES = [(camera, time) for camera in range(3) for time in range(5)]


@pytest.mark.parametrize("order", ["release", "paper", "single_view", "frame_wise"])
def test_conditions_are_always_the_originals(order):
    tested = worker(order=order, sequence_length=2)
    plan = run_plan(tested, FRAMES, order=order, passes=2)
    assert len(tested.sources.model.calls) == len(plan.items)
    for item, call in zip(plan.items, tested.sources.model.calls, strict=True):
        rows = [tested.scene.index(*frame) for frame in item.frames()]
        assert torch.equal(call.conditions, tested.scene.frames[rows].float() / 255)
        assert (call.start, call.steps) == (item.strength.start, item.strength.steps)
        if call.anchor is not None:
            row = tested.scene.index(*item.anchor.frame)
            assert torch.equal(call.anchor.condition, tested.scene.frames[row].float() / 255)
    assert bool((tested.buffer.version > 0).all())


def windows_of(tested, plan, camera):
    pairs = zip(plan.items, tested.sources.model.calls, strict=True)
    return [c for i, c in pairs if isinstance(i, Window) and i.camera == camera]


def test_the_anchor_is_a_copy_of_the_key_frame_and_stays():
    """Window 0 repaints frame 0, which later windows must not see (defect of the release)."""
    tested = worker(sequence_length=2)
    plan = run_plan(tested, FRAMES)
    calls = windows_of(tested, plan, 1)
    first = calls[0].anchor.image
    assert len(calls) == 3
    assert all(torch.equal(call.anchor.image, first) for call in calls)
    row = tested.scene.index(1, 0)
    assert not torch.equal(tested.buffer.current([row])[0], first), "it was repainted meanwhile"
    refreshed = worker(sequence_length=2, refresh_anchor=True)
    plan = run_plan(refreshed, FRAMES, refresh_anchor=True)
    calls = windows_of(refreshed, plan, 1)
    assert torch.equal(calls[1].anchor.image, refreshed.buffer.current([row])[0])


def test_a_window_starts_from_the_frame_before_it_carried_along_the_flow():
    tested = worker(sequence_length=2)
    plan = run_plan(tested, FRAMES)
    calls = windows_of(tested, plan, 2)
    source = tested.buffer.current([tested.scene.index(2, 1)])[0]
    # Nothing moves, so times 2 and 3 start from the edited time 1.
    assert torch.allclose(calls[1].images, source.expand(2, -1, -1, -1), atol=1e-6)
    key = tested.buffer.result(next(i.anchor.item for i in plan.items if isinstance(i, Window)), 0)
    assert key.shape == (SIZE, SIZE, 3)


def test_a_blend_averages_the_edits_as_they_stand_and_diffuses_nothing():
    """Nothing moves and all originals agree, so each edit becomes the mean of its neighbours'."""
    scene = hand_made_scene(n_cameras=1)
    scene.frames[:] = scene.frames[:1]
    tested = worker(scene, sequence_length=2, time_reach=1, warm_up_steps=1)
    plan = make_plan(edit_options({"sequence_length": 2, "time_reach": 1, "warm_up_steps": 1}),
                     FRAMES[:5])  # fmt: skip
    *others, blend = plan.items
    run(tested, *others)
    before, calls = tested.buffer.current(range(5)), len(tested.sources.model.calls)
    result = run(tested, blend)
    assert len(tested.sources.model.calls) == calls and result.rows == tuple(range(5))
    for t in range(5):
        expected = before[max(0, t - 1) : t + 2].mean(dim=0)
        torch.testing.assert_close(result.images[t], expected, atol=1e-4, rtol=0)
        assert torch.equal(result.shown[t].start, before[t])
        assert bool(result.shown[t].is_warped.all())


def test_without_flow_a_window_starts_from_what_is_there():
    tested = worker(use_flow=False, sequence_length=2)
    plan = run_plan(tested, FRAMES, use_flow=False)
    call = windows_of(tested, plan, 2)[1]
    rows = [tested.scene.index(2, time) for time in (2, 3)]
    assert torch.equal(call.images, tested.scene.frames[rows].float() / 255)


def test_without_an_anchor_nobody_looks_at_anybody():
    tested = worker(use_anchor=False, sequence_length=2)
    run_plan(tested, FRAMES, use_anchor=False)
    assert {call.anchor for call in tested.sources.model.calls} == {None}
    assert tested.sources.model.attention == "none"
    assert worker(order="single_view").sources.model.attention == "anchor_self"


def test_later_rounds_start_from_renders_but_for_the_key_frame():
    tested = worker(order="paper", use_depth=False, use_flow=False, sequence_length=2)
    plan = run_plan(tested, FRAMES, order="paper", use_depth=False, use_flow=False, passes=2)
    pairs = list(zip(plan.items, tested.sources.model.calls, strict=True))
    rounds = [c for i, c in pairs if isinstance(i, KeyRound)]
    assert torch.equal(rounds[1].images, torch.full_like(rounds[1].images, 0.125))
    assert not (rounds[0].images == 0.125).all()
    window = next(c for i, c in pairs if i.id.startswith("round1/") and isinstance(i, Window))
    assert torch.equal(window.images[1], torch.full_like(window.images[1], 0.125))
    assert torch.equal(window.images[0], window.anchor.image), "the key frame is edited already"


def test_a_single_view_writes_all_but_the_key_frame_and_every_pass():
    scene = hand_made_scene(n_cameras=1)
    tested = worker(scene, order="single_view")
    frames = [(0, time) for time in range(5)]
    run_plan(tested, frames, order="single_view", passes=3, sequence_length=3)
    assert tested.buffer.version.tolist() == [1, 3, 3, 3, 3]


def test_draws_depend_on_the_item_and_the_frame_alone():
    item = Window(id="w", stage=0, shard=0, strength=Strength(600, 4), camera=1, times=(2, 3),
                  kept=(3,), reference=None, anchor=None)  # fmt: skip
    first, second = worker(), worker()
    run(second, Window(**{**vars(item), "id": "other"}))
    for tested in (first, second):
        result = run(tested, item)
        assert result.rows == (tested.scene.index(1, 3),), "only what is kept is written"
    draws = [tested.sources.model.calls[-1].draws for tested in (first, second)]
    assert draws[0] == draws[1] != second.sources.model.calls[0].draws
    set_experiment_seed(1)
    third = worker()
    run(third, item)
    assert third.sources.model.calls[0].draws != draws[0]


def test_pictures_show_originals_starts_results_and_masks():
    tested = worker(sequence_length=2)
    run_plan(tested, FRAMES)
    item = Window(id="w", stage=9, shard=0, strength=Strength(600, 4), camera=1, times=(1, 2),
                  kept=(1, 2), reference=0, anchor=None)  # fmt: skip
    result = tested.run(item)
    assert [shown.frame for shown in result.shown] == [(1, 1), (1, 2)]
    for shown, row, image in zip(result.shown, result.rows, result.images, strict=True):
        assert torch.equal(shown.before, tested.scene.frames[row].float() / 255)
        assert torch.equal(shown.after, image) and bool(shown.is_warped.all())
        assert torch.equal(shown.start, tested.sources.model.calls[-1].images[row - 6])


# Depth


@pytest.fixture(scope="module")
def filmed():
    """A cube by three cameras 30 degrees apart at two times, with its true depth."""
    capture = rig_capture(parse_caption("a large red cube"), arc_azimuths(3), 2, 32)
    return filmed_scene(capture), capture.render()[1]


class Blue(RecordingModel):
    """Paints blue whatever is not white."""

    def edit(self, images, conditions, *args):
        super().edit(images, conditions, *args)
        is_object = (conditions.amin(-1, keepdim=True) < 0.9).float()
        blue = torch.tensor([0.0, 0.0, 1.0])
        return is_object * blue + (1 - is_object) * images


def share_of_blue(image, depth):
    surface = depth > 0
    return float((image[surface][:, 2] > 0.9).float().mean())


def test_edited_cameras_paint_the_others_by_depth(filmed):
    scene, depth = filmed
    tested = worker(scene, depth)
    tested.sources.model = Blue()
    item = KeyRound(id="k", stage=0, shard=0, strength=Strength(1000, 20), time=0, cameras=(0, 1),
                    targets=(2,), warp_ratio=1.0)  # fmt: skip
    result = run(tested, item)
    row = scene.index(2, 0)
    assert result.rows == (scene.index(0, 0), scene.index(1, 0), row)
    assert share_of_blue(result.images[2], depth[row]) > 0.4, "all but silhouettes and what is hid"
    far = depth[row] == 0
    assert torch.equal(result.images[2][far], scene.frames[row][far].float() / 255)
    half = tested.run(KeyRound(**{**vars(item), "warp_ratio": 0.5}))
    both = half.images[2] - 0.5 * (result.images[2] + tested.buffer.current([row])[0])
    assert float(both.abs().mean()) < 1e-3


def test_other_cameras_take_key_cameras_at_the_same_time(filmed):
    scene, depth = filmed
    tested = worker(scene, depth, order="paper")
    rows = [scene.index(camera, 1) for camera in (0, 1)]
    tested.buffer.commit("keys", rows, Blue().edit(
        tested.buffer.original(rows), tested.buffer.original(rows), None, 1, 1, None,
        [torch.Generator(), torch.Generator()], None), 0)  # fmt: skip
    item = Window(id="w", stage=1, shard=2, strength=Strength(600, 4), camera=2, times=(1,),
                  kept=(1,), reference=None, anchor=None, key_cameras=(0, 1))  # fmt: skip
    shown = tested.run(item).shown[0]
    own = depth[scene.index(2, 1)]
    assert share_of_blue(shown.start, own) > 0.4
    assert not bool(shown.is_warped[own == 0].any()) and bool(shown.is_warped.any())
    without = worker(scene, depth, order="paper", use_depth=False)
    assert not bool(without.run(item).shown[0].is_warped.any())


def test_time_and_space_are_mixed_where_both_are_known(filmed):
    scene, depth = filmed
    starts = {}
    for share in (0.0, 0.5, 1.0):
        tested = worker(scene, depth, order="paper", temporal_share=share)
        for name, camera, time, value in (("a", 2, 0, 0.0), ("b", 0, 1, 1.0), ("c", 1, 1, 1.0)):
            row = scene.index(camera, time)
            tested.buffer.commit(name, [row], torch.full((1, 32, 32, 3), value), 0)
        item = Window(id="w", stage=1, shard=2, strength=Strength(600, 4), camera=2, times=(1,),
                      kept=(1,), reference=0, anchor=None, key_cameras=(0, 1))  # fmt: skip
        starts[share] = tested.run(item).shown[0].start
    # Along the flow (nothing moves) comes black, from the other cameras white.
    assert float(starts[1.0].max()) == 0.0
    seen = starts[0.0][..., 0] == 1.0
    assert 0.1 < float(seen.float().mean()) < 0.9
    assert torch.equal(starts[0.5][..., 0], 0.5 * seen)


def test_published_thresholds_are_absolute_on_request(filmed):
    scene, depth = filmed
    tested = worker(scene, depth, depth_tau_is_absolute=True)
    check = tested._warper([0, 2], depth[[0, 2]], 0.05).check
    assert (check.absolute, check.relative) == (0.05, 0.0)
    check = worker(scene, depth)._warper([0, 2], depth[[0, 2]], 0.05).check
    assert (check.absolute, check.relative) == (0.0, 0.05)


def test_other_cameras_are_painted_with_the_common_anchor():
    tested = worker(sequence_length=2)
    key = KeyRound(id="k", stage=0, shard=0, strength=Strength(1000, 20), time=0, cameras=(0, 1))
    run(tested, key)
    rest = RestPaint(id="r", stage=1, shard=0, strength=Strength(700, 6), time=0, cameras=(2,),
                     anchor=AnchorFrame((0, 0), "k"))  # fmt: skip
    run(tested, rest)
    call = tested.sources.model.calls[-1]
    assert torch.equal(call.anchor.image, tested.buffer.result("k", 0))


def test_what_is_no_item_is_refused():
    with pytest.raises(TypeError, match="is no item that this worker knows"):
        worker().run("window")


# The whole loop, with a model that knows the truth but goes only part of the way


class PartOfTheWay(RecordingModel):
    """Makes the true edit of strongly noised frames, a third of it of others: warps do the rest."""

    def __init__(self, originals, truth):
        super().__init__()
        self.originals, self.truth = originals, truth

    def edit(self, images, conditions, text, start, steps, *_):
        rows = [int((self.originals - c).abs().flatten(1).sum(1).argmin()) for c in conditions]
        return torch.lerp(images, self.truth[rows], 1.0 if start > 800 else 0.3)


@pytest.fixture(scope="module")
def green():
    """A red cube that slides, by three cameras at sixteen times; its depth; the same in green."""
    capture = rig_capture(parse_caption("a large red cube sliding"), arc_azimuths(3), 16, 32)
    after = rig_capture(parse_caption("a large green cube sliding"), arc_azimuths(3), 16, 32)
    colours, depth = capture.render()
    return filmed_scene(capture), depth, after.render()[0], colours


def agreement(green, **keys):
    """PSNR of all frames as if they were one: a few perfect ones must not hide the others."""
    from custom.fourd.ops.optical_flow import DISFlow

    scene, depth, truth, _ = green
    keys = {"warm_up_steps": 3, "sequence_length": 2, **keys}
    tested = worker(scene, depth, DISFlow(), **keys)
    tested.sources.model = PartOfTheWay(scene.frames.float() / 255, truth)
    frames = list(zip(scene.camera_ids.tolist(), scene.time_ids.tolist(), strict=True))
    run_plan(tested, frames, **keys)
    error = (tested.buffer.current(range(len(scene))) - truth).square().mean()
    return -10 * math.log10(float(error))


@pytest.mark.parametrize(("order", "by_depth"), [("release", 0.0), ("paper", 0.5)])
def test_warps_carry_an_edit_that_the_model_alone_does_not_finish(green, order, by_depth):
    """In dB: frames are nearer to the truth than without a warp, and far nearer than alone."""
    full = agreement(green, order=order)
    assert full > agreement(green, order=order, use_flow=False) + 3
    # In the release every camera is diffused in some round, which finishes the edit here.
    assert full >= agreement(green, order=order, use_depth=False) + by_depth


def test_frames_that_are_edited_alone_stay_behind(green):
    alone = agreement(green, order="frame_wise", refine_num_steps=700)
    assert agreement(green, order="single_view") > alone + 3
