"""Which sampler serves which pass, and what is refused."""

import pytest
import torch
from threestudio.models.renderers.ray_samplers import DynamicSampler, StaticSampler
from threestudio.models.renderers.sampler_choice import SamplerChoice

from tests.runtime.models.renderers.test_nerf_volume_renderer import build

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def choice(**config):
    return SamplerChoice(build(config).cfg)


@pytest.mark.parametrize(
    "config, device, training, expected",
    [
        ({}, CPU, True, DynamicSampler),
        ({}, GPU, True, StaticSampler),
        ({}, GPU, False, DynamicSampler),
        ({"sample_budget": 1000}, CPU, True, StaticSampler),
        ({"sample_budget": 2e6}, CPU, False, DynamicSampler),
        ({"sampler": "dynamic"}, GPU, True, DynamicSampler),
        ({"sampler": "static"}, CPU, True, StaticSampler),
        ({"sampler": "static"}, CPU, False, DynamicSampler),
    ],
)
def test_by_config_device_and_pass(config, device, training, expected):
    assert type(choice(**config).of(device, training)) is expected


def test_a_budget_is_one_of_samples_with_a_gradient():
    sampler = choice(sample_budget=2e6, prune_alpha_threshold=True).static
    assert sampler.samples.limit == 2_000_000 < sampler.first_pass.limit
    only = choice(sample_budget=500, prune_alpha_threshold=False).static
    assert only.samples is only.first_pass


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sampler": "fast"}, "sampler is 'fast'; expected one of auto, dynamic, static, nerfacc"),
        ({"sample_budget": -1}, "sample_budget is -1; expected a number of samples, or 0"),
        (
            {"sample_budget": 10, "sampler": "dynamic"},
            "sample_budget is 10, but sampler 'dynamic' makes lists as long as there are samples; "
            "expected sampler: static",
        ),
        (
            {"sample_budget": 10, "estimator": "importance"},
            "sample_budget is 10, but estimator 'importance' takes equally many samples on each",
        ),
    ],
)
def test_faults_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build(config)
