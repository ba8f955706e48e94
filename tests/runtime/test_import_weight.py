"""Importing the package and asking for help must stay light."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = (
    "pytorch_lightning lightning diffusers transformers cv2 imageio av kornia rich tensorboard "
    "matplotlib trimesh torchmetrics tinycudann nerfacc torchvision accelerate peft"
).split()


def loaded_modules(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(list(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    ["import threestudio", "import threestudio.utils.base", "import custom.fourd"],
)
def test_import_loads_nothing_heavy(statement):
    assert loaded_modules(statement) & set(HEAVY) == set()


def test_import_of_the_package_does_not_even_need_torch():
    assert "torch" not in loaded_modules("import threestudio, threestudio.launcher")


def test_help_answers_at_once():
    start = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "launch.py", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    seconds = time.perf_counter() - start
    assert result.returncode == 0
    assert "--config" in result.stdout and "key=value" in result.stdout
    assert seconds < 1.5


def test_subpackages_and_modules_resolve_by_attribute():
    import threestudio

    assert threestudio.models.geometry.base.__name__ == "threestudio.models.geometry.base"
    with pytest.raises(AttributeError, match="has no attribute 'no_such_part'"):
        threestudio.models.no_such_part  # noqa: B018
