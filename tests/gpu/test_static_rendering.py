"""Rendering on a CUDA device: a step that never waits, and nerfacc beside our own sampler.

These are skipped without a GPU; tests/runtime/models/renderers has the same laws on the CPU.
"""

import copy

import pytest
import threestudio
import torch
from threestudio.stand_ins.finder import is_installed

import custom.fourd  # noqa: F401 - registers the names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GRID = {
    "otype": "HashGridSpatialTime",
    "n_levels": 8,
    "n_features_per_level": 2,
    "log2_hashmap_size": 14,
    "base_resolution": 8,
    "per_level_scale": 1.5,
    "static": False,
}
NETWORK = {"otype": "VanillaMLP", "n_neurons": 32, "n_hidden_layers": 1}


def make_parts(**grid):
    torch.manual_seed(0)
    geometry = threestudio.find("implicit-volume")(
        {
            "pos_encoding_config": {**GRID, **grid},
            "mlp_network_config": NETWORK,
            "normal_type": None,
        }
    )
    material = threestudio.find("no-material")({"n_output_dims": 3, "color_activation": "sigmoid"})
    background = threestudio.find("solid-color-background")({"learned": True, "random_aug": True})
    scene = {"geometry": geometry, "material": material, "background": background}
    return {name: part.cuda().train() for name, part in scene.items()}


def build(name, parts, **config):
    config = {"num_samples_per_ray": 128, **config}
    renderer = threestudio.find(name)(config, **parts).cuda().train()
    renderer.do_update_step(0, 0)
    return renderer


def batch(n_images=4, size=48):
    ticks = (torch.arange(size, device="cuda") + 0.5) / size * 2.4 - 1.2
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    origins = torch.stack([x, y, torch.full_like(x, -2.0)], dim=-1).expand(n_images, -1, -1, -1)
    towards = torch.tensor([0.1, 0.05, 1.0], device="cuda")
    directions = torch.nn.functional.normalize(towards, dim=0).expand_as(origins)
    return {
        "rays_o": origins,
        "rays_d": directions,
        "light_positions": torch.zeros(n_images, 3, device="cuda"),
        "frame_times": torch.linspace(0, 1, n_images, device="cuda"),
        "is_video": True,
        "num_frames": n_images,
        "images_per_group": n_images,
    }


def loss_of(output):
    weight = torch.linspace(0.5, 1.5, output["comp_rgb"].numel(), device="cuda")
    colour = (output["comp_rgb"] * weight.view_as(output["comp_rgb"])).mean()
    return colour + output["depth"].square().mean() + output["z_variance"].mean()


def gradient(parts, output):
    modules = (parts["geometry"], parts["background"])
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss_of(output), parameters, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


PROPOSAL = {
    "estimator": "proposal",
    "proposal_network_config": {
        "encoding_config": {"otype": "Frequency", "n_frequencies": 6},
        "network_config": NETWORK,
    },
    "prop_optimizer_config": {"name": "Adam", "args": {"lr": 0.01}},
}
CONFIGS = [
    ("nerf-volume-renderer", {}),
    ("nerf-volume-renderer", {"prune_alpha_threshold": False}),
    ("nerf-volume-renderer", {"estimator": "importance"}),
    ("mask-nerf-volume-renderer", {"train_max_nums": 2000}),
    ("nerf-volume-renderer", PROPOSAL),
]


@pytest.mark.parametrize("loop_time", [False, True])
@pytest.mark.parametrize("name, config", CONFIGS)
def test_a_step_does_not_wait_for_the_device(name, config, loop_time):
    parts = make_parts(loop_time=loop_time)
    renderer, arguments = build(name, parts, **config), batch()

    def step(number):
        renderer.do_update_step(0, number)
        parts["background"].do_update_step(0, number)
        loss_of(renderer(**arguments)).backward()

    for number in (16, 32):  # builds kernels, allocates, and counts once
        step(number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (48, 304, 320):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert parts["background"].env_color.grad.isfinite().all()


def test_blocks_do_not_wait_either():
    parts = make_parts()
    base = {"num_samples_per_ray": 128, "train_max_nums": 500}
    renderer = threestudio.find("stable-nerf-volume-renderer")(
        {"base_renderer_type": "mask-nerf-volume-renderer", "base_renderer": base}, **parts
    )
    renderer, arguments = renderer.cuda().train(), batch()
    loss_of(renderer(**arguments)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_of(renderer(**arguments)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name, config", CONFIGS[:3])
def test_images_and_gradients_are_those_of_dynamic_lists(name, config):
    parts, arguments = make_parts(), batch()
    results = []
    for sampler in ("dynamic", "auto"):
        renderer = build(name, parts, sampler=sampler, **config)
        output = renderer(**arguments)
        results.append((output, gradient(parts, output)))
    (first, expected), (second, found) = results
    assert "is_padding" in second and "is_padding" not in first
    for key in ("comp_rgb", "opacity", "depth", "z_variance"):
        assert torch.allclose(first[key], second[key], atol=1e-5), key
    # Tables are added to in no particular order.
    assert (expected - found).norm() <= 1e-3 * expected.norm()


def test_the_length_follows_the_counts_without_waiting():
    parts, arguments = make_parts(), batch()
    renderer = build("nerf-volume-renderer", parts, prune_alpha_threshold=False)
    few = copy.deepcopy(renderer.estimator.binaries)
    few[:, :, :, 4:] = False
    renderer.estimator.binaries.copy_(few)
    short = renderer(**arguments)["weights"].shape[0]
    renderer.estimator.binaries.fill_(True)
    renderer(**arguments)
    torch.cuda.synchronize()
    assert renderer(**arguments)["weights"].shape[0] > 4 * short
    assert renderer._samplers.static.samples.dropped.item() > 0


@pytest.mark.skipif(not is_installed("nerfacc"), reason="needs the package nerfacc")
@pytest.mark.parametrize("prune", [False, True])
def test_nerfacc_gives_the_same_images_and_gradients(prune):
    parts, arguments = make_parts(), batch()
    results = []
    for sampler in ("dynamic", "nerfacc"):
        renderer = build(
            "nerf-volume-renderer", parts, sampler=sampler, prune_alpha_threshold=prune
        )
        output = renderer(**arguments)
        results.append((output, gradient(parts, output)))
        results[-1] += (renderer.eval()(**arguments)["comp_rgb"],)
    (first, expected, still), (second, found, shown) = results
    # A step whose middle lies on the face of a cell may count to either side: one in thousands.
    n_samples = first["weights"].shape[0]
    assert abs(second["weights"].shape[0] - n_samples) <= max(8, n_samples // 500)
    for ours, theirs in ((first["comp_rgb"], second["comp_rgb"]), (still, shown)):
        assert (ours - theirs).abs().mean() < 1e-4
    assert (expected - found).norm() <= 2e-2 * expected.norm()
