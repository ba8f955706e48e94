"""When a test begins, and the facts of its run."""

import pytest
import torch

from custom.fourd.systems.timed_evaluation import TimedEvaluation
from custom.fourd.systems.training_clock import TrainingClock


class Loop:
    """The hooks and facts of a Lightning system that the evaluation reads."""

    true_global_step, profile, device = 40, "embedded", torch.device("cpu")

    def __init__(self):
        self.begun = []

    def on_fit_start(self): ...

    def on_test_start(self):
        self.begun.append("test")

    def on_predict_start(self):
        self.begun.append("predict")


class System(TimedEvaluation, TrainingClock, Loop):
    pass


def test_a_test_after_an_interrupted_training_stops_its_clock():
    system = System()
    system.on_fit_start()
    system._fit_started -= 5
    system.on_test_start()
    assert system._fit_started is None and system.begun == ["test"]
    system._test_started -= 2
    facts = system._facts_of_run([torch.zeros(6, 9, 3)] * 4)
    assert facts["seconds"] == pytest.approx(5, abs=1)
    assert facts["evaluation_seconds"] == pytest.approx(2, abs=1)
    assert facts["peak_memory_gb"] > 0
    assert (facts["steps"], facts["profile"]) == (40, "embedded")
    assert (facts["views"], facts["height"], facts["width"]) == (4, 6, 9)


def test_an_export_may_test_too():
    system = System()
    system.on_predict_start()
    assert system.begun == ["predict"]
    assert system._facts_of_run([torch.zeros(1, 1, 3)])["seconds"] is None
