"""Seconds of training across checkpoints, resuming and weights-only loads."""

import time

import pytest

from custom.fourd.systems.training_clock import TrainingClock


class Loop:
    """The hooks of a Lightning system that the clock extends."""

    def on_fit_start(self):
        self.started = True

    def on_fit_end(self): ...

    def on_weights_loaded(self, checkpoint): ...

    def on_save_checkpoint(self, checkpoint): ...

    def on_load_checkpoint(self, checkpoint): ...


class System(TrainingClock, Loop):
    pass


def test_a_running_training_is_counted_once():
    system = System()
    system.on_fit_start()
    assert system.started
    system._fit_started -= 5
    assert system.training_seconds == pytest.approx(5, abs=1)
    checkpoint = {}
    system.on_save_checkpoint(checkpoint)
    system.on_fit_end()
    assert checkpoint["train_seconds"] == pytest.approx(5, abs=1)
    stopped = system.training_seconds
    time.sleep(0.02)
    system._stop_clock()
    assert system.training_seconds == stopped


def test_a_resumed_training_goes_on_counting():
    system = System()
    system.on_load_checkpoint({"train_seconds": 7.5})
    assert system.training_seconds == 7.5
    system.on_fit_start()
    system._fit_started -= 2
    assert system.training_seconds == pytest.approx(9.5, abs=1)


def test_weights_report_their_own_seconds_until_training_starts():
    system = System()
    assert system.training_seconds is None, "nothing was trained"
    system.on_weights_loaded({"train_seconds": 30.0})
    assert system.training_seconds == 30.0
    system.on_fit_start()
    system._fit_started -= 2
    assert system.training_seconds == pytest.approx(2, abs=1), "a new stage counts from zero"


@pytest.mark.parametrize("load", ["on_weights_loaded", "on_load_checkpoint"])
def test_a_file_that_does_not_say_leaves_them_unknown(load):
    system = System()
    getattr(system, load)({})
    assert system.training_seconds is None
