"""A signed distance: its bias, its gradient, its start and its surface."""

import math

import pytest
import threestudio
import torch
from threestudio.utils.rng import set_experiment_seed

GRID = {"otype": "HashGrid", "n_levels": 3, "n_features_per_level": 2, "log2_hashmap_size": 9,
        "base_resolution": 4, "per_level_scale": 1.5}  # fmt: skip
NETWORK = {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none",
           "n_neurons": 16, "n_hidden_layers": 1}  # fmt: skip
POINTS = torch.tensor([[0.3, 0.4, 0.1], [-0.2, 0.1, 0.6], [0.05, -0.7, 0.2]])


def build(**config):
    set_experiment_seed(0)
    defaults = {"pos_encoding_config": GRID, "mlp_network_config": NETWORK}
    return threestudio.find("implicit-sdf")({**defaults, **config})


def still(**config):
    """A geometry whose networks answer zero, so that only the bias is left."""
    geometry = build(**config)
    with torch.no_grad():
        for parameter in geometry.sdf_network.parameters():
            parameter.zero_()
    return geometry


def test_the_bias_is_the_shape_and_a_number_shifts_it():
    sphere = still(sdf_bias="sphere", sdf_bias_params=0.5)
    expected = POINTS.norm(dim=-1, keepdim=True) - 0.5
    torch.testing.assert_close(sphere.forward_sdf(POINTS), expected)
    assert torch.equal(still(sdf_bias=-0.25).forward_sdf(POINTS), torch.full((3, 1), -0.25))
    ellipsoid = still(sdf_bias="ellipsoid", sdf_bias_params=[0.3, 0.4, 0.5])
    on_it = torch.tensor([[0.3, 0, 0], [0, -0.4, 0], [0, 0, 0.5]])
    torch.testing.assert_close(ellipsoid.forward_sdf(on_it), torch.zeros(3, 1))


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian", "analytic"])
def test_normals_of_a_sphere_point_outwards(kind):
    geometry = still(sdf_bias="sphere", sdf_bias_params=0.5, normal_type=kind,
                     finite_difference_normal_eps=1e-3)  # fmt: skip
    with torch.no_grad():
        out = geometry(POINTS, output_normal=True)
    assert set(out) == {"sdf", "features", "normal", "shading_normal", "sdf_grad"}
    expected = torch.nn.functional.normalize(POINTS, dim=-1)
    # A forward difference errs by eps / 2 of the curvature, about 1e-3 here.
    torch.testing.assert_close(out["normal"], expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(out["sdf_grad"].norm(dim=-1), torch.ones(3), atol=5e-3, rtol=0)
    assert torch.equal(out["shading_normal"], out["normal"]) and not out["normal"].requires_grad


def test_the_central_difference_is_the_analytic_gradient_where_the_field_is_smooth():
    """The field is linear between the corners of its finest cells."""
    analytic = build(normal_type="analytic", sdf_bias="sphere", sdf_bias_params=0.5)
    central = build(normal_type="finite_difference_laplacian", sdf_bias="sphere",
                    sdf_bias_params=0.5, finite_difference_normal_eps=1e-3)  # fmt: skip
    central.load_state_dict(analytic.state_dict())
    first, second = (g(POINTS, output_normal=True)["sdf_grad"] for g in (analytic, central))
    torch.testing.assert_close(first, second, atol=2e-3, rtol=0)


def test_predicted_normals_have_a_network_of_their_own():
    geometry = build(normal_type="pred")
    out = geometry(POINTS, output_normal=True)
    raw = geometry.normal_network(geometry.encoding((POINTS + 1) / 2))
    torch.testing.assert_close(out["sdf_grad"], raw)
    torch.testing.assert_close(out["normal"].norm(dim=-1), torch.ones(3))
    assert "normal" not in geometry(POINTS)
    assert "normal" not in build(normal_type=None)(POINTS, output_normal=True)


def test_progressive_steps_follow_the_finest_active_cell():
    grid = {**GRID, "otype": "ProgressiveBandHashGrid", "start_level": 1, "start_step": 10,
            "update_steps": 5}  # fmt: skip
    geometry = build(pos_encoding_config=grid, finite_difference_normal_eps="progressive")
    for step, level in ((0, 1), (14, 1), (15, 2), (20, 3), (999, 3), (12, 1)):
        geometry.update_step(0, step)
        expected = 2.0 / (4 * 1.5 ** (level - 1))
        assert geometry.finite_difference_normal_eps == pytest.approx(expected)
    with pytest.raises(ValueError, match="is 'progressive' with the encoding 'HashGrid'; expected"):
        build(finite_difference_normal_eps="progressive")


def test_a_start_is_fitted():
    geometry = build(shape_init="sphere", shape_init_params=0.5, shape_init_steps=200,
                     shape_init_points=400)  # fmt: skip
    wanted = POINTS.norm(dim=-1, keepdim=True) - 0.5
    before = (geometry.forward_sdf(POINTS) - wanted).abs().mean()
    geometry.initialize_shape()
    assert (geometry.forward_sdf(POINTS) - wanted).abs().mean() < 0.4 * before
    assert all(p.grad is None for p in geometry.parameters())


def test_the_start_is_the_same_each_time():
    keys = {"shape_init": "ellipsoid", "shape_init_params": [0.5, 0.4, 0.3],
            "shape_init_steps": 3, "shape_init_points": 10}  # fmt: skip
    first, second, untouched = build(**keys), build(**keys), build(**keys)
    first.initialize_shape()
    second.initialize_shape()
    assert torch.equal(first.forward_sdf(POINTS), second.forward_sdf(POINTS))
    assert not torch.equal(first.forward_sdf(POINTS), untouched.forward_sdf(POINTS))


def test_without_a_shape_nothing_is_fitted_and_a_bias_beside_one_is_mentioned(caplog):
    geometry = build()
    before = {key: value.clone() for key, value in geometry.state_dict().items()}
    geometry.initialize_shape()
    assert all(torch.equal(before[key], value) for key, value in geometry.state_dict().items())
    both = build(shape_init="sphere", shape_init_params=0.5, sdf_bias=0.1, shape_init_steps=1,
                 shape_init_points=4)  # fmt: skip
    with caplog.at_level("WARNING"):
        both.initialize_shape()
    assert "shape_init and sdf_bias are both set" in caplog.text


def test_the_surface_is_a_sphere():
    geometry = still(sdf_bias="sphere", sdf_bias_params=0.5, isosurface_resolution=16)
    mesh = geometry.isosurface()
    torch.testing.assert_close(
        mesh.v_pos.norm(dim=-1), torch.full((len(mesh.v_pos),), 0.5), atol=0.02, rtol=0
    )
    triangles = mesh.v_pos[mesh.t_pos_idx]
    volume = (triangles[:, 0] * triangles[:, 1].cross(triangles[:, 2], dim=-1)).sum() / 6
    assert abs(float(volume)) == pytest.approx(4 / 3 * math.pi * 0.125, rel=0.05)
    features = geometry.export(mesh.v_pos)["features"]
    torch.testing.assert_close(features, geometry(mesh.v_pos)["features"])
    assert build(n_feature_dims=0).export(POINTS) == {}


def test_the_gradient_reaches_the_networks():
    geometry = build(sdf_bias="sphere", sdf_bias_params=0.5)
    out = geometry(POINTS, output_normal=True)
    ((out["sdf_grad"].norm(dim=-1) - 1).square().mean() + out["sdf"].mean()).backward()
    assert geometry.encoding.encoding.encoding.params.grad.abs().sum() > 0


@pytest.mark.parametrize("config, message", [
    ({"normal_type": "exact"}, "normal_type is 'exact'; expected one of finite_difference"),
    ({"sdf_bias": "sphere"}, "sdf_bias_params is None; expected a positive number"),
    ({"shape_init": "ellipsoid", "shape_init_params": 1.0}, "shape_init_params is 1.0; expected"),
])  # fmt: skip
def test_wrong_values_are_refused_at_once(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)
