"""The package of data modules imports its parts when they are asked for."""

import subprocess
import sys

import pytest
import threestudio.data


def test_submodules_are_attributes():
    assert threestudio.data.camera_config.LIGHT_STRATEGIES == ("dreamfusion", "magic3d")


def test_unknown_submodule_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'holograms'"):
        threestudio.data.holograms  # noqa: B018


def test_importing_the_package_does_not_load_lightning():
    code = "import sys, threestudio.data; print('pytorch_lightning' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
