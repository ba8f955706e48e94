import pytest
from threestudio.launcher import run_logs
from threestudio.launcher.run_logs import guard_logger, make_loggers


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
    monkeypatch.setattr(run_logs.time, "monotonic", lambda: now[0])
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
