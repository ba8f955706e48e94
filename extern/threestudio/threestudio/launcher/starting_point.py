"""What a run starts from: the checkpoints that ``resume`` and ``system.weights`` name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from threestudio.launcher.trial import trials_of
from threestudio.utils.config_errors import ConfigFileError, ConfigValueError
from threestudio.utils.slug import safe_relative_path

RESUME_AUTO = "auto"
_URL = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True)
class Trial:
    """An existing trial: its time stamp ("" without one), its folder, its newest checkpoint."""

    timestamp: str
    folder: Path
    checkpoint: Path


def find_trial_to_resume(exp_root_dir: str, name: str, tag: str) -> Trial | None:
    """Return the newest trial of an experiment and tag that holds a readable checkpoint, or None.

    Damaged checkpoints are passed over, each with one line.

    Raises:
        ConfigFileError: if trials exist and hold checkpoints, but none of them is readable.
    """
    from threestudio.utils.checkpoint import find_newest_checkpoint

    faults = []
    for timestamp, folder in trials_of(Path(exp_root_dir) / safe_relative_path(name), tag):
        if not any((folder / "ckpts").glob("*.ckpt")):
            continue
        try:
            return Trial(timestamp, folder, find_newest_checkpoint(folder))
        except FileNotFoundError as error:
            faults.append(str(error))
    if faults:
        raise ConfigFileError("resume=auto found no readable checkpoint: " + " ".join(faults))
    return None


def nothing_to_resume(exp_root_dir: str, name: str, tag: str) -> ConfigFileError:
    """Return the error for ``resume=auto`` where no run exists."""
    folder = Path(exp_root_dir) / safe_relative_path(name)
    return ConfigFileError(
        f"resume=auto found nothing to resume: {str(folder)!r} holds no run of tag {tag!r} with a "
        "checkpoint. Leave resume out to start a new run, or name a file with resume=PATH."
    )


def locate_checkpoint(key: str, value: str) -> Path:
    """Return the file that ``resume`` or ``system.weights`` names, with ``LAST`` expanded.

    Raises:
        ConfigValueError: for a URL or a folder.
        ConfigFileError: if there is no such file; names its neighbours.
    """
    from threestudio.utils.misc import find_last_path

    if _URL.match(value):
        raise ConfigValueError(f"{key} is {value!r}, a URL; download the file and give its path.")
    try:
        path = Path(find_last_path(value))
    except FileNotFoundError as error:
        raise ConfigFileError(f"{key}: {error}") from error
    if path.is_dir():
        inside = sorted(path.glob("*.ckpt")) or sorted(path.glob("ckpts/*.ckpt"))
        hint = f", for example {inside[-1]}" if inside else ""
        raise ConfigValueError(f"{key} is {value!r}, a folder; give a checkpoint file{hint}.")
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        hint = f" That folder holds {', '.join(near[:4])}." if near else ""
        raise ConfigFileError(f"{key} is {value!r}, but there is no such file.{hint}")
    return path


def read_recorded_profile(key: str, path: Path) -> str | None:
    """Return the profile that a checkpoint was trained with, None if it records none.

    The whole file is read, so a damaged or dangerous one is refused here, before any work.

    Raises:
        ConfigValueError: if the checkpoint cannot be used; says why.
    """
    from threestudio.utils.checkpoint import load_checkpoint

    try:
        recorded = load_checkpoint(path, map_location="cpu").get("profile")
    except (ValueError, OSError) as error:
        raise ConfigValueError(f"{key}: {error}") from error
    return recorded if isinstance(recorded, str) else None


def has_weights(cfg: Any) -> bool:
    """Whether a key of the system names trained weights, see `BaseSystem.weights_keys`."""
    import threestudio

    keys = getattr(threestudio.find(cfg.system_type), "weights_keys", ("weights",))
    return any(cfg.system.get(key) for key in keys)
