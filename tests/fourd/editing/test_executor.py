"""Both executors give one buffer; interruptions, faults and several processes change nothing."""

import threading
import time

import pytest
import torch
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.editing.buffer import EditBuffer
from custom.fourd.editing.executor import (
    InterleavedExecutor,
    Ranks,
    StopEditing,
    ThreadedExecutor,
    make_executor,
)
from custom.fourd.editing.options import edit_options
from custom.fourd.editing.plan import make_plan
from custom.fourd.editing.schedule import make_schedule
from custom.fourd.editing.worker import EditSources
from tests.fixtures.edited_scenes import RecordingModel, StillFlow, hand_made_scene

KEYS = {"warm_up_steps": 2, "sequence_length": 2, "use_depth": False}
LAST_STEP = 20


@pytest.fixture(autouse=True)
def _seed():
    set_experiment_seed(0)


class Notes:
    """An observer that remembers, and asks to stop after some items."""

    def __init__(self, stop_after=None):
        self.told, self.stop_after = [], stop_after
        self.threads = set()

    def begin(self, item, done, total):
        self.told.append((item.id, done, total))

    def end(self, item, result, done, total):
        self.threads.add(threading.current_thread())

    def should_stop(self):
        return self.stop_after is not None and len(self.told) >= self.stop_after


def build(folder=None, notes=None, fails_at=None, n_ranks=1, ranks=None, **keys):
    scene = hand_made_scene()
    options = edit_options({**KEYS, **keys})
    frames = list(zip(scene.camera_ids.tolist(), scene.time_ids.tolist(), strict=True))
    plan = make_plan(options, frames)
    schedule = make_schedule(plan, options, LAST_STEP, n_ranks)
    first = ranks is None or ranks.rank == 0
    sources = EditSources(
        model=RecordingModel(fails_at=fails_at), prompt_embeddings=torch.zeros(3, 1, 1),
        scene=scene, buffer=EditBuffer(scene, folder, writes=first), flow=StillFlow(),
        depth=lambda rows: torch.zeros(len(rows), 8, 8),
        render=lambda rows: torch.full((len(rows), 8, 8, 3), 0.25),
    )  # fmt: skip
    return make_executor(options, schedule, sources, notes or Notes(), ranks)


def drive(executor, first=0):
    """A training's calls: begin, one turn per step until the schedule ends, finish."""
    executor.begin(first)
    last = max((turn.step for turn in getattr(executor, "schedule", ())), default=LAST_STEP)
    for step in range(first, max(LAST_STEP, last + 1)):
        executor.turn(step)
    executor.finish()
    return executor.buffer


def same(one, other):
    return torch.equal(one._edited, other._edited) and torch.equal(one.version, other.version)


@pytest.mark.parametrize("order", ["release", "paper", "single_view", "frame_wise"])
def test_both_executors_give_the_same_buffer(order):
    one = drive(build(order=order, passes=2))
    other = build(order=order, passes=2, executor="threaded")
    assert isinstance(other, ThreadedExecutor)
    assert same(one, drive(other)) and other.is_done
    assert bool((one.version > 0).all())


def test_turns_run_when_they_are_due():
    notes = Notes()
    executor = build(notes=notes, turn_interval_steps=2)
    assert isinstance(executor, InterleavedExecutor)
    executor.begin(0)
    waited = len(notes.told)
    assert [done for _, done, _ in notes.told] == list(range(waited))
    executor.turn(0)
    executor.turn(1)
    assert len(notes.told) == waited, "nothing is due"
    executor.turn(2)
    executor.turn(2)
    assert len(notes.told) == waited + 1 and executor.done == waited + 1
    assert executor.buffer.edited_at_step.max() == 2
    assert {total for _, _, total in notes.told} == {executor.total}


@pytest.mark.parametrize("stop", [0, 3, 11])
def test_an_interrupted_edit_goes_on_as_if_it_had_not_been(stop, tmp_path):
    """The journal is ahead of the checkpoint: what is on disk shows when it is due, not before."""
    whole = build(tmp_path / "whole", turn_interval_steps=2)
    seen = []
    whole.begin(0)
    for step in range(LAST_STEP):
        whole.turn(step)
        seen.append(whole.buffer._edited.clone())
    broken = build(tmp_path / "broken", turn_interval_steps=2)
    broken.begin(0)
    for step in range(stop + 5):
        broken.turn(step)
    again = build(tmp_path / "broken", turn_interval_steps=2)
    again.begin(stop)
    for step in range(stop, LAST_STEP):
        again.turn(step)
        assert torch.equal(again.buffer._edited, seen[step]), step
    assert same(again.buffer, whole.buffer)
    n_calls = len(again.worker.sources.model.calls) + len(broken.worker.sources.model.calls)
    assert n_calls == whole.total, "nothing is edited twice"


def test_what_the_checkpoint_was_trained_on_must_be_there(tmp_path):
    drive(build(tmp_path, turn_interval_steps=2))
    next((tmp_path / "items").glob("*window001.npy")).unlink()
    with pytest.raises(ValueError, match="is missing from .*, but the checkpoint of step 19"):
        build(tmp_path, turn_interval_steps=2).begin(19)


def test_stopping_while_training_waits(tmp_path):
    executor = build(tmp_path, Notes(stop_after=2), min_edit_fraction=1.0)
    with pytest.raises(StopEditing):
        executor.begin(0)
    assert len(executor.buffer.journal()) == 2
    done = drive(build(tmp_path, min_edit_fraction=1.0))
    assert same(done, drive(build(min_edit_fraction=1.0)))


def test_faults_of_the_thread_reach_the_main_loop():
    executor = build(executor="threaded", fails_at=4)
    with pytest.raises(RuntimeError, match="the model broke"):
        executor.begin(0)
        for _ in range(2000):
            executor.turn(1)
            time.sleep(0.001)
    executor.cancel()
    assert not executor._thread.is_alive() and executor.done < executor.total


def test_the_thread_is_joined_and_tells_the_main_loop_alone():
    notes = Notes()
    executor = build(notes=notes, executor="threaded")
    drive(executor)
    assert not executor._thread.is_alive()
    assert notes.threads == {threading.main_thread()}
    assert len(notes.told) == executor.total


def test_renders_are_made_by_the_main_loop():
    threads = set()
    executor = build(executor="threaded", order="paper", passes=2)
    render = executor._render
    executor._render = lambda rows: threads.add(threading.current_thread()) or render(rows)
    drive(executor)
    assert threads == {threading.main_thread()}


def test_a_thread_that_waits_for_a_render_can_be_stopped():
    executor = build(executor="threaded", order="paper", passes=2, min_edit_fraction=0.1)
    executor._render = lambda rows: executor.cancel() or torch.zeros(len(rows), 8, 8, 3)
    executor.begin(0)
    for _ in range(2000):
        if not executor._thread.is_alive():
            break
        executor._serve(0.001, raises=False)
    assert executor._stop.is_set()


def test_a_threaded_edit_is_resumed_too(tmp_path):
    whole = drive(build(executor="threaded"))
    with pytest.raises(RuntimeError, match="broke"):
        drive(build(tmp_path, executor="threaded", fails_at=6))
    again = build(tmp_path, executor="threaded")
    assert same(drive(again, first=3), whole)
    assert len(again.worker.sources.model.calls) == again.total - 6


class Group:
    """Two ranks as threads that wait for each other, in place of processes."""

    def __init__(self, size):
        self.size, self.barrier = size, threading.Barrier(size, timeout=60)
        self.found = [None] * size

    def rank(self, number):
        group = self

        class One(Ranks):
            rank, size = number, group.size

            def gather(self, found):
                group.found[number] = found
                group.barrier.wait()
                everyone = list(group.found)
                group.barrier.wait()
                return everyone

        return One()


@pytest.mark.parametrize("order", ["release", "paper"])
def test_several_processes_give_the_buffer_of_one(order, tmp_path):
    alone = drive(build(order=order, passes=2))
    group, executors, threads = Group(2), [], []
    for number in range(2):
        executors.append(build(tmp_path, order=order, passes=2, n_ranks=2,
                               ranks=group.rank(number)))  # fmt: skip
    for executor in executors:
        threads.append(threading.Thread(target=drive, args=(executor,)))
        threads[-1].start()
    for thread in threads:
        thread.join(timeout=120)
    calls = [len(executor.worker.sources.model.calls) for executor in executors]
    assert min(calls) > 0 and sum(calls) == executors[0].total
    for executor in executors:
        assert same(executor.buffer, alone)
    assert len(executors[0].buffer.journal()) == executors[0].total


def test_threads_of_several_processes_are_refused():
    class Two(Ranks):
        size = 2

    with pytest.raises(ValueError, match="is 'threaded' with 2 processes; expected one"):
        build(executor="threaded", ranks=Two(), n_ranks=2)
