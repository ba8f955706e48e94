"""The grid against a trilinear loop, its bias by hand, and its laws."""

import itertools
import math

import pytest
import threestudio
import torch

SIZE = (3, 4, 5)
POINTS = torch.tensor([[0.1, -0.3, 0.2], [-0.55, 0.4, -0.1], [0.3, 0.62, -0.6]])


def build(seed=0, **config):
    geometry = threestudio.find("volume-grid")({"grid_size": SIZE, **config})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in geometry.named_parameters():
            if "grid" in name:
                parameter.normal_(generator=generator)
    return geometry


def trilinear(grid, point):
    """One point in double precision; the axes of the grid are z, y, x, values at cell centres."""
    sizes = grid.shape[1:]
    place = [(float(x) + 1) / 2 * n - 0.5 for x, n in zip(reversed(point.tolist()), sizes)]
    total = torch.zeros(grid.shape[0], dtype=torch.float64)
    for corner in itertools.product((0, 1), repeat=3):
        index = [math.floor(p) + c for p, c in zip(place, corner)]
        weight = math.prod(1 - abs(p - i) for p, i in zip(place, index))
        if all(0 <= i < n for i, n in zip(index, sizes)):
            total += weight * grid[:, index[0], index[1], index[2]].double()
    return total


def test_density_and_features_by_loop():
    geometry = build(density_bias=0.5, density_activation="softplus")
    with torch.no_grad():
        geometry.density_scale.fill_(math.log(2.0))
    with torch.no_grad():
        out = geometry(POINTS)
    assert out["density"].shape == (3, 1) and out["features"].shape == (3, 3)
    for row, point in enumerate(POINTS):
        values = trilinear(geometry.grid.detach()[0], point)
        density = math.log1p(math.exp(2.0 * float(values[0]) + 0.5))
        assert float(out["density"][row]) == pytest.approx(density, rel=1e-5)
        torch.testing.assert_close(out["features"][row].double(), values[1:], atol=1e-5, rtol=1e-5)


def test_the_blob_by_hand():
    geometry = threestudio.find("volume-grid")({"grid_size": SIZE, "density_activation": "none"})
    for distance, expected in ((0.0, 5.0), (0.5, 0.0), (0.75, -2.5)):
        density = geometry.forward_density(torch.tensor([[0.0, distance, 0.0]]))
        assert float(density) == pytest.approx(expected, abs=1e-5)
    names = {name for name, _ in geometry.named_parameters()}
    assert names == {"grid"}, "the factor is trained only where the bias is a number"
    assert {name for name, _ in build(density_bias=1.0).named_parameters()} == {
        "grid", "density_scale"
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian"])
def test_normals_of_the_blob_point_outwards(kind):
    geometry = threestudio.find("volume-grid")({"grid_size": SIZE, "normal_type": kind})
    normal = geometry(POINTS, output_normal=True)["normal"]
    expected = torch.nn.functional.normalize(POINTS, dim=-1)
    torch.testing.assert_close(normal, expected, atol=0.01, rtol=0)


def test_predicted_normals_are_a_grid_of_their_own():
    geometry = build(normal_type="pred")
    out = geometry(POINTS, output_normal=True)
    for row, point in enumerate(POINTS):
        value = trilinear(geometry.normal_grid.detach()[0], point)
        torch.testing.assert_close(out["normal"][row].double(), value / value.norm(),
                                   atol=1e-5, rtol=1e-5)  # fmt: skip
    assert "normal" not in geometry(POINTS)


def test_the_surface_of_the_blob_and_its_features():
    geometry = threestudio.find("volume-grid")({
        "grid_size": SIZE, "isosurface_threshold": 2.0, "density_activation": "none",
        "isosurface_resolution": 16,
    })  # fmt: skip
    mesh = geometry.isosurface()
    # 5 (1 - r / 0.5) = 2 at r = 0.3.
    torch.testing.assert_close(
        mesh.v_pos.norm(dim=-1), torch.full((len(mesh.v_pos),), 0.3), atol=0.02, rtol=0
    )
    assert geometry.export(POINTS)["features"].shape == (3, 3)
    assert build(n_feature_dims=0).export(POINTS) == {}


def test_it_renders_and_learns():
    geometry = build()
    renderer = threestudio.find("nerf-volume-renderer")(
        {"num_samples_per_ray": 16},
        geometry=geometry,
        material=threestudio.find("no-material")({}),
        background=threestudio.find("solid-color-background")({}),
    ).train()
    rays_o = torch.tensor([0.0, 0.0, 2.0]).expand(1, 4, 4, 3)
    rays_d = torch.nn.functional.normalize(torch.randn(1, 4, 4, 3) * 0.1 - rays_o, dim=-1)
    renderer(rays_o, rays_d, torch.zeros(1, 3))["comp_rgb"].mean().backward()
    assert geometry.grid.grad.abs().sum() > 0


@pytest.mark.parametrize("config, message", [
    ({"grid_size": [4, 4]}, r"grid_size is \(4, 4\); expected three positive numbers"),
    ({"grid_size": [4, 0, 4]}, r"grid_size is \(4, 0, 4\); expected three positive"),
    ({"normal_type": "analytic"}, "normal_type is 'analytic'; expected one of finite_difference"),
    ({"density_bias": "blob_magic3d"}, "density_bias is 'blob_magic3d'; expected blob or"),
])  # fmt: skip
def test_wrong_values_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        build(**config)
