"""Loggers that may fail without stopping a run: the guard around them, and wandb's beginning.

A logger's first fault, at whatever call, is one warning and the end of its logging. What a tracker
is told about the run, its command line and config, holds no credentials.
"""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import threestudio
from threestudio.utils.hub import unreachable
from threestudio.utils.redaction import redact, redact_tree

_GUARDED = (
    "log_metrics", "log_hyperparams", "log_graph", "save", "finalize", "after_save_checkpoint",
)  # fmt: skip
_FLUSH_PAUSE_SEC = 5.0
_INIT_SECONDS = 30
_FINISH_SECONDS = 60
_STOPPED = "_stopped_by_a_fault"


def guard_logger(logger: Any) -> Any:
    """Make the first fault of ``logger`` one warning and the end of its logging; return it.

    Files are flushed every few seconds rather than after each step: waiting for TensorBoard's
    writer would cost more than a small step.
    """
    _hear_writer_threads_once()
    flushed = -math.inf

    def guarded(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal flushed
            if method.__name__ == "save":
                if time.monotonic() - flushed < _FLUSH_PAUSE_SEC:
                    return None
                flushed = time.monotonic()
            elif method.__name__ == "finalize":
                flushed = -math.inf  # it saves once more
            return attempt(logger, method, *args, **kwargs)

        return call

    for name in _GUARDED:
        if hasattr(logger, name):
            setattr(logger, name, guarded(getattr(logger, name)))
    return logger


def attempt(logger: Any, action: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call ``action`` unless ``logger`` failed before; a fault is one warning and returns None."""
    if has_stopped(logger):
        return None
    try:
        return action(*args, **kwargs)
    except Exception as error:  # a logger may fail in any way, and never stops a run
        setattr(logger, _STOPPED, True)
        threestudio.warn("%s stops logging: %s", type(logger).__name__, describe_fault(error))
        return None


def has_stopped(logger: Any) -> bool:
    """Tell whether a fault ended the logging of ``logger``."""
    return bool(getattr(logger, _STOPPED, False))


def describe_fault(error: BaseException) -> str:
    """The cause of a logger's fault in one line: a wrapped error by what it wraps."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    text = " ".join(str(cause).split())
    return redact(text or type(cause).__name__)


def start_wandb(cfg: Mapping[str, Any], folder: str | os.PathLike, config: Any = None) -> Any:
    """Begin a run of wandb and return its Lightning logger; None, with a warning, if that fails.

    Without a network or without credentials it records offline, below ``folder``. WANDB_MODE
    decides alone where it is set. Nobody is asked for a key: a run must not wait for an answer.

    Args:
        cfg: ``project`` and ``name``, each optional.
        folder: output folder of the run; wandb's files lie in ``folder/wandb``.
        config: the experiment as plain containers, shown with the run without credentials.
    """
    try:
        import wandb
        from pytorch_lightning.loggers import WandbLogger

        mode = None if os.environ.get("WANDB_MODE") else _wandb_mode(wandb, folder)
        logger = WandbLogger(
            project=redact_tree(cfg.get("project")),
            name=redact_tree(cfg.get("name")),
            save_dir=folder,
            settings=_wandb_settings(wandb),
            **({} if mode is None else {"mode": mode}),
        )
        with _redacted_command():
            _ = logger.experiment
        if config is not None:
            logger.log_hyperparams(redact_tree(config))
    except ImportError as error:
        detail = "" if _is_absent("wandb") else f" ({describe_fault(error)})"
        threestudio.warn("wandb is left out: it is not installed%s; `pip install wandb`.", detail)
    except Exception as error:  # a tracker may fail in any way, and never stops a run
        threestudio.warn("wandb is left out: %s", describe_fault(error))
    else:
        return logger
    return None


def finish_wandb(logger: Any) -> None:
    """End the run that `start_wandb` began, so that the next stage begins its own."""
    experiment = getattr(logger, "_experiment", None)
    if experiment is not None:
        attempt(logger, experiment.finish)


def track_media(logger: Any, kind: str, name: str, path: str, step: int | None) -> None:
    """Send a picture (kind "image") or a video (kind "video") to wandb under ``name``."""

    def send() -> None:
        import wandb

        media = wandb.Image(path) if kind == "image" else wandb.Video(path)
        logger.experiment.log({name: media, "trainer/global_step": step})

    attempt(logger, send)


def _wandb_mode(wandb: Any, folder: str | os.PathLike) -> str | None:
    """Return "offline" with a line that says why, or None where the server can be used."""
    address = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    cause = unreachable(address)
    if cause is None and not wandb.login(prompt=False):
        cause = "there is no API key; log in with `wandb login`"
    if cause is None:
        return None
    threestudio.warn(
        "wandb records offline in %s: %s. Send it later with `wandb sync`.",
        os.path.join(folder, "wandb"), redact(cause),
    )  # fmt: skip
    return "offline"


def _wandb_settings(wandb: Any) -> Any:
    """Neither the terminal's text nor uncommitted code is sent, and waiting has an end."""
    chosen = {
        "console": "off",
        "disable_code": True,
        "disable_git": True,
        "init_timeout": _INIT_SECONDS,
    }
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):
        chosen["finish_timeout"] = _FINISH_SECONDS
    return wandb.Settings(**chosen)


@contextlib.contextmanager
def _redacted_command() -> Iterator[None]:
    """Let a tracker that records the command line see it without credentials."""
    command = sys.argv
    sys.argv = [redact(argument) for argument in command]
    try:
        yield
    finally:
        sys.argv = command


def _is_absent(module: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(module) is None


def _hear_writer_threads_once() -> None:
    """Keep TensorBoard's writer thread from printing a traceback beside our warning.

    The writer hands the thread's error to its next caller, which is guarded.
    """
    previous = threading.excepthook
    if getattr(previous, "_leaves_writers_out", False):
        return

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            previous(args)

    hook._leaves_writers_out = True
    threading.excepthook = hook
