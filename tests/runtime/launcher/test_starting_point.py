"""Checkpoints that a run starts from: found, or refused with a sentence."""

import os
import pickle

import pytest
import torch
from threestudio.launcher.starting_point import (
    find_trial_to_resume,
    locate_checkpoint,
    nothing_to_resume,
    read_recorded_profile,
)
from threestudio.utils.checkpoint import save_checkpoint
from threestudio.utils.config_errors import ConfigError


def write_checkpoint(folder, name="last.ckpt", step=10, **entries):
    (folder / "ckpts").mkdir(parents=True, exist_ok=True)
    path = folder / "ckpts" / name
    save_checkpoint(path, {"state_dict": {}, "epoch": 0, "global_step": step, **entries})
    return path


@pytest.fixture
def experiment(tmp_path):
    """Folder of an experiment "n" with two trials of one tag; a newer start wrote nothing."""
    folder = tmp_path / "n"
    write_checkpoint(folder / "a_cube@20260101-000000")
    write_checkpoint(folder / "a_cube@20260102-000000")
    (folder / "a_cube@20260103-000000" / "ckpts").mkdir(parents=True)
    return folder


def test_the_newest_trial_with_a_checkpoint_is_resumed(experiment, tmp_path):
    trial = find_trial_to_resume(str(tmp_path), "n", "a_cube")
    assert trial.timestamp == "@20260102-000000"
    assert trial.checkpoint == experiment / "a_cube@20260102-000000" / "ckpts" / "last.ckpt"


def test_a_trial_whose_checkpoints_are_damaged_is_passed_over(experiment, tmp_path):
    (experiment / "a_cube@20260102-000000" / "ckpts" / "last.ckpt").write_bytes(b"")
    assert find_trial_to_resume(str(tmp_path), "n", "a_cube").timestamp == "@20260101-000000"


def test_only_damaged_checkpoints_are_an_error(experiment, tmp_path):
    for path in experiment.glob("*/ckpts/last.ckpt"):
        path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConfigError, match="no readable checkpoint"):
        find_trial_to_resume(str(tmp_path), "n", "a_cube")


def test_nothing_to_resume_says_where_it_looked(experiment, tmp_path):
    assert find_trial_to_resume(str(tmp_path), "n", "a_dog") is None
    message = str(nothing_to_resume(str(tmp_path), "n", "a_dog"))
    assert "nothing to resume" in message and "'a_dog'" in message and "resume=PATH" in message


def test_a_file_is_located_and_last_expanded(experiment):
    path = experiment / "a_cube@20260101-000000" / "ckpts" / "last.ckpt"
    assert locate_checkpoint("resume", str(path)) == path
    found = locate_checkpoint("system.weights", f"{experiment}/a cubeLAST/ckpts/last.ckpt")
    assert found == experiment / "a_cube@20260102-000000" / "ckpts" / "last.ckpt"


def test_what_is_no_checkpoint_file_is_refused(experiment):
    trial = experiment / "a_cube@20260101-000000"
    with pytest.raises(ConfigError, match="resume is 'https://x/y.ckpt', a URL; download the file"):
        locate_checkpoint("resume", "https://x/y.ckpt")
    with pytest.raises(ConfigError, match="a folder; give a checkpoint file, for example .*last"):
        locate_checkpoint("resume", str(trial))
    with pytest.raises(ConfigError, match="no such file. That folder holds .*last.ckpt"):
        locate_checkpoint("system.weights", str(trial / "ckpts" / "lost.ckpt"))
    with pytest.raises(ConfigError, match="resume: .*starts? with 'nobody'"):
        locate_checkpoint("resume", f"{experiment}/nobodyLAST/ckpts/last.ckpt")


def test_the_recorded_profile_is_read(tmp_path):
    assert read_recorded_profile("resume", write_checkpoint(tmp_path, profile="paper")) == "paper"
    other = write_checkpoint(tmp_path, "b.ckpt")
    assert read_recorded_profile("resume", other) is None


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (os.mkdir, (self.canary,))


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path, writer):
    canary = tmp_path / "canary"
    path = tmp_path / "evil.ckpt"
    content = {"state_dict": Payload(str(canary))}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ConfigError, match="system.weights: .*evil.ckpt"):
        read_recorded_profile("system.weights", path)
    assert not canary.exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = write_checkpoint(tmp_path, extra=torch.zeros(1000))
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ConfigError, match="resume: .*last.ckpt"):
        read_recorded_profile("resume", path)
