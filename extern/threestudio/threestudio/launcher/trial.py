"""The folder of a trial: found, checked and claimed before any work starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from omegaconf import DictConfig

from threestudio.logs import get_rank, info
from threestudio.utils.config_errors import ConfigFileError, ConfigValueError
from threestudio.utils.slug import safe_folder_name

# Any of these in a folder means that a run has written there.
_TRACES = ("ckpts", "save", "tb_logs", "csv_logs", "cmd.txt", "configs")
_MAX_SAME_SECOND = 1000


def check_output_folder(cfg: DictConfig) -> None:
    """Make sure that the experiment's folder can be written, without leaving anything behind.

    Raises:
        ConfigFileError: naming the folder and the system's reason.
    """
    folder = Path(cfg.exp_dir)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigFileError(
            f"the output folder {str(folder)!r} cannot be written ({error.strerror or error} in "
            f"{existing}); choose another one with exp_root_dir=PATH."
        ) from error


def claim_trial_folder(cfg: DictConfig, mode: str, fresh_timestamp: bool) -> Path:
    """Create the trial's folder and return it; ``cfg`` is updated where its name had to change.

    Two starts within one second get different folders. A folder that already holds a run is given
    only to a run that resumes or evaluates it.

    Args:
        cfg: the experiment.
        mode: "train", "validate", "test" or "export".
        fresh_timestamp: the time stamp was made for this start, so the name may be changed.

    Raises:
        ConfigValueError: if the folder holds another run.
        ConfigFileError: if it cannot be created.
    """
    check_output_folder(cfg)
    if get_rank() != 0:
        return Path(cfg.trial_dir)
    try:
        os.makedirs(cfg.exp_dir, exist_ok=True)
        if fresh_timestamp:
            return _claim_new(cfg)
        if mode == "train" and cfg.resume is None:
            refuse_occupied(cfg)
        os.makedirs(cfg.trial_dir, exist_ok=True)
    except OSError as error:
        raise ConfigFileError(
            f"the output folder {cfg.trial_dir!r} cannot be created: {error.strerror}; choose "
            "another one with exp_root_dir=PATH."
        ) from error
    return Path(cfg.trial_dir)


def refuse_occupied(cfg: DictConfig) -> None:
    """Raise if the trial's folder holds a run.

    Raises:
        ConfigValueError: naming the folder and the ways out.
    """
    folder = Path(cfg.trial_dir)
    if get_rank() == 0 and any((folder / trace).exists() for trace in _TRACES):
        raise ConfigValueError(
            f"the folder {str(folder)!r} holds a run already and would be overwritten; continue it "
            "with resume=auto, or start another with tag=NAME or use_timestamp=true timestamp=null."
        )


def _claim_new(cfg: DictConfig) -> Path:
    first = cfg.timestamp
    for attempt in range(1, _MAX_SAME_SECOND):
        if attempt > 1:
            set_trial(cfg, f"{first}-{attempt}")
        try:
            # mkdir fails where the folder exists, so only one of two starters gets it.
            os.mkdir(cfg.trial_dir)
            return Path(cfg.trial_dir)
        except FileExistsError:
            info("%s is taken; trying the next name.", cfg.trial_dir)
    raise ConfigValueError(f"no free folder name like {cfg.trial_dir!r}; choose another tag.")


def set_trial(cfg: DictConfig, timestamp: str | None) -> None:
    """Set the time stamp of an experiment and the names that follow from it."""
    cfg.timestamp = timestamp
    cfg.trial_name = safe_folder_name(cfg.tag, timestamp or "")
    cfg.trial_dir = os.path.join(cfg.exp_dir, cfg.trial_name)


def trials_of(exp_dir: str | Path, tag: str) -> list[tuple[str, Path]]:
    """List (time stamp, folder) of the trials with a tag, newest first; "" for one without stamp.

    The order is that of the time stamps in the names, numbers compared as numbers.
    """
    prefix = safe_folder_name(tag)
    folder = Path(exp_dir)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        stamp = path.name.removeprefix(prefix) if path.name.startswith(prefix) else None
        if path.is_dir() and (stamp == "" or (stamp and stamp.startswith("@"))):
            found.append((stamp, path))
    return sorted(found, key=lambda item: _stamp_order(item[0]), reverse=True)


def _stamp_order(stamp: str) -> list[int]:
    digits = "".join(letter if letter.isdigit() else " " for letter in stamp)
    return [int(number) for number in digits.split()]
