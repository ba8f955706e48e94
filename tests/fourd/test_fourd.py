"""The extension announces its modules without loading them."""

import subprocess
import sys
from pathlib import Path

import pytest
import threestudio
from threestudio.utils import pretrained

import custom.fourd


@pytest.mark.parametrize("name, module", custom.fourd.REGISTRY.items())
def test_every_name_is_that_of_its_file_and_is_found(name, module):
    assert module.rsplit(".", 1)[-1] == name.replace("-", "_")
    assert threestudio.find(name).__module__ == f"custom.fourd.{module}"


def test_importing_the_extension_loads_nothing_heavy():
    heavy = "pytorch_lightning diffusers transformers cv2 imageio kornia rich torchvision".split()
    code = f"import sys, custom.fourd; print([m for m in {heavy} if m in sys.modules])"
    root = Path(custom.fourd.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    )
    assert result.stdout.strip() == "[]"


def test_embedded_checkpoints_are_looked_for_in_the_extension():
    assert Path(custom.fourd.__file__).parent / "assets" in pretrained._embedded_roots
