"""Metrics on disk: TensorBoard and CSV, which may fail without stopping a run."""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import threestudio

_GUARDED = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
_FLUSH_PAUSE_SEC = 5.0


def make_loggers(trial_dir: str | os.PathLike, extra: list | None = None) -> list:
    """Return the loggers of a training; one that cannot start is reported and left out.

    Args:
        trial_dir: output folder of the run.
        extra: further Lightning loggers, such as wandb's.
    """
    from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

    makers: list[Callable[[], Any]] = [
        lambda: TensorBoardLogger(trial_dir, name="tb_logs"),
        lambda: CSVLogger(trial_dir, name="csv_logs"),
        *(lambda logger=logger: logger for logger in extra or []),
    ]
    loggers = []
    for make in makers:
        try:
            logger = make()
            _ = logger.experiment  # opens its files, where a fault shows
        except Exception as error:  # a logger may fail in any way, and never stops a run
            threestudio.warn("metrics log left out: %s", error)
        else:
            loggers.append(guard_logger(logger))
    return loggers


def guard_logger(logger: Any) -> Any:
    """Make the first fault of ``logger`` one warning and the end of its logging; return it.

    Files are flushed every few seconds rather than after each step: waiting for TensorBoard's
    writer would cost more than a small step.
    """
    failed = False
    flushed = -math.inf

    def guarded(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed, flushed
            if failed:
                return None
            if method.__name__ == "save":
                if time.monotonic() - flushed < _FLUSH_PAUSE_SEC:
                    return None
                flushed = time.monotonic()
            elif method.__name__ == "finalize":
                flushed = -math.inf  # it saves once more
            try:
                return method(*args, **kwargs)
            except Exception as error:  # see make_loggers
                failed = True
                threestudio.warn("%s stops logging: %s", type(logger).__name__, error)
                return None

        return call

    for name in _GUARDED:
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger
