"""The benchmark of the pair source: what a row measures, and how the table says it."""

import argparse
import subprocess
import sys

import pytest


@pytest.fixture
def pair_source(load):
    return load("pair_source")


def test_a_row_measures_pairs_and_what_is_remembered(pair_source):
    row = pair_source.measure("world, remembered", "a red cube spinning", 8, 2)
    assert row["batches"] == 2 and row["pairs_per_second"] > 0 and row["added_mib"] >= 0
    # All 16 times by 16 cameras, 8 x 8 pixels of 4 bytes: 1/16 MiB.
    assert row["remembered_mib"] == pytest.approx(0.1, abs=0.05)
    per_second = 1e3 / row["milliseconds_per_pair"]
    assert row["pairs_per_second"] == pytest.approx(per_second, rel=0.05)


def test_the_table_has_a_line_for_each_row(pair_source):
    row = {
        "pairs_per_second": 12.5, "milliseconds_per_pair": 80.0, "cpu_milliseconds_per_pair": 7.5,
        "batches": 3, "added_mib": 1.5, "remembered_mib": 4.0, "prepare_seconds": 0.25,
        "threads": 1,
    }  # fmt: skip
    lines = pair_source.lines_of({"grid": row})
    assert lines[2] == "| grid | 12.5 | 80 | 7.5 | 3 | 1.5 | 4 | 0.25 |"
    assert {line.count("|") for line in lines} == {9}
    arguments = argparse.Namespace(steps=3, size=64, checkpoint=None)
    report, text = pair_source.report_of({"grid": row}, arguments)
    assert report["rows"]["grid"] == row and "random weights, embedded profile" in text


def test_it_explains_itself_from_any_folder(pair_source, tmp_path):
    run = subprocess.run(
        [sys.executable, pair_source.__file__, "--help"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and "--checkpoint" in run.stdout
