"""Sampling with controls on a tiny random model: guidance, compositions, baselines."""

from dataclasses import replace

import pytest
import torch

from custom.fourd.diffusion.image_prior import load_image_prior
from custom.fourd.diffusion.layer_contexts import unet_arguments
from custom.fourd.diffusion.samplers import trailing_timesteps
from custom.fourd.mappers.composition import PLACEHOLDERS, Composition, without_control
from custom.fourd.mappers.control_inputs import neutral_batch
from custom.fourd.mappers.control_sampling import (
    SamplingOptions,
    mapper_speech,
    sample_controlled,
)
from custom.fourd.mappers.controlled_prior import ControlledPrior
from custom.fourd.mappers.mapper import Mapper, MapperConfig
from tests.fixtures.controlled_models import adapter_of, pair_of_images, write_controlled_folder

TEXTS = ["a red cube", "a ball"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_controlled_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def batch():
    return pair_of_images(2)


def build(folder, adapter=True, **composition):
    prior = load_image_prior(str(folder))
    model = ControlledPrior(
        prior, adapter_of(folder) if adapter else None, Composition(**composition)
    )
    kinds = ("joint",) if model.composition.mode == "joint_token" else ("time", "view")
    mappers = {}
    for kind in kinds:
        config = MapperConfig(kind, model.injection.width, len(model.table), (16, 16))
        mappers[kind] = Mapper(config, model.injection.base_norm(PLACEHOLDERS[kind]), seed=3)
    return model, mappers


def noise_for(model, batch):
    shape = model.prior.encode(batch["cond_rgb"]).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def by_hand(model, mappers, batch, noise, image_scale, control_scale):
    """One step of DDIM to clean latents, every prediction by a call of its own."""
    (step,) = trailing_timesteps(1000, 1)
    now = torch.full((2,), step)
    prompts = model.prompts(TEXTS)
    neutral = without_control(model.injection, prompts, len(model.table))

    def predicted(contexts, kept):
        image = model.image_prompt(batch, torch.full((2,), kept))
        return model.prior.unet(noise, now, **unet_arguments(contexts), **image).sample

    levels = now / 1000
    words = model.words(mappers, batch, levels)
    resting = neutral_batch(neutral_batch(batch, "time"), "view")
    rest = model.words(mappers, resting, levels)
    nothing, image = predicted(neutral, False), predicted(neutral, True)
    guided = nothing + image_scale * (image - nothing)
    if model.composition.mode in ("tokens", "joint_token"):
        told = [(1.0, model.injection.contexts(prompts, words))]
    elif model.composition.mode == "attention":
        told = [(1.0, [model.injection.contexts(prompts, {**rest, name: words[name]}, 0.5)
                       for name in ("<time>", "<view>")])]  # fmt: skip
    else:
        told = [(1.0, model.injection.contexts(prompts, {**rest, name: words[name]}))
                for name in ("<time>", "<view>")]  # fmt: skip
    for weight, contexts in told:
        guided = guided + control_scale * weight * (predicted(contexts, True) - image)
    abar = model.prior.schedule.alphas_cumprod[step]
    clean = (noise - (1 - abar).sqrt() * guided) / abar.sqrt()
    return model.prior.decode(clean)


@pytest.mark.parametrize("mode", ["tokens", "joint_token", "attention", "guidance"])
@torch.no_grad()
def test_compositions_are_their_formulas(folder, batch, mode):
    model, mappers = build(folder, mode=mode)
    noise = noise_for(model, batch)
    options = SamplingOptions(steps=1, image_scale=1.4, control_scale=2.0)
    speech = mapper_speech(model, mappers, batch)
    found = sample_controlled(model, batch, TEXTS, noise, *speech, options)
    expected = by_hand(model, mappers, batch, noise, 1.4, 2.0)
    assert float((expected - 0.5).abs().mean()) > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@torch.no_grad()
def test_compositions_differ(folder, batch):
    images = {}
    for mode in ("tokens", "attention", "guidance"):
        model, mappers = build(folder, mode=mode)
        speech = mapper_speech(model, mappers, batch)
        noise, options = noise_for(model, batch), SamplingOptions(steps=2)
        images[mode] = sample_controlled(model, batch, TEXTS, noise, *speech, options)
    assert (images["tokens"] - images["attention"]).abs().max() > 1e-4
    assert (images["tokens"] - images["guidance"]).abs().max() > 1e-4


@torch.no_grad()
def test_scales_of_one_call_the_denoiser_once_a_step(folder, batch):
    model, mappers = build(folder)
    rows = []
    model.prior.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    speech, noise = mapper_speech(model, mappers, batch), noise_for(model, batch)
    sample_controlled(model, batch, TEXTS, noise, *speech, SamplingOptions(2, 1.0, 1.0))
    assert rows == [2, 2]
    rows.clear()
    sample_controlled(model, batch, TEXTS, noise, *speech, SamplingOptions(1, 3.0, 4.5))
    assert rows == [6]
    rows.clear()
    sample_controlled(model, batch, TEXTS, noise, *speech, SamplingOptions(1, 2.0, 2.0))
    assert rows == [4]


@torch.no_grad()
def test_baselines_leave_out_what_they_are_named_for(folder, batch):
    model, mappers = build(folder)
    noise, options = noise_for(model, batch), SamplingOptions(steps=1)

    def image_alone(given):
        return sample_controlled(model, given, TEXTS, noise, None, None, options)

    def control_alone(given):
        speech = mapper_speech(model, mappers, given)
        return sample_controlled(model, given, TEXTS, noise, *speech, options, with_image=False)

    later = {**batch, "time_j": batch["time_j"].flip(0)}
    other = {**batch, "cond_rgb": 1 - batch["cond_rgb"]}
    assert torch.equal(image_alone(batch), image_alone(later))
    assert not torch.equal(image_alone(batch), image_alone(other))
    assert torch.equal(control_alone(batch), control_alone(other))
    assert not torch.equal(control_alone(batch), control_alone(later))


@torch.no_grad()
def test_a_model_without_adapter_is_guided_by_controls(folder, batch):
    model, mappers = build(folder, adapter=False)
    noise, options = noise_for(model, batch), SamplingOptions(steps=1, control_scale=2.0)
    speech = mapper_speech(model, mappers, batch)
    found = sample_controlled(model, batch, TEXTS, noise, *speech, options)
    ignored = replace(options, image_scale=9.0)
    assert torch.equal(found, sample_controlled(model, batch, TEXTS, noise, *speech, ignored))
