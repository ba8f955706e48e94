"""The interpolation functions of configs."""

import pytest
from omegaconf import OmegaConf
from threestudio.utils import config  # noqa: F401  registers them
from threestudio.utils.resolvers import register_resolvers


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("${calc_exp_lr_decay_rate:0.01,2}", 0.1),
        ("${add:1,2}", 3),
        ("${sub:1,2}", -1),
        ("${mul:2,2.5}", 5.0),
        ("${div:7,2}", 3.5),
        ("${idiv:7,2}", 3),
        ("${basename:a/b/c.png}", "c.png"),
        ("${rmspace:'a red cube',_}", "a_red_cube"),
        ("${tuple2:1.5}", [1.5, 1.5]),
        ("${gt0:0.1}", True),
        ("${gt0:0}", False),
        ("${cmaxgt0:[0,0.0,1.0,5]}", True),
        ("${cmaxgt0:0.0}", False),
        ("${cmaxgt0orcmaxgt0:0.0,[0,0.0,1.0,5]}", True),
        ("${cmaxgt0orcmaxgt0:0.0,0}", False),
        ("${not:false}", True),
    ],
)
def test_resolver(expression, expected):
    value = OmegaConf.create({"x": expression}).x
    assert value == pytest.approx(expected) if isinstance(expected, float) else value == expected


def test_registering_again_changes_nothing():
    register_resolvers()
    assert OmegaConf.has_resolver("rmspace")
