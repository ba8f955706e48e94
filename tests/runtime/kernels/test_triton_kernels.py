"""The Triton kernels compiled for GPUs that are not here: in a process without the interpreter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs the package triton"
)


@pytest.fixture(scope="module")
def rows():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = ROOT / "tests" / "benchmarks" / "triton_offline.py"
    run = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_no_kernel_spills_registers(rows):
    assert len(rows) == 18
    assert all(row["spilled_bytes"] == 0 for row in rows)
    # With 4 warps a block, 128 registers a thread still let two blocks share a multiprocessor's
    # file of 65536 twice over.
    assert max(row["registers"] for row in rows) <= 128


@pytest.mark.slow
def test_both_features_of_an_entry_come_in_one_load(rows):
    corners = {"3D": 8, "4D": 16, "3D + 4D": 24}
    for row in rows:
        if row["kernel"] != "table_gradient_kernel":
            assert row["loads_8_byte"] == corners[row["grid"]]


@pytest.mark.slow
def test_both_features_go_in_one_reduction_where_the_gpu_has_it(rows):
    corners = {"3D": 8, "4D": 16, "3D + 4D": 24}
    for row in rows:
        if row["kernel"] == "table_gradient_kernel":
            packed, scalar = row["reductions_packed"], row["reductions_scalar"]
            expected = corners[row["grid"]]
            hopper = row["architecture"] == "sm_90"
            assert (packed, scalar) == ((expected, 0) if hopper else (0, 2 * expected))
