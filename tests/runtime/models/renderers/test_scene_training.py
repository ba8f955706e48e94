"""The four parts of a scene together: training, its checkpoint, and the same run twice."""

import math

import pytest
import threestudio
import torch
from threestudio.utils.ops import get_ray_directions, get_rays
from threestudio.utils.rng import set_experiment_seed

GRID = {"n_levels": 4, "n_features_per_level": 2, "log2_hashmap_size": 10}
GRID |= {"base_resolution": 4, "per_level_scale": 1.6}
NETWORK = {"otype": "VanillaMLP", "activation": "ReLU", "output_activation": "none"}
NETWORK |= {"n_neurons": 16, "n_hidden_layers": 1}


def build_scene(dynamic: bool = False, device: str = "cpu", **renderer) -> torch.nn.ModuleDict:
    torch.manual_seed(0)
    encoding = {"otype": "HashGridSpatialTime" if dynamic else "HashGrid", **GRID}
    if dynamic:
        encoding["static"] = False
    geometry = threestudio.find("implicit-volume")(
        {"pos_encoding_config": encoding, "mlp_network_config": NETWORK}
    )
    material = threestudio.find("no-material")({})
    background = threestudio.find("neural-environment-map-background")(
        {"random_aug": True, "random_aug_gray": True, "share_aug_bg": True}
    )
    config = {"num_samples_per_ray": 24, "occupancy_update_interval": 4, **renderer}
    config.setdefault("occupancy_resolution", 8)
    rendering = threestudio.find("nerf-volume-renderer")(
        config, geometry=geometry, material=material, background=background
    )
    parts = {"geometry": geometry, "material": material, "background": background}
    return torch.nn.ModuleDict({**parts, "renderer": rendering}).to(device).train()


def views(step: int, batch_size: int = 2, size: int = 8, device: str = "cpu"):
    c2w = []
    for k in range(batch_size):
        angle = 0.7 * step + 2 * math.pi * k / batch_size
        back = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        right = torch.tensor([-math.sin(angle), math.cos(angle), 0.0])
        pose = torch.eye(4)
        pose[:3] = torch.stack([right, torch.tensor([0.0, 0, 1]), back, back * 2.5], dim=1)
        c2w.append(pose)
    rays_o, rays_d = get_rays(get_ray_directions(size, size, 1.1 * size), torch.stack(c2w), True)
    return rays_o.to(device), rays_d.to(device)


def train(scene, steps, optimizer=None, times=None):
    """Adam towards a grey picture with an empty rim; returns the last loss and the optimizer."""
    optimizer = optimizer or torch.optim.Adam(scene.parameters(), lr=0.02)
    device = scene["renderer"].bbox.device
    target = torch.zeros(8, 8, 1, device=device)
    target[2:6, 2:6] = 1.0
    for step in steps:
        for part in scene.values():
            part.do_update_step(0, step)
        rays_o, rays_d = views(step, device=str(device))
        lights = torch.zeros(2, 3, device=device)
        output = scene["renderer"](rays_o, rays_d, lights, frame_times=times)
        loss = (output["opacity"] - target).square().mean()
        loss = loss + (output["comp_rgb"] - 0.5).square().mean() * 0.1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), optimizer


@pytest.mark.parametrize("prune", [False, True])
def test_training_carves_the_shape_and_empties_cells(prune):
    scene = build_scene(prune_alpha_threshold=prune)
    first, optimizer = train(scene, range(1))
    last, _ = train(scene, range(1, 40), optimizer)
    assert last < first / 2
    assert 0 < scene["renderer"].estimator.binaries.float().mean() < 0.9


def test_the_same_seed_gives_the_same_bits_whatever_the_global_generators_do():
    def weights(noise):
        set_experiment_seed(3)
        scene = build_scene()
        torch.manual_seed(noise)
        train(scene, range(6))
        set_experiment_seed(0)
        return torch.cat([p.detach().flatten() for p in scene.parameters()])

    assert torch.equal(weights(1), weights(2))


def test_a_resumed_run_is_the_same_run(tmp_path):
    through = build_scene()
    train(through, range(11))
    stopped = build_scene()
    _, optimizer = train(stopped, range(6))
    state = {"scene": stopped.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "state.pt")

    resumed = build_scene()
    for parameter in resumed.parameters():
        torch.nn.init.zeros_(parameter)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["scene"])
    optimizer = torch.optim.Adam(resumed.parameters(), lr=0.02)
    optimizer.load_state_dict(state["optimizer"])
    train(resumed, range(6, 11), optimizer)
    for key, value in through.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_dynamic_scene_learns_two_pictures_at_two_times():
    scene = build_scene(dynamic=True, prune_alpha_threshold=False)
    optimizer = torch.optim.Adam(scene["geometry"].parameters(), lr=0.02)
    times = torch.tensor([0.0, 1.0])
    target = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)  # gone at first, there at last
    for step in range(60):
        for part in scene.values():
            part.do_update_step(0, step)
        rays_o, rays_d = views(step, size=4)
        output = scene["renderer"](rays_o, rays_d, torch.zeros(2, 3), frame_times=times)
        loss = (output["opacity"][:, 1:3, 1:3] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    opacity = output["opacity"][:, 1:3, 1:3].mean(dim=(1, 2, 3))
    assert opacity[1] - opacity[0] > 0.5
    # What exists at the last time only is still kept by the grid.
    assert scene["renderer"].estimator.binaries[0, 3:5, 3:5, 3:5].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_images_on_the_gpu():
    images = []
    for device in ("cpu", "cuda"):
        scene = build_scene(device=device).eval()
        rays_o, rays_d = views(0, device=device)
        with torch.no_grad():
            output = scene["renderer"](rays_o, rays_d, torch.zeros(2, 3, device=device))
        images.append(output["comp_rgb"].cpu())
        train(build_scene(device=device), range(3))
    assert torch.allclose(images[0], images[1], atol=1e-4)
