"""One sharp patch in a coarse image, against the base renderer's own images."""

import pytest
import threestudio
import torch
from threestudio.utils.ops import get_ray_directions, get_rays

SIZE = 12


def parts():
    geometry = threestudio.find("implicit-volume")({
        "pos_encoding_config": {"otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 8,
                                "base_resolution": 4, "per_level_scale": 1.5},
        "mlp_network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
    })  # fmt: skip
    return {
        "geometry": geometry,
        "material": threestudio.find("no-material")({}),
        "background": threestudio.find("solid-color-background")({"color": [1, 0.5, 0]}),
    }


def build(shared, **config):
    base = {"num_samples_per_ray": 16, "randomized": False}
    config = {"patch_size": 5, "global_downsample": 4, "base_renderer": base,
              "base_renderer_type": "nerf-volume-renderer", **config}  # fmt: skip
    return threestudio.find("patch-renderer")(config, **shared).train()


def rays(size=SIZE):
    pose = torch.eye(4)
    pose[2, 3] = 2.5
    return get_rays(get_ray_directions(size, size, 1.2 * size), pose[None].repeat(2, 1, 1), True)


@pytest.fixture
def shared():
    return parts()


def whole_and_coarse(renderer):
    base, (rays_o, rays_d) = renderer.base_renderer, rays()
    light = torch.zeros(2, 3)
    whole = base(rays_o, rays_d, light)
    coarse = base(rays_o[:, ::4, ::4], rays_d[:, ::4, ::4], light)
    return whole, coarse


@pytest.mark.parametrize("step", [0, 3])
def test_the_patch_is_sharp_and_the_rest_is_enlarged(shared, step):
    renderer = build(shared)
    renderer.do_update_step(0, step)
    out = renderer(*rays(), torch.zeros(2, 3))
    whole, coarse = whole_and_coarse(renderer)
    rows, columns = renderer._patch(SIZE, SIZE)
    for key in ("comp_rgb", "opacity", "depth", "comp_rgb_bg"):
        enlarged = torch.nn.functional.interpolate(
            coarse[key].permute(0, 3, 1, 2), (SIZE, SIZE), mode="bilinear"
        ).permute(0, 2, 3, 1)
        inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        inside[rows, columns] = True
        assert int(inside.sum()) == 25
        torch.testing.assert_close(out[key][:, inside], whole[key][:, inside])
        torch.testing.assert_close(out[key][:, ~inside], enlarged[:, ~inside])
    assert len(out["weights"]) == len(coarse["weights"])


def test_the_patch_moves_with_the_step_and_stays_inside(shared):
    renderer = build(shared)
    places = []
    for step in range(20):
        renderer.update_step(0, step)
        rows, columns = renderer._patch(SIZE, SIZE)
        assert 0 <= rows.start and rows.stop <= SIZE and rows.stop - rows.start == 5
        places.append((rows.start, columns.start))
    assert len(set(places)) > 10
    renderer.update_step(0, 3)
    assert renderer._patch(SIZE, SIZE)[0].start == places[3][0]


def test_detached_surroundings_pass_no_gradient(shared):
    renderer = build(shared, global_detach=True)
    out = renderer(*rays(), torch.zeros(2, 3))["comp_rgb"]
    rows, columns = renderer._patch(SIZE, SIZE)
    outside = out.clone()
    outside[:, rows, columns] = 0
    params = shared["geometry"].encoding.encoding.encoding.params
    (inside_grad,) = torch.autograd.grad(out[:, rows, columns].sum(), params, retain_graph=True)
    (outside_grad,) = torch.autograd.grad(outside.sum(), params)
    assert inside_grad.abs().sum() > 0 and outside_grad.abs().sum() == 0


def test_evaluation_and_large_patches_show_the_whole_image(shared):
    renderer = build(shared, patch_size=99)
    whole, _ = whole_and_coarse(renderer)
    torch.testing.assert_close(renderer(*rays(), torch.zeros(2, 3))["comp_rgb"], whole["comp_rgb"])
    small = build(shared).eval()
    out = small(*rays(), torch.zeros(2, 3))
    torch.testing.assert_close(out["comp_rgb"], small.base_renderer(
        *rays(), torch.zeros(2, 3))["comp_rgb"])  # fmt: skip


def test_a_background_per_pixel_is_cut_like_the_rays(shared):
    renderer = build(shared, patch_size=99)
    color = torch.rand(2, SIZE, SIZE, 3)
    out = renderer(*rays(), torch.zeros(2, 3), bg_color=color)
    torch.testing.assert_close(out["comp_rgb_bg"], color)
    assert renderer.geometry is shared["geometry"] and renderer.bbox.shape == (2, 3)


@pytest.mark.parametrize("config, message", [
    ({"base_renderer_type": ""}, "base_renderer_type is empty; expected a renderer's name"),
    ({"patch_size": 0}, "patch_size is 0; expected a positive number of pixels"),
    ({"global_downsample": 0}, "global_downsample is 0; expected a positive number"),
])  # fmt: skip
def test_wrong_values_are_refused(shared, config, message):
    with pytest.raises(ValueError, match=message):
        build(shared, **config)
