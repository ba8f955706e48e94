"""Callbacks of the contract: snapshots of code and config, and progress for other programs."""

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

import threestudio
from threestudio.launcher.progress import RunProgress
from threestudio.utils.config import config_to_primitive, dump_config
from threestudio.utils.redaction import redact, redact_tree, redact_values, secret_values
from threestudio.utils.saving import replacing

# Data and weights have their own records; a snapshot is for reading.
_LARGEST_BYTES = 1 << 20


class VersionedCallback(pl.Callback):
    """A callback that saves to ``save_root`` or to ``save_root/version_k``.

    Args:
        save_root: the folder.
        version: k, or a whole name; the next free k if None.
        use_version: whether to use a version folder at all.
    """

    def __init__(self, save_root: str, version: int | str | None = None, use_version: bool = True):
        self.save_root = save_root
        self._version = version
        self.use_version = use_version

    @property
    def version(self) -> int | str:
        """The version, chosen when first asked for."""
        if self._version is None:
            numbers = [int(path.name.split("_")[1]) for path in Path(self.save_root).glob(
                "version_*") if path.name.split("_")[1].isdigit()]
            self._version = max(numbers, default=-1) + 1
        return self._version

    @property
    def savedir(self) -> str:
        """The folder to save in."""
        if not self.use_version:
            return self.save_root
        name = self.version if isinstance(self.version, str) else f"version_{self.version}"
        return os.path.join(self.save_root, name)


class CodeSnapshotCallback(VersionedCallback):
    """Copies the source files of the working copy when a training starts; never stops a run.

    Taken are files that git tracks or does not ignore, except ``load/``, files above 1 MiB and
    those that hold credentials by their names; the credentials of the environment are left out.
    """

    def get_file_list(self) -> list[str]:
        """Return the files to copy, relative to the current folder."""
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            check=True, capture_output=True, text=True,
        ).stdout.split("\0")
        return [name for name in dict.fromkeys(listed)
                if name and not name.startswith("load/") and not _is_private(name)
                and os.path.isfile(name) and os.path.getsize(name) <= _LARGEST_BYTES]

    def save_snapshot(self) -> None:
        """Copy the files."""
        secrets = secret_values()
        for name in self.get_file_list():
            target = os.path.join(self.savedir, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            _copy_without_credentials(name, target, secrets)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        try:
            self.save_snapshot()
        except (OSError, subprocess.SubprocessError) as error:
            threestudio.warn("no code snapshot: %s. It needs git and a git working copy.", error)


class ConfigSnapshotCallback(VersionedCallback):
    """Writes ``parsed.yaml``, the config in force, and ``raw.yaml``, the file it came from.

    Credentials are left out of both; see `threestudio.utils.redaction`.

    Args:
        config_path: the config file that the user named; None leaves ``raw.yaml`` out.
        config: the config in force.
        save_root, version, use_version: see `VersionedCallback`.
    """

    def __init__(self, config_path: str | os.PathLike | None, config: Any, save_root: str,
                 version: int | str | None = None, use_version: bool = True):
        super().__init__(save_root, version, use_version)
        self.config_path = config_path
        self.config = config

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            os.makedirs(self.savedir, exist_ok=True)
            with replacing(os.path.join(self.savedir, "parsed.yaml")) as path:
                dump_config(path, _without_credentials(self.config))
            if self.config_path is not None:
                text = Path(self.config_path).read_text(encoding="utf-8")
                raw = Path(self.savedir, "raw.yaml")
                raw.write_text(redact(text), encoding="utf-8")


def _without_credentials(config: Any) -> Any:
    """The config itself where it holds none, so that nothing else about it changes."""
    # Not resolved: what is escaped stays escaped.
    plain = config_to_primitive(config, resolve=False) if OmegaConf.is_config(config) else config
    clean = redact_tree(plain)
    return config if clean == plain else OmegaConf.create(clean)


def _is_private(name: str) -> bool:
    base = os.path.basename(name)
    return base.startswith(".env") or base == ".netrc" or base.endswith((".pem", ".key"))


def _copy_without_credentials(source: str, target: str, secrets: list[str]) -> None:
    data = Path(source).read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        shutil.copyfile(source, target)
        return
    clean = redact_values(text, secrets)
    Path(target).write_bytes(data if clean == text else clean.encode("utf-8"))


class CustomProgressBar(RunProgress):
    """The progress display under the name that upstream's launcher gave it."""

    def __init__(self, refresh_rate: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.refresh_rate = refresh_rate


class ProgressCallback(pl.Callback):
    """Keeps one line about the run in a file, for a program that watches.

    Args:
        save_path: the file; replaced whole each time.
    """

    def __init__(self, save_path: str) -> None:
        self.save_path = save_path
        self._last = ""

    def write(self, message: str) -> None:
        """Put ``message`` into the file."""
        if message != self._last:
            with replacing(self.save_path) as path:
                Path(path).write_text(message, encoding="utf-8")
            self._last = message

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("Initializing")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any,
        batch_idx: int,
    ) -> None:
        percent = int(100 * trainer.global_step / max(trainer.max_steps, 1))
        self.write(f"Generated {percent}%")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("Rendering validation image")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("Rendering video")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.write("Exporting mesh assets")
