"""The implicit volume: bias, normals, annealing, times, conversion."""

import math

import pytest
import threestudio
import torch
import torch.nn.functional as F
from threestudio.models.geometry.implicit_volume import ImplicitVolume

NETWORK = {
    "otype": "VanillaMLP",
    "activation": "ReLU",
    "output_activation": "none",
    "n_neurons": 16,
    "n_hidden_layers": 1,
}
GRID = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 10,
    "base_resolution": 4,
    "per_level_scale": 1.5,
}
ANNEAL = {"min_anneal_step": 100, "max_anneal_step": 300, "start_val": 0.5, "end_val": 5.0}


def build(**config) -> ImplicitVolume:
    torch.manual_seed(0)
    config = {"pos_encoding_config": GRID, "mlp_network_config": NETWORK, **config}
    return threestudio.find("implicit-volume")(config)


def silent(**config) -> ImplicitVolume:
    """A volume whose network says zero, so that only the bias speaks."""
    volume = build(**config)
    for parameter in volume.density_network.parameters():
        torch.nn.init.zeros_(parameter)
    return volume


def some_points(n=32):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1)) * 1.2 - 0.6


class TestDensity:
    @pytest.mark.parametrize(
        ("bias", "radius", "expected"),
        [
            ("blob_magic3d", 0.25, 10 * (1 - 0.25 / 0.5)),
            ("blob_magic3d", 1.0, -10.0),
            ("blob_dreamfusion", 0.5, 10 * math.exp(-0.5)),
            (-1.5, 0.3, -1.5),
        ],
    )
    def test_bias_by_hand(self, bias, radius, expected):
        volume = silent(density_bias=bias, density_activation=None)
        point = F.normalize(torch.tensor([[1.0, 2.0, -2.0]]), dim=-1) * radius
        assert volume.forward_density(point).item() == pytest.approx(expected, abs=1e-4)

    def test_softplus_keeps_it_positive(self):
        assert (build().forward_density(some_points()) > 0).all()

    def test_leading_dimensions_and_agreement_of_the_three_doors(self):
        volume, points = build(), some_points(12).view(3, 4, 3)
        output = volume(points)
        assert output["density"].shape == (3, 4, 1) and output["features"].shape == (3, 4, 3)
        assert torch.equal(output["density"], volume.forward_density(points))
        field, deformation = volume.forward_field(points)
        assert deformation is None and torch.equal(field, output["density"])
        assert torch.equal(volume.forward_level(field, 2.0), 2.0 - field)
        assert torch.equal(volume.export(points)["features"], output["features"])

    def test_no_points(self):
        output = build()(torch.zeros(0, 3), output_normal=True)
        assert output["density"].shape == (0, 1) and output["normal"].shape == (0, 3)

    def test_no_features(self):
        volume = build(n_feature_dims=0)
        assert "features" not in volume(some_points()) and volume.export(some_points()) == {}

    def test_bad_bias(self):
        with pytest.raises(ValueError, match="density_bias is 'blob'; expected blob_magic3d"):
            build(density_bias="blob").forward_density(some_points())


class TestNormals:
    @pytest.mark.parametrize(
        ("kind", "tolerance"),
        [("finite_difference", 0.05), ("finite_difference_laplacian", 1e-3), ("analytic", 1e-5)],
    )
    def test_of_a_blob_point_outward(self, kind, tolerance):
        volume = silent(normal_type=kind, density_blob_scale=2.0)
        points = some_points()
        output = volume(points, output_normal=True)
        assert torch.allclose(output["normal"], F.normalize(points, dim=-1), atol=tolerance)
        assert torch.equal(output["normal"], output["shading_normal"])

    def test_analytic_under_no_grad_and_with_gradients(self):
        volume, points = build(normal_type="analytic"), some_points()
        with torch.no_grad():
            evaluated = volume(points, output_normal=True)
            assert not torch.is_grad_enabled() or pytest.fail("gradient mode leaked")
        assert not any(value.requires_grad for value in evaluated.values())
        trained = volume(points, output_normal=True)
        assert torch.allclose(trained["normal"], evaluated["normal"], atol=1e-6)
        trained["normal"].square().sum().add(trained["normal"].sum()).backward()
        weight = next(volume.density_network.parameters())
        assert weight.grad is not None and weight.grad.any()

    def test_analytic_agrees_with_finite_differences_of_the_same_weights(self):
        analytic = build(normal_type="analytic")
        kind = "finite_difference_laplacian"
        central = build(normal_type=kind, finite_difference_normal_eps=1e-3)
        central.load_state_dict(analytic.state_dict())
        points = some_points()
        first, second = (v(points, output_normal=True)["normal"] for v in (analytic, central))
        # A difference across a cell face of the grid is not a derivative; most points have none.
        assert (F.cosine_similarity(first, second) > 0.99).float().mean() > 0.8

    def test_predicted(self):
        volume = build(normal_type="pred")
        normal = volume(some_points(), output_normal=True)["normal"]
        assert torch.allclose(normal.norm(dim=-1), torch.ones(32), atol=1e-4)
        assert any(name.startswith("normal_network") for name, _ in volume.named_parameters())

    def test_none_and_unknown(self):
        assert "normal" not in build(normal_type=None)(some_points(), output_normal=True)
        with pytest.raises(ValueError, match="normal_type is 'finit'; expected one of finite_"):
            build(normal_type="finit")


class TestBlobAnnealing:
    @pytest.mark.parametrize(
        ("step", "expected"), [(0, 0.5), (100, 0.5), (200, 2.75), (300, 5.0), (10**6, 5.0)]
    )
    def test_value_is_a_function_of_the_step_alone(self, step, expected):
        fresh, wandering = (silent(anneal_density_blob_std_config=ANNEAL) for _ in range(2))
        for past in (7, 10**5, 250):
            wandering.do_update_step(0, past)
        for volume in (fresh, wandering):
            volume.do_update_step(0, step)
            assert volume.density_blob_std == pytest.approx(expected)

    def test_the_density_follows(self):
        volume = silent(anneal_density_blob_std_config=ANNEAL, density_activation=None)
        edge = torch.tensor([[1.0, 0.0, 0.0]])
        volume.do_update_step(0, 0)
        assert volume.forward_density(edge).item() == pytest.approx(-10.0)
        volume.do_update_step(0, 10**6)
        assert volume.forward_density(edge).item() == pytest.approx(8.0)

    def test_survives_a_reload_in_evaluation(self, tmp_path):
        trained = build(anneal_density_blob_std_config=ANNEAL)
        trained.do_update_step(0, 400)
        torch.save(trained.state_dict(), tmp_path / "weights.pt")
        loaded = build(anneal_density_blob_std_config=ANNEAL).eval()
        loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
        loaded.do_update_step(0, 400, on_load_weights=True)
        loaded.do_update_step(0, 0)  # evaluation of loaded weights counts from zero
        points = some_points()
        assert torch.equal(loaded.forward_density(points), trained.forward_density(points))

    def test_training_from_loaded_weights_starts_the_schedule_again(self):
        volume = build(anneal_density_blob_std_config=ANNEAL)
        volume.do_update_step(0, 400, on_load_weights=True)
        volume.do_update_step(0, 0)
        assert volume.density_blob_std == 0.5

    def test_unknown_keys(self):
        with pytest.raises(ValueError, match="expected exactly min_anneal_step"):
            build(anneal_density_blob_std_config={"start_val": 1.0})


class TestTimes:
    encoding = {**GRID, "otype": "HashGridSpatialTime", "static": False}

    def test_one_time_per_point(self):
        volume = build(pos_encoding_config=self.encoding)
        for parameter in volume.encoding.parameters():
            torch.nn.init.uniform_(parameter, -1, 1)
        points, times = some_points(8), torch.linspace(0, 1, 8)
        together = volume(points, frame_times=times)
        for row in range(8):
            alone = volume(points[row : row + 1], frame_times=times[row : row + 1])
            assert torch.allclose(alone["density"], together["density"][row], atol=1e-5)
        zero = volume.forward_density(points, frame_times=torch.zeros(8))
        assert torch.allclose(volume.forward_density(points), zero)
        assert not torch.allclose(together["density"][1:], zero[1:])

    def test_normals_are_taken_at_the_points_time(self):
        volume = build(pos_encoding_config=self.encoding)
        for parameter in volume.encoding.parameters():
            torch.nn.init.uniform_(parameter, -1, 1)
        points, times = some_points(6), torch.linspace(0.1, 0.9, 6)
        together = volume(points, output_normal=True, frame_times=times)["normal"]
        for row in range(6):
            one = slice(row, row + 1)
            alone = volume(points[one], output_normal=True, frame_times=times[one])["normal"]
            assert torch.allclose(alone, together[one], atol=1e-4)
        # Density there against density here: both must be at the point's own time.
        volume.cfg.normal_type = "finite_difference_laplacian"
        central = volume(points, output_normal=True, frame_times=times)["normal"]
        at_zero = volume(points, output_normal=True, frame_times=torch.zeros(6))["normal"]
        assert not torch.allclose(central, at_zero, atol=1e-3)

    def test_whether_it_moves(self):
        assert build(pos_encoding_config=self.encoding).is_dynamic
        assert not build(pos_encoding_config={**self.encoding, "static": True}).is_dynamic
        assert not build().is_dynamic

    def test_a_static_encoding_ignores_times(self):
        points = some_points()
        assert torch.equal(
            build()(points, frame_times=torch.ones(32))["density"], build()(points)["density"]
        )


class TestConversion:
    def test_copies_density_and_with_copy_net_the_features(self):
        source = build()
        for parameter in source.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        config = {"pos_encoding_config": GRID, "mlp_network_config": NETWORK}
        points = some_points()
        full = ImplicitVolume.create_from(source, config)
        assert torch.equal(full(points)["features"], source(points)["features"])
        part = ImplicitVolume.create_from(source, config, copy_net=False)
        assert torch.equal(part(points)["density"], source(points)["density"])
        assert not torch.equal(part(points)["features"], source(points)["features"])

    def test_refuses_another_class(self):
        from threestudio.models.geometry.base import BaseImplicitGeometry

        with pytest.raises(TypeError, match="cannot be made from a BaseImplicitGeometry"):
            ImplicitVolume.create_from(BaseImplicitGeometry({}))
        with pytest.raises(TypeError, match="does not define create_from"):
            BaseImplicitGeometry.create_from(build())


def test_parameter_paths_are_upstreams():
    names = {name.rsplit(".", 1)[0] for name, _ in build().named_parameters()}
    roots = {name.split(".")[0] for name in names}
    assert roots == {"encoding", "density_network", "feature_network"}
    assert "encoding.encoding.encoding.params" in dict(build().named_parameters())


def test_gradients_reach_every_parameter():
    volume = build()
    output = volume(some_points())
    (output["density"].sum() + output["features"].square().sum()).backward()
    assert all(parameter.grad.any() for parameter in volume.parameters())


class TestDisplacement:
    config = {
        **GRID,
        "otype": "HashGridSpatialTimeDeform",
        "time_encoding_config": {**GRID, "otype": "HashGrid"},
        "time_network_config": NETWORK,
    }

    def test_is_given_where_the_encoding_moves_points(self):
        volume = build(pos_encoding_config=self.config)
        with torch.no_grad():
            for parameter in volume.encoding.parameters():
                parameter.normal_(std=0.3)
        points, times = some_points().view(4, 8, 3), torch.linspace(0, 1, 32).view(4, 8)
        output = volume(points, frame_times=times)
        unit = (points.view(-1, 3) + 1) / 2
        moved = volume.encoding.encoding.warp(torch.cat((unit, times.view(-1, 1)), dim=1))
        torch.testing.assert_close(output["displacement"], moved.view(4, 8, 3))
        torch.testing.assert_close(output["density"], volume.forward_density(points, times))

    def test_is_absent_elsewhere(self):
        assert "displacement" not in build()(some_points())
        static = build(pos_encoding_config={**self.config, "static": True})
        assert "displacement" not in static(some_points())
