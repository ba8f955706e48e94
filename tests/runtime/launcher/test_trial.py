"""Folders of trials: unwritable, taken, two starts in one second."""

import pytest
from threestudio.launcher.trial import (
    check_output_folder,
    claim_trial_folder,
    refuse_occupied,
    set_trial,
    trials_of,
)
from threestudio.utils.config import ExperimentConfig, parse_structured
from threestudio.utils.config_errors import ConfigError


def experiment(tmp_path, **values):
    return parse_structured(
        ExperimentConfig, {"exp_root_dir": str(tmp_path), "name": "n", "tag": "a_cube", **values}
    )


def test_two_starts_within_one_second_get_two_folders(tmp_path):
    stamp = "@20260101-000000"
    first = claim_trial_folder(experiment(tmp_path, timestamp=stamp), "train", True)
    cfg = experiment(tmp_path, timestamp=stamp)
    second = claim_trial_folder(cfg, "train", True)
    assert first.name == "a_cube@20260101-000000"
    assert second.name == "a_cube@20260101-000000-2"
    assert cfg.trial_dir == str(second) and cfg.trial_name == second.name


def test_a_named_trial_that_holds_a_run_is_refused_for_training(tmp_path):
    cfg = experiment(tmp_path, use_timestamp=False)
    folder = claim_trial_folder(cfg, "train", False)
    claim_trial_folder(cfg, "train", False)  # still empty, so still free
    (folder / "ckpts").mkdir()
    with pytest.raises(ConfigError, match="holds a run already.*resume=auto, or .*tag=NAME"):
        claim_trial_folder(cfg, "train", False)
    assert claim_trial_folder(cfg, "test", False) == folder
    cfg.resume = "x.ckpt"
    assert claim_trial_folder(cfg, "train", False) == folder


def test_other_ranks_leave_the_folder_to_rank_zero(tmp_path, monkeypatch):
    cfg = experiment(tmp_path, use_timestamp=False)
    (claim_trial_folder(cfg, "train", False) / "save").mkdir()
    monkeypatch.setenv("RANK", "1")
    refuse_occupied(cfg)
    claim_trial_folder(cfg, "train", False)


def test_unwritable_output_folder_is_refused_before_work(tmp_path):
    (tmp_path / "a_file").write_text("")
    cfg = experiment(tmp_path / "a_file" / "below")
    with pytest.raises(ConfigError, match="output folder .* cannot be written .*exp_root_dir=PATH"):
        check_output_folder(cfg)


def test_an_unwritable_parent_is_found_by_writing(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("threestudio.launcher.trial.tempfile.TemporaryFile", refuse)
    with pytest.raises(ConfigError, match="Permission denied in"):
        check_output_folder(experiment(tmp_path))


def test_checking_leaves_nothing_behind(tmp_path):
    check_output_folder(experiment(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_folders_place_is_one_sentence(tmp_path):
    (tmp_path / "n").write_text("")
    with pytest.raises(ConfigError, match="output folder"):
        claim_trial_folder(experiment(tmp_path), "train", True)


def test_trials_of_a_tag_newest_first(tmp_path):
    names = [
        "a_cube",
        "a_cube@20260102-000000-2",
        "a_cube@20260102-000000-10",
        "a_cube@20260102-000000",
        "a_cube_and_more@20260109-000000",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "a_cube@20260110-000000").write_text("a file")
    assert [stamp for stamp, _ in trials_of(tmp_path, "a_cube")] == [
        "@20260102-000000-10",
        "@20260102-000000-2",
        "@20260102-000000",
        "",
    ]
    assert trials_of(tmp_path / "absent", "a_cube") == []


def test_setting_a_trial_changes_all_its_names(tmp_path):
    cfg = experiment(tmp_path)
    set_trial(cfg, None)
    assert cfg.timestamp is None and cfg.trial_name == "a_cube"
    assert cfg.trial_dir == f"{tmp_path}/n/a_cube"
