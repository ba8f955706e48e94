"""When a training saves, and through what: the Lightning side of `threestudio.utils.checkpoint`."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import CheckpointIO

import threestudio
from threestudio.suggest import did_you_mean
from threestudio.utils.checkpoint import (
    link_checkpoint,
    load_checkpoint,
    remove_checkpoint,
    save_checkpoint,
    step_of_name,
    sweep_leftovers,
)

_KEPT = 2
# A save that takes longer than this share of the pause before it stretches the next pause.
_TIME_SHARE = 0.02
_OTHER_KEYS = (
    "auto_insert_metric_name", "dirpath", "enable_version_counter", "every_n_epochs", "filename",
    "mode", "monitor", "save_on_exception", "save_on_train_epoch_end", "save_weights_only",
    "train_time_interval", "verbose",
)
_OUR_KEYS = ("save_last", "save_top_k", "every_n_train_steps")


class NonFiniteError(ValueError):
    """A loss, gradient or weight is NaN or infinite; the training must stop."""


class AtomicCheckpointIO(CheckpointIO):
    """Makes Lightning write and read through our own functions."""

    def save_checkpoint(self, checkpoint: dict, path, storage_options: Any = None) -> None:
        save_checkpoint(path, checkpoint)

    def load_checkpoint(self, path, map_location: Any = "cpu", weights_only: Any = True) -> dict:
        """Read ``path``; ``weights_only`` is there for Lightning and always true."""
        checkpoint = load_checkpoint(path, map_location=map_location or "cpu")
        # Another program's file may lack what Lightning's version migration asks for.
        checkpoint.setdefault("pytorch-lightning_version", pl.__version__)
        return checkpoint

    def remove_checkpoint(self, path) -> None:
        remove_checkpoint(path)


class CheckpointSchedule(Checkpoint):
    """Saves often enough that a crash costs little, and seldom enough that it costs no time.

    A save is due when 1 % of the steps *and* ``min_interval_sec`` have passed since the last one,
    or ``max_interval_sec`` alone, or ``every_n_train_steps`` divides the step, or the step is the
    last. Saving slower than 2 % of the time lengthens the pauses accordingly, up to the maximum.

    Files are ``epoch=E-step=N.ckpt``, and ``last.ckpt`` as a hard link to the newest. The newest
    two always survive. Of those due by ``every_n_train_steps`` the newest ``save_top_k`` survive
    too, all of them if it is -1.

    A save that fails (disk full, folder gone) is reported, retried when next due, and raises at
    the end of the training if the last one failed too.

    Args:
        folder: where the checkpoints go.
        metadata: entries added to each checkpoint (version, config, profile, seed).
        options: the config's ``checkpoint`` section: ``save_last``, ``save_top_k``,
            ``every_n_train_steps``. Other keys of Lightning's ModelCheckpoint are named in one
            line and ignored.
        min_interval_sec: least pause between two saves.
        max_interval_sec: longest pause.

    Raises:
        ValueError: an option is unknown; the nearest known one is named.
    """

    def __init__(
        self,
        folder: str | Path,
        metadata: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        min_interval_sec: float = 20.0,
        max_interval_sec: float = 900.0,
    ) -> None:
        self.folder = Path(folder)
        self.metadata = dict(metadata or {})
        options = dict(options or {})
        _check_options(options)
        self.save_last = bool(options.get("save_last", True))
        self.save_top_k = int(options.get("save_top_k", -1))
        self.every_n_train_steps = int(options.get("every_n_train_steps") or 0)
        self.min_interval_sec = min_interval_sec
        self.max_interval_sec = max_interval_sec
        self.stop_requested: Callable[[], bool] = lambda: False
        self.last_path: Path | None = None
        self.last_step = -1
        self._last_time = time.monotonic()
        self._last_cost_sec = 0.0
        self._fault: Exception | None = None
        self._milestones: set[Path] = set()

    # When

    def due(self, step: int, max_steps: int, now: float) -> bool:
        """Tell whether to save after ``step`` of ``max_steps`` at monotonic time ``now`` (s)."""
        if step == self.last_step:
            return False
        if step == max_steps or self._is_milestone(step):
            return True
        elapsed = now - self._last_time
        pause = max(self.min_interval_sec, self._last_cost_sec / _TIME_SHARE)
        if elapsed >= self.max_interval_sec:
            return True
        return elapsed >= pause and step - max(self.last_step, 0) >= 0.01 * max_steps

    def _is_milestone(self, step: int) -> bool:
        return self.every_n_train_steps > 0 and step % self.every_n_train_steps == 0

    # Lightning's side

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero and self.folder.is_dir():
            for path in sweep_leftovers(self.folder):
                threestudio.debug("deleted %s, left by an interrupted save", path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last_time = time.monotonic()
        self.last_step = trainer.global_step
        # The state is complete only after the module's own hook (`update_step_end`), which
        # Lightning calls after those of the callbacks; hence the detour.
        module_hook = pl_module.on_train_batch_end

        def on_train_batch_end(*args: Any, **kwargs: Any) -> None:
            module_hook(*args, **kwargs)
            self.after_step(trainer)

        pl_module.__dict__["on_train_batch_end"] = on_train_batch_end

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.__dict__.pop("on_train_batch_end", None)
        if self._fault is not None:
            raise self._fault

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        pl_module.__dict__.pop("on_train_batch_end", None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict
    ) -> None:
        checkpoint.update(self.metadata)

    def after_step(self, trainer: pl.Trainer) -> None:
        """Save if a save is due after the step that just ended."""
        # should_stop: somebody else ends the training here, for example a limit of its time.
        is_due = self.stop_requested() or trainer.should_stop or self.due(
            trainer.global_step, trainer.max_steps, time.monotonic()
        )
        if _any_rank(trainer, is_due):
            self.save(trainer)

    # How

    def save(self, trainer: pl.Trainer) -> None:
        """Save the current state now; all ranks call this, rank 0 writes."""
        step = trainer.global_step
        if step == self.last_step and self.last_path is not None:
            return
        started = time.monotonic()
        path = self.folder / f"epoch={trainer.current_epoch}-step={step}.ckpt"
        check_finite(trainer.lightning_module, trainer.optimizers)
        try:
            trainer.save_checkpoint(path, weights_only=False)
            if trainer.is_global_zero:
                if self._is_milestone(step):
                    self._milestones.add(path)
                if self.save_last:
                    link_checkpoint(path, self.folder / "last.ckpt")
                self._prune()
        except OSError as error:
            self._fault = error
            threestudio.warn("%s. It will be tried again.", error.strerror or error)
        else:
            self._fault = None
            self.last_path = path
            self.last_step = step
        self._last_time = time.monotonic()
        self._last_cost_sec = self._last_time - started

    def _prune(self) -> None:
        files = [path for path in self.folder.glob("*.ckpt") if step_of_name(path) is not None]
        files.sort(key=step_of_name)
        keep = set(files[-_KEPT:])
        milestones = [path for path in files if self._is_milestone(step_of_name(path))]
        if self.save_top_k < 0:
            keep.update(milestones)
        elif self.save_top_k > 0:
            keep.update(milestones[-self.save_top_k:])
        for path in files:
            if path not in keep:
                try:
                    remove_checkpoint(path)
                except OSError as error:
                    threestudio.warn("cannot delete the old checkpoint %s: %s", path, error)


def check_finite(module: torch.nn.Module, optimizers: list | None = None) -> None:
    """Refuse a state that must not be written.

    Raises:
        NonFiniteError: a parameter or optimizer moment has a NaN or infinite element, or a buffer
            a NaN; they are named.
    """
    bad = [name for name, param in module.named_parameters() if not _all_finite(param)]
    bad += [name for name, buffer in module.named_buffers()
            if buffer.is_floating_point() and bool(buffer.isnan().any())]
    for optimizer in optimizers or []:
        for state in optimizer.state.values():
            bad += [f"optimizer state {key}" for key, value in state.items()
                    if isinstance(value, torch.Tensor) and not _all_finite(value)]
    if bad:
        raise NonFiniteError(
            f"{', '.join(dict.fromkeys(bad))} hold NaN or infinite values; nothing was saved, and "
            "the last checkpoint is from before. Lower the learning rate or loss weights, and "
            "resume from it."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # A finite sum proves finite terms in one pass; an overflowing one needs the exact test.
    return bool(tensor.detach().sum().isfinite()) or bool(tensor.detach().isfinite().all())


def _any_rank(trainer: pl.Trainer, flag: bool) -> bool:
    """Whether ``flag`` is true on any rank, so that all of them take the same branch."""
    if trainer.world_size == 1:
        return flag
    return bool(trainer.strategy.reduce_boolean_decision(flag, all=False))


def _check_options(options: Mapping[str, Any]) -> None:
    for key in options:
        if key in _OTHER_KEYS:
            threestudio.info("checkpoint.%s has no effect here and is ignored.", key)
        elif key not in _OUR_KEYS:
            raise ValueError(
                f"checkpoint.{key} is unknown; expected save_last, save_top_k or "
                "every_n_train_steps." + did_you_mean(key, (*_OUR_KEYS, *_OTHER_KEYS))
            )
