"""Runs of the tiny system in processes of their own.

A server process imports everything once and forks for each run, so that a run costs its steps
rather than seconds of imports, and can be killed without harm.
"""

import multiprocessing
import os
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class TinyRun:
    """One run in a process; ``text`` is what it wrote."""

    def __init__(self, context, folder, mode, overrides, log, environment):
        import tiny_run

        self.log = log
        self.process = context.Process(
            target=tiny_run.run_in_child, args=(str(folder), mode, list(overrides), str(log),
                                              environment)
        )
        self.process.start()

    @property
    def text(self):
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, timeout=240):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"the run did not end in {timeout} s: {self.text}")
        return self.process.exitcode

    def wait_for(self, predicate, timeout=240):
        """Wait until ``predicate()`` is true or the run ends."""
        limit = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < limit, self.text
            if self.process.exitcode is not None:
                return
            time.sleep(0.002)

    def signal(self, number):
        os.kill(self.process.pid, number)


@pytest.fixture(scope="session")
def fork_context():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny_run"])
    sys.path.insert(0, str(HERE))
    with pytest.MonkeyPatch.context() as patch:
        # The server takes its path from the environment only.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
        forkserver.ensure_running()
    yield context
    sys.path.remove(str(HERE))


@pytest.fixture
def start(fork_context, tmp_path):
    """Start a run in ``tmp_path``: ``start(mode, "key=value", ..., name="a")``."""
    runs = []

    def start_run(mode, *overrides, name="a", environment=()):
        log = tmp_path / f"{name}-{len(runs)}.log"
        runs.append(TinyRun(fork_context, tmp_path / name, mode, overrides, log,
                            dict(environment)))
        return runs[-1]

    yield start_run
    for run in runs:
        if run.process.is_alive():
            run.process.kill()


@pytest.fixture
def tiny(fork_context):
    """The module of the tiny system, in this process."""
    import tiny_run

    return tiny_run


@pytest.fixture
def trial(tmp_path):
    """Output folder of the run called ``name``."""
    return lambda name="a": tmp_path / name / "tiny" / "run"
