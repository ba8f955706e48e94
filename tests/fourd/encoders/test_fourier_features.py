"""Random Fourier features: by hand, and how far each axis moves them."""

import math

import pytest
import torch

from custom.fourd.encoders.fourier_features import (
    AXIS_FAMILIES,
    PRESETS,
    FourierFeatures,
    fourier_preset,
)


def features(sigmas, n_features=64, seed=0, **keys):
    return FourierFeatures(sigmas, n_features, torch.Generator().manual_seed(seed), **keys)


def change(encoder, start, end):
    """How far the features move from one input to another, as a share of their norm."""
    before, after = encoder(torch.tensor(start)), encoder(torch.tensor(end))
    return float((after - before).norm() / before.norm())


def test_equals_sines_and_cosines_by_hand():
    encoder = features([1.0, 2.0], n_features=4)
    encoder.frequencies.copy_(torch.tensor([[1.0, 0.5], [-2.0, 3.0]]))
    first, second = 1.0 * 0.3 + 0.5 * 0.7, -2.0 * 0.3 + 3.0 * 0.7
    expected = [math.sin(first), math.sin(second), math.cos(first), math.cos(second)]
    torch.testing.assert_close(encoder(torch.tensor([[0.3, 0.7]]))[0], torch.tensor(expected))


def test_each_axis_has_its_own_scale():
    encoder = features([0.03, 2.0, 15.0], n_features=20000)
    spread = encoder.frequencies.std(dim=0)
    torch.testing.assert_close(spread, torch.tensor([0.03, 2.0, 15.0]), rtol=0.02, atol=0)


@pytest.mark.parametrize("sigma, percent", [(0.03, 6), (0.5, 92), (1.0, 140), (4.0, 140)])
def test_sensitivity_over_the_whole_range(sigma, percent):
    """The measured table; the law of the module's head agrees with it."""
    encoder = features([sigma], n_features=4096)
    law = math.sqrt(2 - 2 * math.exp(-((2 * sigma) ** 2) / 2))
    assert change(encoder, [-1.0], [1.0]) == pytest.approx(law, rel=0.04)
    assert law == pytest.approx(percent / 100, rel=0.07)


@pytest.mark.parametrize("sigma, percent", [(1.0, 0.6), (4.0, 2.2), (15.0, 8.4)])
def test_sensitivity_to_one_frame_of_180(sigma, percent):
    encoder = features([sigma], n_features=4096)
    assert 100 * change(encoder, [0.0], [1 / 180]) == pytest.approx(percent, rel=0.09)


def test_legacy_encoding_hardly_sees_the_step():
    preset = fourier_preset("legacy_arch15")
    sigmas = [preset.sigma(family) for family in ("step", "layer", "time")]
    moves = []
    for seed in range(20):
        encoder = features(sigmas, preset.n_features, seed)
        assert encoder.n_features == 64
        moves.append(
            [
                change(encoder, [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]),
                change(encoder, [0.0, -1.0, 0.0], [0.0, 0.875, 0.0]),
                change(encoder, [0.0, 0.0, -1.0], [0.0, 0.0, 1.0]),
            ]
        )
    step, layer, time = torch.tensor(moves).mean(dim=0).tolist()
    assert step == pytest.approx(0.06, rel=0.1)
    assert layer == pytest.approx(1.42, rel=0.05)
    assert time == pytest.approx(1.35, rel=0.05)
    default = fourier_preset("default")
    ours = features([default.sigma("step")], default.n_features)
    assert change(ours, [-1.0], [1.0]) > 1


def test_a_private_generator_decides_alone():
    torch.manual_seed(5)
    first = features([1.0, 2.0], seed=3).frequencies
    state = torch.random.get_rng_state()
    assert torch.equal(features([1.0, 2.0], seed=3).frequencies, first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(features([1.0, 2.0], seed=4).frequencies, first)


def test_frequencies_are_saved_and_not_trained():
    encoder = features([1.0])
    assert list(encoder.state_dict()) == ["frequencies"] and not list(encoder.parameters())
    other = features([1.0], seed=9)
    other.load_state_dict(encoder.state_dict())
    assert torch.equal(other(torch.tensor([0.4])), encoder(torch.tensor([0.4])))


def test_features_can_be_normalized():
    inputs = torch.linspace(-1, 1, 7).unsqueeze(-1)
    norms = features([2.0], normalize=True)(inputs).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones(7))
    # sin^2 + cos^2 = 1 for each of the 32 pairs
    torch.testing.assert_close(features([2.0])(inputs).norm(dim=-1), torch.full((7,), 32**0.5))


def test_every_preset_names_every_family():
    for preset in PRESETS.values():
        assert all(preset.sigma(family) > 0 for family in AXIS_FAMILIES)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="n_features is 7; expected an even number"):
        features([1.0], n_features=7)
    with pytest.raises(ValueError, match=r"sigmas is \[\]; expected one number"):
        features([])
    with pytest.raises(ValueError, match=r"sigmas is \[1.0, -2.0\]"):
        features([1.0, -2.0])
    with pytest.raises(ValueError, match="'arch16'; expected one of default, legacy_arch15"):
        fourier_preset("arch16")
