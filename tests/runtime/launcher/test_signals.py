import json
import os
import signal
import socket
import threading

import pytest
from threestudio.launcher.signals import FolderInUseError, StopSignals, folder_lock


def test_requests_wait_while_training_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        signals.training = True
        assert not signals.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.requested and signals.exit_code == 130
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.exit_code == 143
        os.kill(os.getpid(), signal.SIGINT)  # a later Ctrl-C does not undo the termination
        assert signals.exit_code == 143
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_outside_a_training_the_process_ends(number, code):
    with pytest.raises(SystemExit) as stopped:
        with StopSignals():
            os.kill(os.getpid(), number)
    assert stopped.value.code == code


def test_handlers_are_taken_back_from_others():
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        signals.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested


def test_other_threads_leave_the_handlers_alone():
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: StopSignals().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_lock_names_its_holder_and_is_gone_afterwards(tmp_path):
    with folder_lock(tmp_path):
        holder = json.loads((tmp_path / ".lock").read_text())
        assert holder == {"pid": os.getpid(), "host": socket.gethostname()}
        with pytest.raises(FolderInUseError, match=(
                rf"in use: process {os.getpid()} on {socket.gethostname()} trains there\. Wait")):
            with folder_lock(tmp_path):
                pass
    assert not (tmp_path / ".lock").exists()
    with folder_lock(tmp_path):
        pass


def test_a_lock_left_by_a_dead_process_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere, longer than this one"}')
    with folder_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_an_unreadable_lock_is_still_respected(tmp_path):
    with folder_lock(tmp_path):
        (tmp_path / ".lock").write_text("garbage")
        with pytest.raises(FolderInUseError, match="another process trains there"):
            with folder_lock(tmp_path):
                pass


@pytest.mark.parametrize("training", [False, True])
def test_forked_workers_ignore_ctrl_c_and_obey_sigterm(training):
    with StopSignals() as signals:
        signals.training = training
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 143
        assert not signals.requested
