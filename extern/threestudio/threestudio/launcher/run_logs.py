"""Metrics on disk and at trackers: TensorBoard, CSV, wandb; any may fail without stopping a run."""

import os
from collections.abc import Callable
from typing import Any

import threestudio
from threestudio.utils.trackers import describe_fault, guard_logger


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
            threestudio.warn("metrics log left out: %s", describe_fault(error))
        else:
            loggers.append(guard_logger(logger))
    return loggers


def make_monitors(loggers: list) -> list:
    """Return the callbacks that log on their own: the learning rates, where there is a log."""
    from pytorch_lightning.callbacks import LearningRateMonitor

    return [LearningRateMonitor("step")] if loggers else []
