import os
import socket
import sys
import threading

import pytest
from threestudio.utils import trackers
from threestudio.utils.trackers import (
    attempt,
    finish_wandb,
    guard_logger,
    has_stopped,
    start_wandb,
    track_media,
)

from tests.fixtures.fake_wandb import recorded_calls, write_fake_wandb


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    """Put a recording package in wandb's place; returns what crossed its boundary so far."""
    import pytorch_lightning.loggers.wandb as lightning_wandb

    monkeypatch.syspath_prepend(write_fake_wandb(tmp_path / "site"))
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls"))
    for name in ("WANDB_MODE", "WANDB_BASE_URL", "WANDB_PROJECT", "FAKE_WANDB_FAILS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    yield lambda: recorded_calls(tmp_path / "calls")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


def named(calls, name):
    return [call for call in calls if call["call"] == name]


def test_without_a_network_wandb_records_offline(wandb_calls, tmp_path, caplog):
    logger = start_wandb({"project": "p", "name": "n"}, tmp_path, {"seed": 1})
    (init,) = named(wandb_calls(), "init")
    assert (init["project"], init["mode"]) == ("p", "offline")
    assert init["dir"] == str(tmp_path)
    assert init["settings"]["console"] == "off" and init["settings"]["disable_git"] is True
    assert init["settings"]["finish_timeout"] == 60
    assert named(wandb_calls(), "config")[0]["values"] == {"seed": 1}
    assert "127.0.0.1 cannot be reached" in caplog.text and "`wandb sync`" in caplog.text
    assert caplog.text.count("WARNING") == 1
    finish_wandb(logger)
    assert wandb_calls()[-1]["call"] == "finish"


def test_wandb_without_a_key_asks_nobody(wandb_calls, tmp_path, caplog, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        finish_wandb(start_wandb({}, tmp_path))
        assert named(wandb_calls(), "login") == [{"call": "login", "prompt": False}]
        assert named(wandb_calls(), "init")[-1]["mode"] == "offline"
        assert "there is no API key; log in with `wandb login`" in caplog.text
        monkeypatch.setenv("FAKE_WANDB_KEY", "1")
        start_wandb({}, tmp_path)
    # With a server and a key, and where the environment decides, no mode is forced.
    assert "mode" not in named(wandb_calls(), "init")[-1] and caplog.text.count("WARNING") == 1


def test_wandb_mode_of_the_environment_decides(wandb_calls, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    start_wandb({}, tmp_path)
    assert "mode" not in named(wandb_calls(), "init")[0] and caplog.text == ""


def test_what_wandb_is_told_holds_no_credentials(wandb_calls, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "canary-in-environment")
    command = ["launch.py", "system.hub.token=canary-in-argument", "x=canary-in-environment"]
    monkeypatch.setattr(sys, "argv", command)
    start_wandb({}, tmp_path, {"a": {"api_key": "canary-in-config"}, "b": "https://canary@host"})
    (init,) = named(wandb_calls(), "init")
    assert init["argv"] == ["launch.py", "system.hub.token=<redacted>", "x=<redacted>"]
    assert sys.argv is command
    assert "canary" not in str(wandb_calls())


@pytest.mark.parametrize("place", ["login", "init", "config"])
def test_wandb_that_cannot_start_is_one_warning(wandb_calls, tmp_path, caplog, monkeypatch, place):
    monkeypatch.setenv("FAKE_WANDB_FAILS", place)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("FAKE_WANDB_KEY", "1")
        assert start_wandb({}, tmp_path, {"seed": 1}) is None
    assert caplog.text.count("WARNING") == 1
    assert f"wandb is left out: lost the server at https://<redacted>@host/{place}" in caplog.text


def test_wandb_that_is_not_installed_is_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what import makes of an absent module
    monkeypatch.setattr(trackers, "_is_absent", lambda name: True)
    assert start_wandb({}, tmp_path) is None
    assert "wandb is left out: it is not installed; `pip install wandb`." in caplog.text
    assert caplog.text.count("WARNING") == 1


def test_wandb_that_is_broken_says_how(tmp_path, caplog, monkeypatch):
    (package := tmp_path / "site" / "wandb").mkdir(parents=True)
    (package / "__init__.py").write_text("import a_module_that_it_needs")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert start_wandb({}, tmp_path) is None
    assert "it is not installed (No module named 'a_module_that_it_needs')" in caplog.text


def test_pictures_and_videos_carry_name_and_step(wandb_calls, tmp_path, caplog, monkeypatch):
    logger = guard_logger(start_wandb({}, tmp_path))
    track_media(logger, "image", "validation_step", "a.png", 7)
    track_media(logger, "video", "test", "a.mp4", 9)
    sent = [call["data"] for call in named(wandb_calls(), "log")]
    assert sent == [
        {"validation_step": "image a.png", "trainer/global_step": 7},
        {"test": "video a.mp4", "trainer/global_step": 9},
    ]
    caplog.clear()
    monkeypatch.setenv("FAKE_WANDB_FAILS", "Image,log,finish")
    track_media(logger, "image", "x", "b.png", 8)
    logger.log_metrics({"loss": 1.0}, 8)
    finish_wandb(logger)
    assert has_stopped(logger) and caplog.text.count("WARNING") == 1
    assert "WandbLogger stops logging: lost the server" in caplog.text


class Broken:
    def log_metrics(self, metrics, step=None):
        raise ValueError("cannot log that") from OSError(28, "No space left on device")


def test_a_wrapped_fault_is_told_by_its_cause(caplog):
    guard_logger(Broken()).log_metrics({})
    assert "Broken stops logging: [Errno 28] No space left on device" in caplog.text


def test_an_action_is_tried_until_the_first_fault(caplog):
    logger = Broken()
    assert attempt(logger, lambda: 3) == 3
    assert attempt(logger, lambda: 1 / 0) is None
    assert attempt(logger, lambda: 3) is None
    assert caplog.text.count("Broken stops logging: division by zero") == 1


def put_full_device_in_place_of(path):
    """Let what is written to ``path`` from now on meet the device that is always full."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_disk_that_fills_under_tensorboard_is_one_warning(tmp_path, caplog, monkeypatch):
    from pytorch_lightning.loggers import TensorBoardLogger

    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    monkeypatch.setattr(trackers, "_FLUSH_PAUSE_SEC", 0.0)
    logger = guard_logger(TensorBoardLogger(tmp_path, name="tb_logs"))
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    (events,) = (tmp_path / "tb_logs" / "version_0").glob("events*")
    put_full_device_in_place_of(events)  # the writer opens it anew for each flush
    done = threading.Event()

    def go_on():
        for step in range(100):  # more than the writer's queue holds
            logger.log_metrics({"loss": float(step)}, step)
            logger.save()
        logger.finalize("success")
        done.set()

    threading.Thread(target=go_on, daemon=True).start()
    assert done.wait(30), "logging hangs"
    assert has_stopped(logger)
    assert caplog.text.count("TensorBoardLogger stops logging") == 1
    assert "No space left on device" in caplog.text
    assert tracebacks == []


def test_faults_of_other_threads_are_heard(monkeypatch):
    heard = []
    monkeypatch.setattr(threading, "excepthook", lambda args: heard.append(args.exc_value))
    guard_logger(Broken())
    guard_logger(Broken())
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()
    assert [type(error) for error in heard] == [ZeroDivisionError]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_disk_that_is_full_under_csv_is_one_warning(tmp_path, caplog, monkeypatch):
    from pytorch_lightning.loggers import CSVLogger

    logger = guard_logger(CSVLogger(tmp_path, name="csv_logs"))
    monkeypatch.setattr(trackers, "_FLUSH_PAUSE_SEC", 0.0)
    logger.log_metrics({"loss": 1.0}, 0)
    put_full_device_in_place_of(tmp_path / "csv_logs" / "version_0" / "metrics.csv")
    logger.save()
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    assert caplog.text.count("CSVLogger stops logging: [Errno 28] No space left") == 1
