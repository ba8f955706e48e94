from types import SimpleNamespace

import pytest
import torch
from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint
from threestudio.utils.checkpoint_schedule import (
    AtomicCheckpointIO,
    CheckpointSchedule,
    NonFiniteError,
    check_finite,
)


class FakeTrainer:
    """The few things of a trainer that a save touches; writing is real."""

    world_size, is_global_zero, current_epoch, max_steps, optimizers = 1, True, 0, 1000, []

    def __init__(self):
        self.global_step = 0
        self.lightning_module = torch.nn.Linear(1, 1)

    def save_checkpoint(self, path, weights_only):
        assert weights_only is False
        save_checkpoint(path, {"global_step": self.global_step})


def schedule_at(folder, options=None, **kwargs):
    schedule = CheckpointSchedule(folder, options=options, **kwargs)
    schedule._last_time, schedule.last_step = 0.0, 0
    return schedule


def saved_steps(folder):
    return sorted(int(path.stem.split("=")[-1]) for path in folder.glob("epoch=0-step=*.ckpt"))


def save_at(schedule, steps):
    trainer = FakeTrainer()
    for step in steps:
        trainer.global_step = step
        schedule.save(trainer)


@pytest.mark.parametrize("step, seconds, due", [
    (5, 19, False),     # neither 1 % of 1000 steps nor 20 s
    (5, 100, False),    # enough time, too few steps
    (500, 19, False),   # enough steps, too little time
    (10, 20, True),     # both
    (1, 900, True),     # slow steps: never later than 15 min
    (1, 899, False),
    (1000, 0, True),    # the last step
])
def test_when_a_save_is_due(tmp_path, step, seconds, due):
    assert schedule_at(tmp_path).due(step, 1000, seconds) is due


def test_a_slow_disk_stretches_the_pause_to_two_percent(tmp_path):
    schedule = schedule_at(tmp_path)
    schedule._last_cost_sec = 2.0
    assert not schedule.due(500, 1000, 99) and schedule.due(500, 1000, 100)
    schedule._last_cost_sec = 60.0
    assert schedule.due(500, 1000, 900)


def test_named_steps_are_due_and_a_saved_one_is_not(tmp_path):
    schedule = schedule_at(tmp_path, {"every_n_train_steps": 7})
    assert schedule.due(14, 1000, 0) and not schedule.due(15, 1000, 0)
    schedule.last_step = 14
    assert not schedule.due(14, 1000, 1e6)


def test_the_newest_two_survive_and_last_is_the_newest(tmp_path):
    schedule = schedule_at(tmp_path)
    save_at(schedule, [3, 5, 12, 100])
    assert saved_steps(tmp_path) == [12, 100]
    assert load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 100
    assert schedule.last_path == tmp_path / "epoch=0-step=100.ckpt"
    assert len(list(tmp_path.iterdir())) == 6  # three files with their hashes


@pytest.mark.parametrize("top_k, kept", [(-1, [10, 20, 30, 41, 42]), (1, [30, 41, 42]),
                                         (0, [41, 42])])
def test_named_steps_are_kept_by_save_top_k(tmp_path, top_k, kept):
    schedule = schedule_at(tmp_path, {"every_n_train_steps": 10, "save_top_k": top_k})
    save_at(schedule, [5, 10, 15, 20, 30, 41, 42])
    assert saved_steps(tmp_path) == kept


def test_without_last(tmp_path):
    save_at(schedule_at(tmp_path, {"save_last": False}), [1])
    assert not (tmp_path / "last.ckpt").exists()


def test_a_fault_is_reported_retried_and_raised_at_the_end(tmp_path, caplog):
    blocked = tmp_path / "ckpts"
    blocked.write_text("a file where the folder should be")
    schedule = schedule_at(blocked)
    module = SimpleNamespace()
    save_at(schedule, [5])
    assert "cannot write checkpoint" in caplog.text and "It will be tried again" in caplog.text
    assert schedule.last_path is None
    with pytest.raises(OSError, match="cannot write checkpoint"):
        schedule.on_train_end(None, module)
    blocked.unlink()
    save_at(schedule, [6])
    schedule.on_train_end(None, module)
    assert saved_steps(blocked) == [6]


def test_a_file_that_cannot_be_deleted_stops_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path):
        raise OSError(1, "not permitted")

    monkeypatch.setattr("threestudio.utils.checkpoint_schedule.remove_checkpoint", refuse)
    save_at(schedule_at(tmp_path), [1, 2, 3])
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert "cannot delete the old checkpoint" in caplog.text


def test_options_are_checked(tmp_path, caplog):
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        CheckpointSchedule(tmp_path, options={"monitor": "loss"})
    assert "checkpoint.monitor has no effect here and is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint\.save_lst is unknown.*'save_last'"):
        CheckpointSchedule(tmp_path, options={"save_lst": True})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_never_written(tmp_path, value):
    trainer = FakeTrainer()
    with torch.no_grad():
        trainer.lightning_module.weight.fill_(value)
    trainer.global_step = 4
    with pytest.raises(NonFiniteError, match=r"weight hold NaN or infinite values; nothing was"):
        schedule_at(tmp_path).save(trainer)
    assert list(tmp_path.iterdir()) == []


def test_check_finite_knows_buffers_moments_and_large_numbers():
    module = torch.nn.Linear(2, 1)
    module.register_buffer("bounds", torch.tensor([float("-inf"), float("inf")]))
    with torch.no_grad():
        module.weight.fill_(3e38)  # finite, though the sum is not
    check_finite(module)
    module.register_buffer("ema", torch.tensor(float("nan")))
    with pytest.raises(NonFiniteError, match="ema"):
        check_finite(module)
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([param])
    optimizer.state[param]["exp_avg"] = torch.tensor([float("inf")])
    with pytest.raises(NonFiniteError, match="optimizer state exp_avg"):
        check_finite(torch.nn.Linear(1, 1), [optimizer])


def test_io_goes_through_our_files(tmp_path):
    io, path = AtomicCheckpointIO(), tmp_path / "a.ckpt"
    io.save_checkpoint({"x": torch.ones(1)}, path)
    loaded = io.load_checkpoint(path, map_location=None, weights_only=None)
    assert loaded["x"].item() == 1 and "pytorch-lightning_version" in loaded
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        io.load_checkpoint(path)
    io.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_sweep_happens_before_a_training(tmp_path):
    (tmp_path / ".last.ckpt.0123abcd.tmp").write_bytes(b"half")
    schedule = schedule_at(tmp_path)
    schedule.setup(FakeTrainer(), None, "test")
    assert list(tmp_path.iterdir())
    schedule.setup(FakeTrainer(), None, "fit")
    assert not list(tmp_path.iterdir())


def test_metadata_enters_the_checkpoint(tmp_path):
    schedule = CheckpointSchedule(tmp_path, metadata={"seed": 3})
    payload = {}
    schedule.on_save_checkpoint(None, None, payload)
    assert payload == {"seed": 3}
