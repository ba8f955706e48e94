"""Rendering of a signed distance against a loop in double precision, and its laws."""

import math

import pytest
import threestudio
import torch
from threestudio.models.renderers.neus_volume_renderer import neus_alpha, volsdf_density
from threestudio.utils.ops import get_ray_directions, get_rays

RADIUS = 0.5


def sphere(**config):
    geometry = threestudio.find("implicit-sdf")({
        "sdf_bias": "sphere", "sdf_bias_params": RADIUS, "normal_type": "analytic",
        "pos_encoding_config": {
            "otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 8, "base_resolution": 4,
            "per_level_scale": 1.5, "n_features_per_level": 2,
        },
        "mlp_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
        **config,
    })  # fmt: skip
    with torch.no_grad():
        for parameter in geometry.sdf_network.parameters():
            parameter.zero_()
    return geometry


def build(geometry=None, **config):
    return threestudio.find("neus-volume-renderer")(
        {"num_samples_per_ray": 48, "randomized": False, "grid_prune": False,
         "prune_alpha_threshold": False, **config},
        geometry=geometry or sphere(),
        material=threestudio.find("no-material")({}),
        background=threestudio.find("solid-color-background")({"color": [1, 0.5, 0]}),
    ).train()  # fmt: skip


def rays(size=4):
    pose = torch.eye(4)
    pose[2, 3] = 2.0
    directions = get_ray_directions(size, size, 1.6 * size)
    return get_rays(directions, pose[None], keepdim=True)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def by_loop(renderer, origin, direction, inv_std, anneal):
    """Opacity and depth of one ray, from the sphere's distance and normal."""
    o, d = origin.double(), direction.double()
    step = renderer.render_step_size
    near = float(torch.minimum((-1 - o) / d, (1 - o) / d).amax().clamp(min=0))
    far = float(torch.maximum((-1 - o) / d, (1 - o) / d).amin())
    trans, opacity, depth, k = 1.0, 0.0, 0.0, 0
    while near + (k + 0.5) * step < far:
        t_mid = near + (k + 0.5) * step
        point = o + t_mid * d
        sdf = float(point.norm()) - RADIUS
        cosine = float(point @ d / point.norm())
        entering = max(0.0, 0.5 - 0.5 * cosine) * (1 - anneal) + max(0.0, -cosine) * anneal
        before = sigmoid((sdf + entering * step / 2) * inv_std)
        after = sigmoid((sdf - entering * step / 2) * inv_std)
        alpha = min(max((before - after + 1e-5) / (before + 1e-5), 0.0), 1.0)
        opacity, depth = opacity + trans * alpha, depth + trans * alpha * t_mid
        trans, k = trans * (1 - alpha), k + 1
    return opacity, depth


@pytest.mark.parametrize("step, anneal", [(0, 0.0), (5, 0.5), (40, 1.0)])
def test_images_against_a_loop_over_rays_and_samples(step, anneal):
    renderer = build(cos_anneal_end_steps=10)
    renderer.update_step(0, step)
    assert renderer.cos_anneal_ratio == anneal
    rays_o, rays_d = rays()
    with torch.no_grad():
        out = renderer(rays_o, rays_d, torch.zeros(1, 3))
    assert float(out["inv_std"]) == pytest.approx(math.exp(3.0), rel=1e-5)
    for row in range(4):
        for column in range(4):
            opacity, depth = by_loop(renderer, rays_o[0, row, column], rays_d[0, row, column],
                                     math.exp(3.0), anneal)  # fmt: skip
            assert float(out["opacity"][0, row, column]) == pytest.approx(opacity, abs=2e-4)
            assert float(out["depth"][0, row, column]) == pytest.approx(depth, abs=5e-4)


def test_a_sharp_distance_is_seen_where_its_surface_is():
    renderer = build(num_samples_per_ray=256, learned_variance_init=0.6)
    pose = torch.tensor([0.0, 0.0, 2.0]).expand(1, 1, 1, 3)
    out = renderer(pose, torch.tensor([0.0, 0.0, -1.0]).expand(1, 1, 1, 3), torch.zeros(1, 3))
    assert float(out["opacity"]) == pytest.approx(1.0, abs=1e-3)
    assert float(out["depth"]) == pytest.approx(1.5, abs=0.02)


def test_training_outputs_and_gradients():
    geometry = sphere()
    renderer = build(geometry)
    out = renderer(*rays(), torch.zeros(1, 3))
    n = len(out["weights"])
    assert out["sdf"].shape == (n, 1) and out["sdf_grad"].shape == out["normal"].shape == (n, 3)
    (out["opacity"].sum() + 0.1 * out["comp_rgb"].sum()).backward()
    assert renderer.variance._inv_std.grad.abs() > 0
    last = [p for p in geometry.sdf_network.parameters()][-1]
    assert torch.isfinite(last.grad).all()
    renderer.eval()
    with torch.no_grad():
        shown = renderer(*rays(), torch.zeros(1, 3))
    assert "sdf" not in shown and shown["comp_normal"].shape == (1, 4, 4, 3)
    torch.testing.assert_close(shown["comp_rgb"], out["comp_rgb"])


def test_occupancy_and_pruning_change_little():
    """The samples left out are those whose opacity is below a hundredth."""
    plain = build()
    pruned = build(plain.geometry, grid_prune=True, prune_alpha_threshold=True)
    pruned.update_step(0, 0)
    share = float(pruned.estimator.binaries.float().mean())
    assert 0.05 < share < 0.6
    first, second = (r(*rays(8), torch.zeros(1, 3)) for r in (plain, pruned))
    assert len(second["weights"]) < 0.5 * len(first["weights"])
    torch.testing.assert_close(second["opacity"], first["opacity"], atol=0.12, rtol=0)


def test_rays_that_meet_nothing_stay_clear():
    renderer = build(grid_prune=True)
    renderer.estimator.binaries.zero_()
    out = renderer(*rays(), torch.zeros(1, 3))
    assert float(out["opacity"].abs().max()) == 0.0
    out["comp_rgb"].sum().backward()
    grad = renderer.variance._inv_std.grad
    assert grad is None or torch.isfinite(grad)


def test_volsdf_by_hand():
    sdf = torch.tensor([[0.0], [0.1], [-0.1]])
    found = volsdf_density(sdf, torch.tensor(20.0))
    tail = 0.5 * math.exp(-2.0)
    torch.testing.assert_close(found, torch.tensor([[10.0], [20 * tail], [20 * (1 - tail)]]))
    assert float(volsdf_density(sdf[:1], torch.tensor(1e4))) == 40.0
    renderer = build(use_volsdf=True, learned_variance_init=0.4)
    out = renderer(*rays(), torch.zeros(1, 3))
    torch.testing.assert_close(
        out["density"], volsdf_density(out["sdf"], renderer.variance.inv_std)
    )


def test_leaving_samples_are_transparent_and_head_on_ones_telescope():
    lengths = torch.full((1, 1), 0.1)
    leaving = neus_alpha(torch.tensor([[0.2]]), torch.ones(1, 1), lengths, torch.tensor(20.0))
    assert float(leaving) < 1e-4
    # Head on, the products of 1 - alpha collapse to the ratio of the two ends' logistics.
    middles = torch.linspace(0.45, -0.45, 10)[:, None]
    alphas = neus_alpha(middles, -torch.ones(10, 1), lengths, torch.tensor(10.0))
    expected = sigmoid(-5.0) / sigmoid(5.0)
    assert float((1 - alphas).prod()) == pytest.approx(expected, abs=1e-3)


def test_what_has_no_distance_or_no_normals_is_refused():
    with pytest.raises(ValueError, match="got a ImplicitVolume; expected a geometry with a signed"):
        build(threestudio.find("implicit-volume")({"pos_encoding_config": {
            "otype": "HashGrid", "n_levels": 1, "log2_hashmap_size": 4}}))  # fmt: skip
    with pytest.raises(ValueError, match="normal_type is null; expected for example finite_diff"):
        build(sphere(normal_type=None))
