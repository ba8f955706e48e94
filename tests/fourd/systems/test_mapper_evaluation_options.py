"""What the test of time and view control compares with, from plain and OmegaConf containers."""

import pytest
from omegaconf import OmegaConf

from custom.fourd.systems.mapper_evaluation_options import (
    ABSENT,
    BASELINES,
    evaluation_options,
)
from custom.fourd.systems.mapper_oracle import OracleOptions


def test_nothing_given_is_the_baselines_that_cost_little():
    options = evaluation_options({})
    assert options.baselines == ["copy", "image_only", "control_only"]
    assert options.features == "pixels" and options.oracle == OracleOptions()
    assert set(options.baselines) < set(BASELINES) and "lpips" in ABSENT


def test_containers_of_a_config_are_read_at_any_depth():
    given = OmegaConf.create({"baselines": ["copy", "oracle"], "oracle": {"steps": 7}})
    options = evaluation_options(given)
    assert options.baselines == ["copy", "oracle"]
    assert options.oracle == OracleOptions(steps=7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rows": 1}, "system.evaluation has the key 'rows'; expected some of baselines"),
        ({"oracle": {"lr": 1}}, "system.evaluation.oracle has the key 'lr'; expected some of pa"),
        ({"baselines": ["best"]}, "baselines holds 'best'; expected some of copy, image_only"),
        ({"features": "dino"}, "features is 'dino'; expected one of pixels, vision"),
    ],
)
def test_what_is_unknown_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        evaluation_options(given)
