"""The mapper: inputs, norms, nested dropout, and where its gradients go."""

import pytest
import torch
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.mappers.mapper import (
    Mapper,
    MapperConfig,
    config_facts,
    config_from_facts,
    drop_behind,
    exempt_from_decay,
    nested_cuts,
)

SMALL = {"width": 24, "n_layers": 5, "hidden": (16, 16)}
BATCH = 3


def small(base_norm=0.4, seed=0, **changes):
    return Mapper(MapperConfig(**{**SMALL, **changes}), base_norm, seed=seed)


def times(batch=BATCH):
    g = torch.Generator().manual_seed(4)
    later = torch.rand(batch, generator=g)
    return torch.stack((later, later - torch.rand(batch, generator=g)), dim=-1)


def ask(mapper, noise_level=0.3, controls=None, **keys):
    controls = times() if controls is None else controls
    return mapper(torch.full((len(controls),), noise_level), controls, **keys)


def test_vectors_for_every_layer_and_sample():
    output = ask(small())
    assert output.base.shape == output.bypass.shape == (5, BATCH, 24)
    some = ask(small(), layers=torch.tensor([4, 1]))
    torch.testing.assert_close(some.base, output.base[[4, 1]])


def test_the_base_has_the_norm_of_the_super_category():
    torch.testing.assert_close(ask(small(0.4)).base.norm(dim=-1), torch.full((5, BATCH), 0.4))
    free = small(0.4, normalize_base=False)
    ours = small(0.4)
    ratio = (ask(free).base / ask(ours).base).detach()
    # Only the length differs: one positive factor for all numbers of a vector.
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert float(ratio.min()) > 0 and not torch.allclose(ratio, torch.ones(()))


def test_by_hand_from_scaled_inputs():
    """Step, layer and controls go to [-1, 1]; the trunk and the head are as the weights say."""
    mapper = small(normalize_base=False)
    output = ask(mapper, 0.25, torch.tensor([[0.75, -0.5]]))
    scaled = torch.tensor([2 * 0.25 - 1, 2 * 3 / 5 - 1, 2 * 0.75 - 1, -0.5])
    phases = mapper.encoder.frequencies @ scaled
    hidden = torch.cat((phases.sin(), phases.cos()))
    for block in (0, 3):
        linear = mapper.trunk[block]
        hidden = linear.weight @ hidden + linear.bias
        hidden = (hidden - hidden.mean()) / (hidden.var(unbiased=False) + 1e-5).sqrt()
        hidden = torch.where(hidden > 0, hidden, 0.01 * hidden)
    expected = mapper.head.weight @ hidden + mapper.head.bias
    torch.testing.assert_close(output.base[3, 0], expected[:24])
    torch.testing.assert_close(output.bypass[3, 0], expected[24:])


@pytest.mark.parametrize("kind, n_axes", [("time", 2), ("view", 9), ("joint", 11)])
def test_every_axis_matters(kind, n_axes):
    mapper = small(kind=kind)
    controls = torch.zeros(1, n_axes)
    before = ask(mapper, controls=controls).base
    assert (ask(mapper, 0.9, controls).base - before).norm() > 0.1 * before.norm()
    for axis in range(n_axes):
        moved = controls.clone()
        moved[0, axis] = 0.5
        assert (ask(mapper, controls=moved).base - before).norm() > 0.02 * before.norm()
    layers = before[:, 0]
    assert (layers[0] - layers[1]).norm() > 0.05 * layers[0].norm()


def test_legacy_encoding_does_not_see_the_step():
    moves = {}
    for encoding in ("default", "legacy_arch15"):
        mapper = small(encoding=encoding)
        before = ask(mapper, 0.0).base.detach()
        after = ask(mapper, 0.99).base.detach()
        moves[encoding] = float((after - before).norm() / before.norm())
    assert moves["legacy_arch15"] < 0.15 and moves["default"] > 0.3


def test_sigmas_replace_those_of_the_preset():
    spread = small(sigma_step=15.0, sigma_time=0.0).encoder.frequencies.std(dim=0)
    assert 10 < spread[0] < 20 and spread[2] == spread[3] == 0


def test_ranges_of_the_training_set_map_to_one():
    mapper = small(kind="view", view_input="relative")
    names = [axis.name for axis in mapper.axes]
    values = torch.tensor([[-0.2, 0.5, 0.5, 0.0, 0.3], [0.6, -0.5, 0.5, 0.0, 0.3]])
    mapper.set_ranges(values)
    low, high = mapper.axis_low, mapper.axis_high
    delta = names.index("delta_elevation")
    assert (low[delta], high[delta]) == pytest.approx((-0.2, 0.6))
    sine = names.index("sin_delta_azimuth")
    assert (low[sine], high[sine]) == (-1, 1), "sines have an exact range"
    # All alike: the width of before, centred, so that nothing divides by zero.
    ratio = names.index("log_radius_ratio")
    assert (low[ratio], high[ratio]) == pytest.approx((-1.0, 1.0))
    elevation = names.index("elevation_a")
    assert float(high[elevation] + low[elevation]) / 2 == pytest.approx(0.3)
    assert bool(ask(mapper, controls=values).base.isfinite().all())


def test_scene_code_starts_silent_and_learns():
    mapper = small(scene_features=7)
    features = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(1))
    spoken = ask(mapper, scene_features=features)
    silent = ask(mapper, scene_features=torch.zeros(BATCH, 7))
    assert torch.equal(spoken.base, silent.base)
    (spoken.base * torch.arange(24.0)).sum().backward()
    assert float(mapper.scene_code.weight.grad.norm()) > 0
    with pytest.raises(ValueError, match="given no scene_features; expected some"):
        ask(mapper)
    with pytest.raises(ValueError, match="given some scene_features; expected none"):
        ask(small(), scene_features=features)


def test_one_head_alone():
    assert ask(small(outputs="base")).bypass is None
    only = ask(small(outputs="bypass"))
    assert only.base is None and only.bypass.shape == (5, BATCH, 24)


def test_cuts_zero_the_units_behind():
    hidden = torch.ones(2, 3, 4)
    cuts = torch.tensor([[0, 1, 2], [3, 0, 1]])
    kept = drop_behind(hidden, cuts).sum(dim=-1)
    assert torch.equal(kept, cuts.float())
    assert torch.equal(drop_behind(hidden, 3).sum(dim=-1), torch.full((2, 3), 3.0))


def test_a_cut_at_zero_leaves_the_bias():
    mapper = small(normalize_base=False)
    output = ask(mapper, cuts=0)
    torch.testing.assert_close(output.base[2, 1], mapper.head.bias[:24])
    full = ask(mapper, cuts=16)
    assert torch.equal(full.base, ask(mapper).base)


def test_nested_dropout_law():
    """One coin for the step; then each layer and sample cuts uniformly below the width."""
    config = MapperConfig(**SMALL, nested_dropout=0.5)
    drawn = [nested_cuts(config, 8, step) for step in range(400)]
    fired = [cuts for cuts in drawn if cuts is not None]
    assert 160 < len(fired) < 240
    counts = torch.bincount(torch.cat([cuts.flatten() for cuts in fired]), minlength=16)
    assert len(counts) == 16, "a cut is below the width"
    expected = counts.sum() / 16
    assert float((counts - expected).abs().max()) < 5 * float(expected.sqrt())
    assert fired[0].shape == (5, 8) and len(set(fired[0].flatten().tolist())) > 3
    assert nested_cuts(MapperConfig(**SMALL), 8, 0) is None
    always = MapperConfig(**SMALL, nested_dropout=1.0)
    assert all(nested_cuts(always, 1, step) is not None for step in range(20))


def test_cuts_do_not_depend_on_how_the_batch_is_divided():
    config = MapperConfig(**SMALL, nested_dropout=1.0)
    whole = nested_cuts(config, 6, 11)
    parts = [nested_cuts(config, 3, 11, first) for first in (0, 3)]
    assert torch.equal(whole, torch.cat(parts, dim=1))
    set_experiment_seed(1)
    try:
        assert not torch.equal(nested_cuts(config, 6, 11), whole)
    finally:
        set_experiment_seed(0)


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first = small(seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(8)
    for name, value in small(seed=3).state_dict().items():
        assert torch.equal(value, first.state_dict()[name])
    assert not torch.equal(small(seed=4).head.weight, first.head.weight)


def test_norms_and_biases_do_not_decay():
    mapper = small()
    named = [{"params": list(mapper.parameters()), "name": "mappers"}]
    optimizer = torch.optim.AdamW(named, lr=0.002, weight_decay=0.01)
    exempt_from_decay(optimizer)
    decayed, free = optimizer.param_groups
    assert decayed["name"] != free["name"], "learning rates are logged by name"
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert decayed["lr"] == free["lr"] == 0.002
    linear = [module for module in mapper.modules() if isinstance(module, torch.nn.Linear)]
    assert {id(p) for p in decayed["params"]} == {id(module.weight) for module in linear}
    assert len(decayed["params"]) + len(free["params"]) == len(list(mapper.parameters()))
    # With no gradient but zero, AdamW moves a parameter by its decay alone.
    before = {name: value.clone() for name, value in mapper.named_parameters()}
    for parameter in mapper.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in mapper.named_parameters():
        factor = 1 - 0.002 * 0.01 if value.ndim > 1 else 1.0
        torch.testing.assert_close(value, factor * before[name], rtol=1e-6, atol=0)


def test_every_parameter_learns():
    mapper = small(kind="joint")
    output = ask(mapper, controls=torch.rand(BATCH, 11))
    ((output.base + output.bypass) * torch.arange(24.0)).sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in mapper.parameters())


def test_config_survives_json():
    config = MapperConfig(**SMALL, kind="joint", sigma_time=15.0)
    assert config_from_facts(config_facts(config)) == config
    with pytest.raises(ValueError, match="unknown key colour; expected keys of this version"):
        config_from_facts({**config_facts(config), "colour": 1})


def test_bad_settings_are_refused():
    for changes, message in (
        ({"kind": "space"}, "of kind 'space'; expected one of"),
        ({"outputs": "none"}, "outputs is 'none'; expected one of both, base, bypass"),
        ({"hidden": ()}, r"hidden is \[\].*expected at least one hidden block"),
        ({"n_layers": 0}, "n_layers 0; expected at least one"),
        ({"nested_dropout": 1.5}, "nested_dropout is 1.5; expected a probability"),
        ({"encoding": "fourier"}, "encoding is 'fourier'; expected one of default"),
    ):
        with pytest.raises(ValueError, match=message):
            small(**changes)
    with pytest.raises(ValueError, match="base_norm is 0; expected the positive norm"):
        small(base_norm=0)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected \(b, 2\): time_j, delta"):
        ask(small(), controls=torch.zeros(2, 3))
