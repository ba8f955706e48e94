"""Geometry, encodings, networks, materials, backgrounds and meshes: 1.10 and 4.5 to 4.8."""

import math

import pytest
import threestudio
import torch
import torch.nn.functional as F
from threestudio.models.geometry.base import (
    BaseExplicitGeometry,
    BaseGeometry,
    contract_to_unisphere,
)
from threestudio.models.mesh import Mesh
from threestudio.models.networks import (
    create_network_with_input_encoding,
    get_encoding,
    get_mlp,
)


def make(name, cfg=None):
    return threestudio.find(name)(cfg or {})


@pytest.fixture
def points():
    return torch.rand(5, 4, 3, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


# Geometry


def test_bounded_space_is_mapped_to_the_unit_cube():
    box = torch.tensor([[-2.0] * 3, [2.0] * 3])
    got = contract_to_unisphere(torch.tensor([[-2.0, 0.0, 1.0]]), box, False)
    assert got.tolist() == [[0.0, 0.5, 0.75]]


def test_unbounded_space_keeps_the_box_in_the_inner_half():
    box = torch.tensor([[-1.0] * 3, [1.0] * 3])
    given = torch.tensor([[1.0, 0, 0], [0.5, 0, 0], [2.0, 0, 0], [1e6, 0, 0]])
    got = contract_to_unisphere(given, box, True)[:, 0]
    # 2 lies at 2 - 1/2 = 1.5 of a ball of radius 2.
    assert got.tolist() == pytest.approx([0.75, 0.625, 0.875, 1.0])


def test_explicit_geometry_has_a_box_and_conversion_is_refused_by_default():
    class Cloud(BaseExplicitGeometry):
        pass

    assert Cloud({"radius": 2.0}).bbox.tolist() == [[-2.0] * 3, [2.0] * 3]
    with pytest.raises((TypeError, NotImplementedError)):
        BaseGeometry.create_from(Cloud({}))
    assert Cloud({}).export() == {}


@pytest.mark.parametrize("bias", ["blob_magic3d", "blob_dreamfusion", -0.5])
def test_density_is_the_network_and_a_blob(bias, small_geometry, points):
    geometry = make("implicit-volume", {
        **small_geometry, "density_bias": bias, "density_blob_scale": 3.0, "density_blob_std": 0.4,
    })  # fmt: skip
    out = geometry(points)
    assert out["density"].shape == (5, 4, 1) and out["features"].shape == (5, 4, 3)
    network = geometry.density_network(geometry.encoding((points.reshape(-1, 3) + 1) / 2))
    distance = points.norm(dim=-1, keepdim=True)
    blob = {
        "blob_magic3d": 3.0 * (1 - distance / 0.4),
        "blob_dreamfusion": 3.0 * torch.exp(-0.5 * distance**2 / 0.4**2),
        -0.5: torch.tensor(-0.5),
    }[bias]
    assert torch.allclose(out["density"], F.softplus(network.view(5, 4, 1) + blob), atol=1e-5)
    assert torch.allclose(geometry.forward_density(points), out["density"], atol=1e-6)
    field, deformation = geometry.forward_field(points)
    assert deformation is None
    assert torch.allclose(geometry.forward_level(field, 2.0), 2.0 - field)
    assert torch.allclose(geometry.export(points)["features"], out["features"], atol=1e-6)


@pytest.mark.parametrize("kind", ["finite_difference", "finite_difference_laplacian", "analytic"])
def test_normals_are_unit_length_and_point_outward(kind, small_geometry, points):
    geometry = make("implicit-volume", {
        **small_geometry, "normal_type": kind, "density_blob_scale": 20.0,
        "finite_difference_normal_eps": 1e-3,
    })  # fmt: skip
    out = geometry(points, output_normal=True)
    outward = F.normalize(points, dim=-1)
    assert torch.allclose(out["normal"].norm(dim=-1), torch.ones(5, 4), atol=1e-4)
    assert torch.equal(out["normal"], out["shading_normal"])
    assert (out["normal"] * outward).sum(-1).min() > 0.98
    with torch.no_grad():  # evaluation: no gradients around
        assert torch.allclose(geometry(points, output_normal=True)["normal"], out["normal"])


def test_normals_may_be_predicted_or_left_out(small_geometry, points):
    predicted = make("implicit-volume", {**small_geometry, "normal_type": "pred"})
    assert predicted(points, output_normal=True)["normal"].shape == (5, 4, 3)
    assert any(name.startswith("normal_network") for name, _ in predicted.named_parameters())
    none = make("implicit-volume", {**small_geometry, "normal_type": None})
    assert "normal" not in none(points, output_normal=True)


def test_paths_and_counts_of_the_default_grids():
    geometry = make("implicit-volume")
    assert set(dict(geometry.named_parameters())) == {
        "encoding.encoding.encoding.params", "density_network.layers.0.weight",
        "density_network.layers.2.weight", "feature_network.layers.0.weight",
        "feature_network.layers.2.weight",
    }  # fmt: skip
    params = geometry.encoding.encoding.encoding.params.detach()
    assert params.shape == (12599920,)
    assert params.abs().max() <= 1e-4 and params.std() == pytest.approx(1e-4 / 3**0.5, rel=0.05)
    assert geometry.bbox.tolist() == [[-1.0] * 3, [1.0] * 3]


def test_the_sphere_of_a_blob_is_extracted(small_geometry):
    geometry = make("implicit-volume", {
        **small_geometry, "isosurface_resolution": 24, "isosurface_threshold": 5.0,
        "density_blob_scale": 20.0, "density_blob_std": 0.6,
    })  # fmt: skip
    mesh = geometry.isosurface()
    # softplus(20 (1 - r / 0.6)) = 5 at r = 0.45.
    assert mesh.v_pos.norm(dim=-1).mean() == pytest.approx(0.45, abs=0.02)
    outward = (mesh.v_nrm * F.normalize(mesh.v_pos, dim=-1)).sum(-1)
    assert outward.min() > 0.5
    with pytest.raises(ValueError):
        make("implicit-volume", {**small_geometry, "isosurface": False}).isosurface()


def test_an_automatic_threshold_is_the_mean_of_what_is_there(small_geometry):
    geometry = make("implicit-volume", {
        **small_geometry, "isosurface_resolution": 16, "isosurface_threshold": "auto",
        "isosurface_coarse_to_fine": False, "density_blob_scale": 20.0, "density_blob_std": 0.6,
    })  # fmt: skip
    axis = torch.linspace(-1, 1, 33)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    field = geometry.forward_density(grid)
    level = field[field > 1e-5].mean().item()
    expected = 0.6 * (1 - math.log(math.expm1(level)) / 20)
    assert geometry.isosurface().v_pos.norm(dim=-1).mean() == pytest.approx(expected, abs=0.04)


# Encodings and networks


def test_composite_wrapper_may_put_the_position_first():
    cfg = {"otype": "HashGrid", "n_levels": 2, "n_features_per_level": 2, "log2_hashmap_size": 6,
           "base_resolution": 4, "per_level_scale": 2.0, "include_xyz": True}  # fmt: skip
    encoding = get_encoding(3, cfg)
    x = torch.rand(7, 3)
    assert encoding.n_output_dims == 7 and encoding(x).shape == (7, 7)
    assert torch.allclose(encoding(x)[:, :3], 2 * x - 1)
    assert "otype" in cfg and len(cfg) == 7  # the caller's config is left alone


def test_levels_open_with_the_step():
    encoding = get_encoding(3, {
        "otype": "ProgressiveBandHashGrid", "n_levels": 4, "n_features_per_level": 2,
        "log2_hashmap_size": 6, "base_resolution": 4, "per_level_scale": 1.5, "start_level": 1,
        "start_step": 10, "update_steps": 5,
    })  # fmt: skip
    x = torch.rand(6, 3)
    for step, levels in ((0, 1), (14, 1), (15, 2), (24, 3), (25, 4), (1000, 4)):
        encoding.do_update_step(0, step)
        opened = (encoding(x).abs().sum(0) > 0).tolist()
        assert opened == [True] * 2 * levels + [False] * (8 - 2 * levels), step


def test_bands_of_frequencies_open_through_a_cosine():
    encoding = get_encoding(
        2, {"otype": "ProgressiveBandFrequency", "n_frequencies": 2, "n_masking_step": 10}
    )
    x = torch.tensor([[0.3, 0.7]])
    encoding.do_update_step(0, 5)  # half way: the first band is open, the second not yet
    got = encoding(x)
    assert got.shape == (1, 8) and torch.count_nonzero(got) == 4
    assert torch.allclose(got[0, :4], torch.cat([x[0].sin(), x[0].cos()]), atol=1e-6)


def test_directions_by_spherical_harmonics():
    encoding = get_encoding(3, {"otype": "SphericalHarmonics", "degree": 3})
    up = encoding(torch.tensor([[0.5, 0.5, 1.0]]))  # the direction (0, 0, 1)
    expected = torch.zeros(9)
    expected[0] = 0.5 / math.pi**0.5
    expected[2] = math.sqrt(3 / (4 * math.pi))
    expected[6] = math.sqrt(5 / (16 * math.pi)) * 2
    assert torch.allclose(up[0], expected, atol=1e-5)


def test_a_grid_of_space_and_time_sums_two_grids():
    cfg = {"otype": "HashGridSpatialTime", "n_levels": 2, "n_features_per_level": 2,
           "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}  # fmt: skip
    composite = get_encoding(3, {**cfg, "static": False})
    grids = composite.encoding
    x = torch.rand(5, 3)
    space = grids.encoding(x)
    for time in (None, 0.0, 0.7):
        grids.frame_time = time
        at = torch.cat([x, torch.full((5, 1), time or 0.0)], -1)
        moved = grids.encoding_time(at)
        assert torch.allclose(composite(x), space + moved, atol=1e-6)


def test_networks():
    mlp = get_mlp(4, 2, {
        "otype": "VanillaMLP", "activation": "ReLU", "output_activation": "sigmoid",
        "n_neurons": 8, "n_hidden_layers": 2,
    })  # fmt: skip
    weights = list(mlp.parameters())
    assert [tuple(w.shape) for w in weights] == [(8, 4), (8, 8), (2, 8)]  # no bias
    x = torch.randn(3, 4)
    expected = torch.sigmoid(F.relu(F.relu(x @ weights[0].T) @ weights[1].T) @ weights[2].T)
    assert torch.allclose(mlp(x), expected, atol=1e-6)
    whole = create_network_with_input_encoding(
        3, 2, {"otype": "SphericalHarmonics", "degree": 2},
        {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none",
         "n_neurons": 4, "n_hidden_layers": 1},
    )  # fmt: skip
    assert whole(torch.rand(3, 3)).shape == (3, 2)


def test_a_network_may_start_as_a_ball():
    mlp = get_mlp(3, 1, {"otype": "SphereInitVanillaMLP", "n_neurons": 32, "n_hidden_layers": 2,
                         "sphere_init_radius": 0.5})  # fmt: skip
    axis = torch.tensor([[0.05, 0, 0], [0.9, 0, 0], [0, 0.9, 0], [0, 0, -0.9]])
    distance = mlp(axis).flatten()
    assert distance[0] < 0 and (distance[1:] > 0).all()


# Materials


def test_features_become_colour(points):
    material = make("no-material")
    assert not material.requires_normal and not material.requires_tangent
    features = torch.randn(5, 4, 3)
    got = material(features=features, viewdirs=points, positions=points, light_positions=points)
    assert torch.allclose(got, torch.sigmoid(features))
    assert torch.allclose(material.export(features=features)["albedo"], torch.sigmoid(features))
    network = make("no-material", {
        "input_feature_dims": 5, "n_output_dims": 4, "color_activation": "none",
        "mlp_network_config": {"otype": "VanillaMLP", "activation": "ReLU",
                               "output_activation": "none", "n_neurons": 8, "n_hidden_layers": 1},
    })  # fmt: skip
    assert network(features=torch.randn(6, 5)).shape == (6, 4)


def lit(**overrides):
    """A white point at the origin, normal along x, and a light 60 degrees away."""
    light = torch.tensor([[0.5, math.sqrt(0.75), 0.0]]) * 3
    given = {
        "features": torch.full((1, 3), 100.0), "positions": torch.zeros(1, 3),
        "shading_normal": torch.tensor([[1.0, 0.0, 0.0]]), "light_positions": light,
    }  # fmt: skip
    return {**given, **overrides}


def test_a_point_light_shades_by_lamberts_law():
    material = make("diffuse-with-point-light-material").eval()
    assert material.requires_normal
    # ambient 0.1 + diffuse 0.9 * cos 60.
    assert torch.allclose(material(**lit()), torch.full((1, 3), 0.55))
    away = torch.tensor([[-1.0, 0.0, 0.0]])
    assert torch.allclose(material(**lit(shading_normal=away)), torch.full((1, 3), 0.1))
    assert torch.allclose(material(**lit(), shading="albedo"), torch.ones(1, 3))
    # Half ambient light leaves half for the lamp: 0.5 + 0.5 * 0.5.
    assert torch.allclose(material(**lit(), ambient_ratio=0.5), torch.full((1, 3), 0.75))
    dark = lit(features=torch.full((1, 3), -100.0))
    assert torch.allclose(material(**dark), torch.zeros(1, 3))
    assert torch.allclose(material(**dark, shading="textureless"), torch.full((1, 3), 0.55))


def test_shading_begins_with_the_albedo_and_varies_afterwards():
    material = make("diffuse-with-point-light-material", {"ambient_only_steps": 5}).train()
    gray = lit(features=torch.zeros(1, 3))  # albedo 0.5
    seen = {}
    for step in range(60):
        material.do_update_step(0, step)
        seen.setdefault(step >= 5, set()).add(round(material(**gray)[0, 0].item(), 3))
    assert seen[False] == {0.5}
    assert seen[True] == {0.5, 0.55, 0.275}  # albedo, textureless, both
    only = make("diffuse-with-point-light-material", {"ambient_only_on_test": True}).eval()
    assert torch.allclose(only(**gray), torch.full((1, 3), 0.5))


# Backgrounds


def test_a_solid_background_is_one_colour():
    dirs = F.normalize(torch.randn(2, 3, 4, 3), dim=-1)
    background = make("solid-color-background", {"color": [0.1, 0.2, 0.3]})
    assert torch.allclose(background(dirs), torch.tensor([0.1, 0.2, 0.3]).expand(2, 3, 4, 3))
    assert list(background.parameters()) == []
    learned = make("solid-color-background", {"learned": True, "n_output_dims": 3})
    assert [tuple(p.shape) for p in learned.parameters()] == [(3,)]


@pytest.mark.parametrize("name", ["solid-color-background", "neural-environment-map-background"])
def test_augmentation_gives_each_image_its_own_flat_colour_in_training_only(name):
    dirs = F.normalize(torch.randn(64, 2, 2, 3), dim=-1)
    background = make(name, {"random_aug": True, "random_aug_prob": 0.5})
    with torch.no_grad():
        usual, augmented = background.eval()(dirs), background.train()(dirs)
    changed = (augmented != usual).flatten(1).any(1)
    assert 16 < changed.sum() < 48
    flat = augmented[changed]
    assert torch.equal(flat, flat[:, :1, :1].expand_as(flat))
    assert flat[:, 0, 0].unique(dim=0).shape[0] == flat.shape[0]  # one colour for each image
    shared = make(name, {"random_aug": True, "random_aug_prob": 1.0, "share_aug_bg": True}).train()
    assert shared(dirs).reshape(-1, 3).unique(dim=0).shape[0] == 1


def test_an_environment_map_depends_on_the_direction_and_may_be_fixed_in_evaluation():
    dirs = F.normalize(torch.randn(1, 4, 4, 3), dim=-1)
    background = make("neural-environment-map-background", {"eval_color": [0.0, 0.5, 1.0]})
    colors = background.train()(dirs)
    assert colors.shape == (1, 4, 4, 3) and colors.reshape(-1, 3).unique(dim=0).shape[0] == 16
    assert colors.min() >= 0 and colors.max() <= 1
    assert background.eval()(dirs)[0, 2, 1].tolist() == [0.0, 0.5, 1.0]


# Meshes


def test_a_mesh_knows_its_edges_normals_and_roughness():
    """An octahedron: 12 edges, normals along the axes."""
    vertices = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    faces = torch.tensor([[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4],
                          [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]])  # fmt: skip
    mesh = Mesh(vertices, faces, note="kept")
    assert mesh.extras["note"] == "kept" and mesh.v_rgb is None
    assert mesh.edges.shape == (12, 2)
    assert torch.allclose(mesh.v_nrm, vertices, atol=1e-6)
    assert mesh.normal_consistency().item() == pytest.approx(1.0)  # right angles along all edges
    # The neighbours of a corner sum to zero: its Laplacian is its own position.
    assert mesh.laplacian().item() == pytest.approx(1.0)
    speck = torch.cat([vertices, vertices[:3] * 0.01 + 5])
    both = Mesh(speck, torch.cat([faces, torch.tensor([[6, 7, 8]])]))
    assert both.remove_outlier(2).v_pos.shape == (6, 3)
    both.set_vertex_color(torch.rand(9, 3))
    assert both.v_rgb.shape == (9, 3)
