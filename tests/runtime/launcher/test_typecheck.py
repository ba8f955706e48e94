"""``--typecheck`` finds wrong shapes and leaves configs free."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

PREAMBLE = """
from threestudio.launcher.typecheck import install_type_checks
install_type_checks()
import torch
from threestudio.utils.ops import reflect, scale_tensor
"""


def run(code):
    return subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_a_wrong_shape_is_found():
    result = run("reflect(torch.zeros(2, 3), torch.zeros(2, 4))")
    assert result.returncode != 0
    assert "TypeCheckError" in result.stderr and "reflect" in result.stderr


def test_checkpoints_are_written_under_the_checks(tmp_path):
    """A checked run saves: torch writes through a file that hashes, which is no BinaryIO."""
    result = run(
        f"""
        from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint
        save_checkpoint({str(tmp_path / "a.ckpt")!r}, {{"x": torch.ones(3)}})
        assert load_checkpoint({str(tmp_path / "a.ckpt")!r})["x"].sum() == 3
        """
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_right_shapes_ints_for_floats_and_schedules_in_configs_pass():
    result = run(
        """
        from omegaconf import OmegaConf
        from threestudio.models.materials.no_material import NoMaterial
        from threestudio.utils.config import parse_structured
        assert reflect(torch.zeros(2, 3), torch.zeros(2, 3)).shape == (2, 3)
        cfg = parse_structured(NoMaterial.Config, OmegaConf.create({"n_output_dims": [0, 1, 2, 5]}))
        assert list(cfg.n_output_dims) == [0, 1, 2, 5]
        """
    )
    assert result.returncode == 0, result.stderr
