"""The volume renderer: its arguments (4.9) and the table of its outputs (5)."""

import math

import pytest
import threestudio
import torch
from threestudio.models.renderers.base import Rasterizer, Renderer, VolumeRenderer
from threestudio.utils.ops import get_ray_directions, get_rays

B, H, W = 2, 7, 5
PER_SAMPLE = {"weights": 1, "t_points": 1, "t_intervals": 1, "t_dirs": 3, "points": 3}


class Parts:
    """The three parts of a scene and a renderer of them."""

    def __init__(self, geometry, material=None, background=None, **renderer):
        self.geometry = threestudio.find("implicit-volume")(geometry)
        self.material = threestudio.find((material or {}).pop("type", "no-material"))(
            material or {}
        )
        self.background = threestudio.find("solid-color-background")(background or {})
        self.renderer = threestudio.find("nerf-volume-renderer")(
            {"num_samples_per_ray": 48, **renderer},
            geometry=self.geometry, material=self.material, background=self.background,
        )  # fmt: skip
        for part in (self.geometry, self.material, self.background):
            part.train()


@pytest.fixture
def rays():
    """Two cameras at distance 2.5, on +x and on +y."""
    first = torch.tensor([[0.0, 0, 1, 2.5], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    second = torch.tensor([[-1.0, 0, 0, 0], [0, 0, 1, 2.5], [0, 1, 0, 0], [0, 0, 0, 1]])
    c2w = torch.stack([first, second])
    rays_o, rays_d = get_rays(get_ray_directions(H, W, 6.0), c2w, keepdim=True)
    return {"rays_o": rays_o, "rays_d": rays_d, "light_positions": c2w[:, :3, 3]}


@pytest.fixture
def solid(small_geometry):
    """A ball of radius about one half, dense enough to be opaque in its middle."""
    return {**small_geometry, "density_blob_scale": 40.0, "density_blob_std": 0.5}


def test_renderers_borrow_their_parts(solid):
    parts = Parts(solid, radius=1.5)
    renderer = parts.renderer
    assert isinstance(renderer, VolumeRenderer) and issubclass(Rasterizer, Renderer)
    assert renderer.geometry is parts.geometry and renderer.material is parts.material
    assert not any(key.startswith(("geometry", "material")) for key in renderer.state_dict())
    assert list(renderer.parameters()) == []
    assert renderer.bbox.tolist() == [[-1.5] * 3, [1.5] * 3]
    other = Parts(solid)
    renderer.set_geometry(other.geometry)
    renderer.set_material(other.material)
    renderer.set_background(other.background)
    assert renderer.geometry is other.geometry and renderer.background is other.background


def test_images_of_training(solid, rays):
    parts = Parts(solid, background={"color": [0.2, 0.4, 0.6]})
    out = parts.renderer.train()(**rays)
    shapes = {"comp_rgb": 3, "comp_rgb_fg": 3, "comp_rgb_bg": 3, "opacity": 1, "depth": 1,
              "z_variance": 1}  # fmt: skip
    assert {k: tuple(out[k].shape) for k in shapes} == {k: (B, H, W, n) for k, n in shapes.items()}
    assert torch.allclose(
        out["comp_rgb"], out["comp_rgb_fg"] + out["comp_rgb_bg"] * (1 - out["opacity"]), atol=1e-6
    )
    assert torch.allclose(out["comp_rgb_bg"][0, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
    assert out["opacity"].min() >= 0 and out["opacity"].max() <= 1 + 1e-6
    assert out["opacity"][0, H // 2, W // 2] > 0.99
    # The origin is 2.5 away; the ball begins half a unit before it and is soft at its edge.
    depth = out["depth"][0, H // 2, W // 2] / out["opacity"][0, H // 2, W // 2]
    assert 2.0 < depth.item() < 2.2


def test_samples_of_training_and_the_sums_over_them(solid, rays):
    out = Parts(solid).renderer.train()(**rays)
    n_samples = out["ray_indices"].shape[0]
    assert out["ray_indices"].dtype == torch.long and out["ray_indices"].max() < B * H * W
    for key, size in {**PER_SAMPLE, "density": 1, "features": 3}.items():
        assert out[key].shape == (n_samples, size), key
    for image, values in (("opacity", 1.0), ("depth", out["t_points"])):
        summed = torch.zeros(B * H * W, 1).index_add(0, out["ray_indices"], out["weights"] * values)
        assert torch.allclose(summed.view(B, H, W, 1), out[image], atol=1e-5), image
    colours = torch.sigmoid(out["features"]) * out["weights"]
    summed = torch.zeros(B * H * W, 3).index_add(0, out["ray_indices"], colours)
    assert torch.allclose(summed.view(B, H, W, 3), out["comp_rgb_fg"], atol=1e-5)
    origins = rays["rays_o"].reshape(-1, 3)[out["ray_indices"]]
    along = origins + out["t_points"] * out["t_dirs"]
    assert torch.allclose(along, out["points"], atol=1e-5)
    assert torch.allclose(
        out["t_intervals"], torch.full_like(out["t_intervals"], 1.732 * 2 / 48), atol=1e-5
    )


def test_weights_follow_the_quadrature_of_nerf(solid, rays):
    """w = T (1 - exp(-sigma delta)), T the light that the samples before let through."""
    out = Parts(solid, prune_alpha_threshold=False, grid_prune=False).renderer.train()(**rays)
    ray = (H // 2) * W + W // 2
    mine = out["ray_indices"] == ray
    light, expected = 1.0, []
    for sigma, delta in zip(
        out["density"][mine].flatten().tolist(), out["t_intervals"][mine].flatten().tolist()
    ):
        expected.append(light * (1 - math.exp(-sigma * delta)))
        light *= math.exp(-sigma * delta)
    assert out["weights"][mine].flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_variance_along_the_ray(solid, rays):
    out = Parts(solid).renderer.train()(**rays)
    ray = (H // 2) * W + W // 2
    mine = out["ray_indices"] == ray
    share = out["weights"][mine] / out["opacity"][0, H // 2, W // 2]
    t = out["t_points"][mine]
    expected = (share * (t - (share * t).sum()) ** 2).sum()
    assert out["z_variance"][0, H // 2, W // 2].item() == pytest.approx(expected.item(), abs=1e-5)
    assert (out["z_variance"][out["opacity"] <= 0.5] == 0).all()


def test_evaluation_gives_images_only_and_repeats_itself(solid, rays):
    parts = Parts(solid, {"type": "diffuse-with-point-light-material"})
    renderer = parts.renderer.eval()
    parts.material.eval()
    with torch.no_grad():
        out, again = renderer(**rays), renderer(**rays)
    assert set(out) == {"comp_rgb", "comp_rgb_fg", "comp_rgb_bg", "opacity", "depth", "z_variance",
                        "comp_normal"}  # fmt: skip
    assert all(torch.equal(out[key], again[key]) for key in out)
    # In display range: the middle of the first image faces +x, (1, 1/2, 1/2); nothing is black.
    assert torch.allclose(
        out["comp_normal"][0, H // 2, W // 2], torch.tensor([1.0, 0.5, 0.5]), atol=0.12
    )
    assert (out["comp_normal"][out["opacity"][..., 0] == 0] == 0).all()


def test_normals_in_training_are_asked_for(solid, rays):
    shaded = {"type": "diffuse-with-point-light-material"}
    plain = Parts(solid, dict(shaded)).renderer.train()(**rays)
    assert "comp_normal" not in plain and plain["normal"].shape == plain["points"].shape
    assert torch.equal(plain["normal"], plain["shading_normal"])
    asked = Parts(
        solid, dict(shaded), return_comp_normal=True, return_normal_perturb=True
    ).renderer.train()(**rays)
    assert asked["comp_normal"].shape == (B, H, W, 3)
    assert asked["normal_perturb"].shape == asked["normal"].shape
    assert not torch.equal(asked["normal_perturb"], asked["normal"])


@pytest.mark.parametrize("shape", [(B, 3), (B, H, W, 3)])
def test_a_given_background_replaces_the_scenes(solid, rays, shape):
    given = torch.rand(shape)
    out = Parts(solid).renderer.train()(**rays, bg_color=given)
    expected = given if len(shape) == 4 else given[:, None, None].expand(B, H, W, 3)
    assert torch.allclose(out["comp_rgb_bg"], expected)


def test_latents_have_four_channels(solid, rays):
    parts = Parts(
        {**solid, "n_feature_dims": 4}, {"n_output_dims": 4, "color_activation": "none"},
        {"n_output_dims": 4, "color": [0, 0, 0, 0]},
    )  # fmt: skip
    assert parts.renderer.train()(**rays)["comp_rgb"].shape == (B, H, W, 4)


def test_batch_keys_reach_the_material_in_training_only(solid, rays):
    seen = []
    parts = Parts(solid)
    forward = parts.material.forward
    parts.material.forward = lambda **given: seen.append(set(given)) or forward(**given)
    batch = {**rays, "elevation": torch.zeros(B), "height": H}
    parts.renderer.train()(**batch)
    with torch.no_grad():
        parts.renderer.eval()(**batch)
    always = {"viewdirs", "positions", "light_positions", "features"}
    assert always <= seen[0] and {"elevation", "height"} <= seen[0]
    assert always <= seen[1] and not {"elevation", "height"} & seen[1]


def test_an_empty_scene_shows_its_background(small_geometry, rays):
    parts = Parts({**small_geometry, "density_bias": -100.0}, background={"color": [1, 0, 0]})
    for mode in (True, False):
        out = parts.renderer.train(mode)(**rays)
        assert torch.allclose(out["comp_rgb"], torch.tensor([1.0, 0, 0]).expand(B, H, W, 3))
        assert out["opacity"].abs().max() < 1e-30 and out["depth"].abs().max() < 1e-30


def test_the_grid_empties_in_training_and_never_while_loading(solid):
    parts = Parts(solid)
    renderer = parts.renderer
    before = renderer.estimator.binaries.clone()
    renderer.eval().do_update_step(0, 0)
    renderer.train().do_update_step(0, 0, on_load_weights=True)
    renderer.do_update_step(0, 3)
    assert torch.equal(renderer.estimator.binaries, before)
    renderer.do_update_step(0, 16)
    assert renderer.estimator.binaries.shape == (1, 32, 32, 32)
    assert 0 < renderer.estimator.binaries.float().mean() < 0.5
    assert not renderer.estimator.binaries[0, 0, 0, 0]


def test_mode_decides_whether_samples_are_jittered(solid):
    renderer = Parts(solid).renderer
    assert renderer.train().randomized is True and renderer.eval().randomized is False
    assert Parts(solid, randomized=False).renderer.train().randomized is False
