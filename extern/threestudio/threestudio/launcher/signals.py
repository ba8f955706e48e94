"""Ctrl-C, SIGTERM, and the lock that keeps two trainings out of one folder.

Ctrl-C once finishes the step, saves, renders and exits with 130; twice quits at once. SIGTERM
finishes the step, saves and exits with 143. Before the first step there is nothing to save, and
afterwards everything is saved, so there both end the process directly.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import threestudio

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class StopSignals:
    """Context in which SIGINT and SIGTERM become requests while a training runs.

    Attributes:
        exit_code: 0, or 130 or 143 once a stop was requested.
        training: whether requests wait for the end of the step; set by the training itself.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.training = False
        self._previous: dict = {}
        self._pid = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether the training should end after this step."""
        return self.exit_code != 0

    def __enter__(self) -> "StopSignals":
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def install(self) -> None:
        """Take the two signals, also from whoever took them in between (Lightning does)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            previous = signal.signal(number, self._handle)
            self._previous.setdefault(number, previous)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self._pid:
            # A forked data worker: it leaves Ctrl-C to us, and ends when it is told to.
            if number == signal.SIGTERM:
                os._exit(TERMINATED)
            return
        code = INTERRUPTED if number == signal.SIGINT else TERMINATED
        if not self.training:
            raise SystemExit(code)
        if number == signal.SIGINT and self.exit_code == INTERRUPTED:
            _say("Interrupted twice: quitting now.")
            os._exit(INTERRUPTED)
        if self.exit_code != TERMINATED:
            self.exit_code = code
        if number == signal.SIGINT:
            _say(
                "Interrupted: finishing the step, then saving and rendering. "
                "Press Ctrl-C again to quit at once."
            )
        else:
            _say("Terminated: finishing the step, then saving.")


def _say(text: str) -> None:
    # A handler may run inside another write to the log, which must not be entered twice.
    with contextlib.suppress(OSError):
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{text}\n".encode())


class FolderInUseError(OSError):
    """Another process trains in the same output folder."""


@contextlib.contextmanager
def folder_lock(folder: str | Path) -> Iterator[None]:
    """Hold the lock file of an output folder; a lock whose process died is taken over.

    The operating system drops the lock with the process, so none is ever stale. The file itself
    names the holder.

    Raises:
        FolderInUseError: another process holds it; its pid and host are named.
    """
    path = Path(folder) / ".lock"
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(_in_use(path, folder)) from None
        except OSError as error:
            threestudio.warn("the file system of %s has no locks (%s).", folder, error)
        holder = {"pid": os.getpid(), "host": socket.gethostname()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
        with contextlib.suppress(OSError):
            path.unlink()
    finally:
        os.close(descriptor)


def _in_use(path: Path, folder: str | Path) -> str:
    try:
        holder = json.loads(path.read_text())
        who = f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process"
    return (
        f"{folder} is in use: {who} trains there. Wait for it, stop it, or train elsewhere "
        "(another tag, or use_timestamp=true)."
    )
