import io
from types import SimpleNamespace

import pytest
import torch
from threestudio.launcher.progress import (
    RateMeter,
    RunProgress,
    describe,
    format_eta,
    loss_of,
    memory_gb,
)


def test_rate_by_hand():
    meter = RateMeter()
    assert meter.rate() is None
    meter.add(10.0, 5)
    assert meter.rate() is None
    meter.add(12.0, 25)
    assert meter.rate() == 10.0
    meter.add(12.0, 25)
    for second in range(100):
        meter.add(20.0 + second, 25 + 2 * second)
    assert meter.rate() == pytest.approx(2.0)  # the slow start has left the window


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (9.6, "0:10"), (61, "1:01"),
                                           (3599.7, "1:00:00"), (36061, "10:01:01"),
                                           (None, "-:--"), (float("inf"), "-:--"),
                                           (float("nan"), "-:--"), (-1, "-:--")])
def test_eta(seconds, text):
    assert format_eta(seconds) == text


def test_line():
    assert describe(40, 400, 12.5, 0.1234567, 1.23) == (
        "step 40/400, 12.5 steps/s, 0:29 left, loss 0.1235, 1.2 GB")
    assert describe(0, 400, None, None, 0.0) == "step 0/400, - steps/s, -:-- left, 0.0 GB"
    assert describe(7, -1, 2.0, None, 0.5) == "step 7, 2 steps/s, 0.5 GB"


def test_loss_is_found_where_lightning_puts_it():
    assert loss_of({"loss": torch.tensor(2.0, requires_grad=True)}) == 2.0
    assert loss_of(torch.tensor(3.0)) == 3.0
    for nothing in (None, {}, {"loss": torch.ones(2)}, "x"):
        assert loss_of(nothing) is None


def test_memory_counts_what_is_allocated():
    before = memory_gb(torch.device("cpu"))
    block = torch.ones(int(before * 1e9) // 4 + 25_000_000)
    assert before > 0.05 and memory_gb() > before + 0.09
    del block


def fake(step, total=10):
    trainer = SimpleNamespace(global_step=step, max_steps=total, is_global_zero=True,
                              num_test_batches=[3])
    return trainer, SimpleNamespace(device=torch.device("cpu"))


def test_lines_come_seldom_and_always_at_the_end():
    stream = io.StringIO()
    progress = RunProgress(stream=stream, line_pause_sec=1000.0)
    assert not progress.live
    progress.on_train_start(*fake(0))
    for step in range(1, 11):
        progress.on_train_batch_end(*fake(step), {"loss": torch.tensor(0.5)}, None, 0)
    progress.on_train_end(*fake(10))
    progress.on_test_start(*fake(10))
    for index in range(3):
        progress.on_test_batch_end(*fake(10), None, None, index)
    progress.on_test_end(*fake(10))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("step 10/10, ") and "loss 0.5" in first and second == "view 3/3"


def test_bar_is_drawn_on_a_terminal():
    stream = io.StringIO()
    progress = RunProgress(live=True, stream=stream)
    progress.on_train_start(*fake(0))
    progress.on_train_batch_end(*fake(10), {"loss": torch.tensor(0.5)}, None, 0)
    progress.on_exception(None, None, ValueError())
    assert "training" in stream.getvalue() and "step 10/10" in stream.getvalue()
    assert progress._bar is None


def test_a_closed_stream_stops_nothing():
    stream = io.StringIO()
    progress = RunProgress(stream=stream, line_pause_sec=0.0)
    progress.on_train_start(*fake(0))
    stream.close()
    for step in range(1, 4):
        progress.on_train_batch_end(*fake(step), None, None, 0)
