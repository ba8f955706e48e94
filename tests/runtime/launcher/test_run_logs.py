import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import threestudio
from threestudio.launcher.run_logs import guard_logger, make_loggers, make_monitors
from threestudio.launcher.trainer import run_stage
from threestudio.utils import trackers

from tests.fixtures.fake_wandb import recorded_calls, write_fake_wandb


class Recorder:
    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    @property
    def experiment(self):
        if self.fail_at == "experiment":
            raise OSError(28, "No space left on device")
        return self

    def log_metrics(self, metrics, step=None):
        self.calls.append(("log", metrics))
        if self.fail_at == "log":
            raise RuntimeError("network is down")

    def save(self):
        self.calls.append("save")

    def finalize(self, status):
        self.save()
        self.calls.append(("final", status))


def test_the_first_fault_ends_the_logging_only(caplog):
    logger = guard_logger(Recorder("log"))
    logger.log_metrics({"a": 1})
    logger.log_metrics({"a": 2})
    logger.finalize("success")
    assert logger.calls == [("log", {"a": 1})]
    assert caplog.text.count("Recorder stops logging: network is down") == 1


def test_files_are_flushed_seldom_and_at_the_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(trackers.time, "monotonic", lambda: now[0])
    logger = guard_logger(Recorder())
    for _ in range(3):
        logger.save()
        now[0] += 3.0
    logger.finalize("success")
    assert logger.calls == ["save", "save", "save", ("final", "success")]


def test_metrics_reach_both_files(tmp_path):
    loggers = make_loggers(tmp_path)
    for logger in loggers:
        for step in range(3):
            logger.log_metrics({"loss": float(step)}, step)
        logger.finalize("success")
    rows = (tmp_path / "csv_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert rows[0].split(",") == ["loss", "step"] and len(rows) == 4
    assert list((tmp_path / "tb_logs" / "version_0").glob("events.out.tfevents*"))


def test_a_logger_that_cannot_start_is_left_out(tmp_path, caplog):
    broken, fine = Recorder("experiment"), Recorder()
    loggers = make_loggers(tmp_path, [broken, fine])
    assert fine in loggers and broken not in loggers and len(loggers) == 3
    assert "metrics log left out: [Errno 28] No space left on device" in caplog.text


@pytest.mark.parametrize("name", ["csv_logs", "tb_logs"])
def test_an_unwritable_log_folder_is_left_out(tmp_path, name, caplog):
    (tmp_path / name).write_text("a file where the folder should be")
    assert len(make_loggers(tmp_path)) == 1
    assert "metrics log left out" in caplog.text


def test_learning_rates_are_monitored_where_there_is_a_log():
    (monitor,) = make_monitors([Recorder()])
    assert monitor.logging_interval == "step"
    assert make_monitors([]) == []


# A whole training, with loggers that fail or are watched.


@pytest.fixture
def wandb_calls(tmp_path, monkeypatch):
    import pytorch_lightning.loggers.wandb as lightning_wandb

    monkeypatch.syspath_prepend(write_fake_wandb(tmp_path / "site"))
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setenv("FAKE_WANDB_LOG", str(tmp_path / "calls"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(trackers, "_FLUSH_PAUSE_SEC", 0.0)
    yield lambda: recorded_calls(tmp_path / "calls")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny():
    """The tiny system's module, with a system that tracks pictures and can sabotage its logs."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    import tiny_run

    sys.path.remove(folder)

    @threestudio.register("tracked-tiny-system")
    class TrackedTinySystem(tiny_run.TinySystem):
        sabotage = staticmethod(lambda folder: None)

        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                self.sabotage(Path(self.get_save_dir()).parent)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            import torch

            self.save_rgb_image(
                f"v{batch['index']}.png", torch.zeros(2, 2, 3), name="validation_step",
                step=self.true_global_step,
            )  # fmt: skip

    tiny_run.TrackedTinySystem = TrackedTinySystem
    yield tiny_run
    threestudio.__modules__.pop("tracked-tiny-system", None)


def train(tiny, folder, *overrides, argv=()):
    """Six steps in this process; returns the trial's folder."""
    cfg = tiny.make_config(
        folder,
        ["system_type=tracked-tiny-system", "trainer.max_steps=6", "trainer.val_check_interval=3",
         "system.loggers.wandb.enable=true", "system.loggers.wandb.project=p",
         "trainer.enable_progress_bar=false", *overrides],
    )  # fmt: skip
    run_stage(cfg, "train", ["--config", "none.yaml", *argv])
    return Path(cfg.trial_dir)


def of(calls, name):
    return [call for call in calls if call["call"] == name]


def test_a_run_reaches_its_tracker(tiny, tmp_path, wandb_calls):
    folder = train(tiny, tmp_path, "system.loggers.wandb.name=n")
    calls = wandb_calls()
    (init,) = of(calls, "init")
    assert init["project"] == "p" and init["dir"] == str(folder)
    sent = [call["data"] for call in of(calls, "log")]
    losses = {data["trainer/global_step"] for data in sent if "train/loss_fit" in data}
    assert losses == set(range(6))
    assert [data["trainer/global_step"] for data in sent if "lr-Adam/net" in data] == [*range(6)]
    pictures = [data for data in sent if "validation_step" in data]
    assert [data["trainer/global_step"] for data in pictures] == [3, 3, 6, 6]
    assert pictures[0]["validation_step"].endswith("v0.png")
    assert calls[-1]["call"] == "finish"
    assert of(calls, "config")[0]["values"]["trainer"]["max_steps"] == 6
    rows = (folder / "csv_logs/version_0/metrics.csv").read_text().splitlines()
    assert "lr-Adam/net" in rows[0]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's full device")
def test_a_run_outlives_all_its_loggers(tiny, tmp_path, wandb_calls, monkeypatch, caplog):
    def sabotage(folder):
        for path in (*folder.glob("tb_logs/*/events*"), *folder.glob("csv_logs/*/metrics.csv")):
            path.unlink()
            path.symlink_to("/dev/full")
        os.environ["FAKE_WANDB_FAILS"] = "log,finish"

    monkeypatch.setenv("FAKE_WANDB_FAILS", "")
    monkeypatch.setattr(tiny.TrackedTinySystem, "sabotage", staticmethod(sabotage))
    folder = train(tiny, tmp_path, argv=["a=1"])
    assert (folder / "ckpts" / "epoch=0-step=6.ckpt").is_file()
    assert (folder / "save" / "it6-test.json").is_file()
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    stops = [line for line in warnings if "stops logging" in line]
    assert len(stops) == 3
    for name in ("TensorBoardLogger", "CSVLogger", "WandbLogger"):
        assert sum(line.startswith(name) for line in stops) == 1


CANARIES = {
    "environment": "canary1-environment-value",
    "config": "canary2-config-value",
    "address": "canary3-address-value",
    "prompt": "hf_canary4promptvalue0123456789",
    "command": "canary5-command-value",
    "error": "canary6-error-value",
}


def contents(folder):
    """Yield (name, bytes) of every file, and of every member of what is an archive."""
    for path in folder.rglob("*"):
        yield str(path.relative_to(folder)), b""
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for member in archive.namelist():
                        yield f"{path.name}:{member}", archive.read(member)


def test_no_credential_is_in_a_finished_run(tiny, tmp_path, wandb_calls, monkeypatch, caplog):
    monkeypatch.setenv("SOME_API_KEY", CANARIES["environment"])
    source = tmp_path / "raw.yaml"
    source.write_text(f"api_key: {CANARIES['config']}\nx: '{CANARIES['environment']}'\n")
    monkeypatch.chdir(tmp_path)

    def sabotage(folder):
        threestudio.warn("cannot reach https://u:%s@host", CANARIES["error"])
        os.environ["FAKE_WANDB_FAILS"] = "log"

    monkeypatch.setenv("FAKE_WANDB_FAILS", "")
    monkeypatch.setattr(tiny.TrackedTinySystem, "sabotage", staticmethod(sabotage))
    secrets = [
        f"system.loggers.wandb.api_key={CANARIES['config']}",
        f"system.loggers.wandb.name={CANARIES['environment']}",
        f"description=https://user:{CANARIES['address']}@host/?token={CANARIES['address']}",
        f"tag='a red cube {CANARIES['prompt']}'",
    ]
    command = f"system.hub.token={CANARIES['command']}"
    monkeypatch.setattr(sys, "argv", ["launch.py", command])
    cfg = tiny.make_config(
        tmp_path / "out",
        ["system_type=tracked-tiny-system", "trainer.max_steps=6", "trainer.val_check_interval=3",
         "system.loggers.wandb.enable=true", "trainer.enable_progress_bar=false", *secrets],
    )  # fmt: skip
    run_stage(cfg, "train", ["--config", str(source), command], config_path=source)
    found = list(contents(tmp_path / "out"))
    names = " ".join(name for name, _ in found)
    for expected in ("cmd.txt", "parsed.yaml", "raw.yaml", "metrics.csv", "events", "data.pkl"):
        assert expected in names, f"{expected} was not written, so nothing was checked"
    for place, canary in CANARIES.items():
        leaks = [name for name, data in found if canary in name or canary.encode() in data]
        assert leaks == [], f"the canary of {place}"
        assert canary not in str([c for c in wandb_calls() if c["call"] != "init"])
    (init,) = of(wandb_calls(), "init")
    assert not any(canary in str(init) for canary in CANARIES.values())
    # The run itself had them: what is read is never changed.
    assert cfg.system.loggers.wandb.api_key == CANARIES["config"]


def test_a_picture_of_the_code_leaves_private_files_out(tmp_path, monkeypatch):
    import subprocess

    from threestudio.utils.callbacks import CodeSnapshotCallback

    (work := tmp_path / "work").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("SOME_API_KEY", CANARIES["environment"])
    subprocess.run(["git", "init", "-q"], check=True)
    (work / ".env").write_text("SOME_API_KEY=x")
    (work / "server.pem").write_text("PRIVATE")
    (work / "run.py").write_text(f"key = '{CANARIES['environment']}'\napi_key = read()\n")
    (work / "blob.bin").write_bytes(b"\xff\xfe")
    CodeSnapshotCallback(str(tmp_path / "code"), use_version=False).save_snapshot()
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == ["blob.bin", "run.py"]
    text = (tmp_path / "code" / "run.py").read_text()
    assert re.fullmatch(r"key = '<redacted>'\napi_key = read\(\)\n", text)
