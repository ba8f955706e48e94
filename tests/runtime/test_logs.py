"""Log helpers speak on rank 0 only, through the logger that extensions know."""

import logging

import pytest
import threestudio
from threestudio.logs import get_rank


def test_helpers_write_to_the_logger_of_the_contract(caplog):
    assert threestudio.logger is logging.getLogger("pytorch_lightning")
    with caplog.at_level("DEBUG", logger="pytorch_lightning"):
        threestudio.debug("d")
        threestudio.info("step %d", 3)
        threestudio.warn("w")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("DEBUG", "d"),
        ("INFO", "step 3"),
        ("WARNING", "w"),
    ]
    assert caplog.records[0].filename == "test_logs.py"  # the caller's line, not the helper's


def test_other_ranks_are_silent(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("DEBUG", logger="pytorch_lightning"):
        threestudio.info("nobody hears this")
    assert caplog.records == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
def test_rank_comes_from_the_launchers_variables(monkeypatch, name):
    for other in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        monkeypatch.delenv(other, raising=False)
    assert get_rank() == 0
    monkeypatch.setenv(name, "3")
    assert get_rank() == 3


def test_the_first_variable_wins(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "5")
    monkeypatch.setenv("RANK", "2")
    assert get_rank() == 2
