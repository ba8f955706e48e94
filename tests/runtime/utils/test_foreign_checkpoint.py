"""Checkpoints as upstream writes them: configs inside optimizer states, nothing run for them."""

import operator
import sys
import types
from pathlib import Path

import pytest
import torch
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.upstream_checkpoint import upstream_state, write_upstream_checkpoint

FIXTURES = Path(__file__).parents[2] / "fixtures" / "upstream"


def betas(checkpoint):
    return checkpoint["optimizer_states"][0]["param_groups"][0]["betas"]


def test_a_file_of_omegaconf_2_3_loads():
    """Written by OmegaConf 2.3.0, with the classes of upstream's system under their names."""
    checkpoint = load_checkpoint(FIXTURES / "omegaconf_2_3_optimizer.ckpt")
    assert betas(checkpoint) == [0.9, 0.99] and type(betas(checkpoint)) is list
    assert checkpoint["global_step"] == 7 and checkpoint["state_dict"]["a"].shape == (3,)


def test_the_config_behind_the_betas_is_not_imported(tmp_path):
    path = write_upstream_checkpoint(tmp_path / "last.ckpt", upstream_state())
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert {"builtins.getattr", "threestudio.systems.upstream_fourdfy.Fourdfy"} <= set(unsafe)
    assert betas(load_checkpoint(path)) == [0.9, 0.99]
    assert "threestudio.systems.upstream_fourdfy" not in sys.modules


@pytest.fixture
def reduced(tmp_path):
    """A checkpoint with an object that asks for a call when it is unpickled."""

    def save(function, *arguments):
        class Call:
            def __reduce__(self):
                return function, arguments

        torch.save({"state_dict": {}, "x": Call()}, tmp_path / "evil.ckpt")
        return tmp_path / "evil.ckpt"

    return save


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (getattr, (dict, "fromkeys")),
        (getattr, ("text", "__class__")),
        (operator.getitem, ([1], 0)),
        (eval, ("1",)),
    ],
)
def test_stand_ins_look_nothing_up(reduced, function, arguments):
    with pytest.raises(ValueError, match=r"evil\.ckpt is refused: it holds something other"):
        load_checkpoint(reduced(function, *arguments))


def test_an_object_of_upstream_is_refused(tmp_path):
    module = types.ModuleType("threestudio.systems.upstream_thing")
    exec("class Thing:\n    pass", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        torch.save({"x": module.Thing()}, tmp_path / "thing.ckpt")
    finally:
        del sys.modules[module.__name__]
    with pytest.raises(ValueError, match=r"thing\.ckpt is refused.*\(threestudio\)"):
        load_checkpoint(tmp_path / "thing.ckpt")
