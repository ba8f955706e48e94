"""Defects of upstream that section 6.2 lists, each right here.

Those that other files of this folder prove are not repeated: `betas` as a list
(test_optimizers.py), equal markers and odd lengths of schedules (test_schedules.py), ``LAST`` in
``resume``, exports without a walk over the views and the step of weights in evaluation
(test_launch.py).
"""

import math

import pytest
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.data.uncond import (
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import load_module_weights
from threestudio.utils.ops import get_ray_directions, get_rays


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_cameras_of_every_batch_size_look_at_the_origin(batch_size):
    """torch.cross without dim takes the batch axis of three cameras for their coordinates."""
    cfg = parse_structured(RandomCameraDataModuleConfig, {
        "height": 2, "width": 2, "batch_size": batch_size, "camera_perturb": 0.0,
        "center_perturb": 0.0, "up_perturb": 0.0,
    })  # fmt: skip
    dataset = RandomCameraIterableDataset(cfg)
    batch = dataset.collate(next(iter(dataset)))
    right, up, back = batch["c2w"][:, :3, :3].unbind(-1)
    position = batch["camera_positions"]
    assert torch.allclose(back, position / position.norm(dim=-1, keepdim=True), atol=1e-5)
    azimuth = torch.deg2rad(batch["azimuth"])
    level = torch.stack([-azimuth.sin(), azimuth.cos(), torch.zeros(batch_size)], -1)
    assert torch.allclose(right, level, atol=1e-4)
    assert torch.allclose(up, torch.linalg.cross(back, right, dim=-1), atol=1e-5)


def test_three_views_of_evaluation_are_three_cameras():
    cfg = parse_structured(
        RandomCameraDataModuleConfig, {"eval_height": 2, "eval_width": 2, "n_val_views": 3}
    )
    dataset = RandomCameraDataset(cfg, "val")
    poses = torch.cat([dataset.collate([dataset[k]])["c2w"][:, :3, :3] for k in range(3)])
    assert torch.allclose(poses @ poses.mT, torch.eye(3).expand(3, 3, 3), atol=1e-5)
    assert torch.allclose(poses[:, 2, 0], torch.zeros(3), atol=1e-6)  # level horizons


def test_the_blob_of_the_density_is_annealed(small_geometry):
    schedule = {"min_anneal_step": 100, "max_anneal_step": 200, "start_val": 0.2, "end_val": 0.8}
    geometry = threestudio.find("implicit-volume")({
        **small_geometry, "density_bias": "blob_dreamfusion", "density_blob_scale": 4.0,
        "density_activation": None, "anneal_density_blob_std_config": schedule,
    })  # fmt: skip
    for parameter in geometry.density_network.parameters():
        torch.nn.init.zeros_(parameter)
    point = torch.tensor([[0.3, 0.0, 0.0]])
    for step, width in ((0, 0.2), (100, 0.2), (150, 0.5), (200, 0.8), (999, 0.8)):
        geometry.do_update_step(0, step)
        expected = 4.0 * math.exp(-0.5 * 0.3**2 / width**2)
        assert geometry.forward_density(point).item() == pytest.approx(expected, rel=1e-4)


def test_backgrounds_know_both_spellings_of_a_shared_colour():
    name = "mvdream-neural-environment-map-background"
    for key in ("share_aug", "share_aug_bg"):
        background = threestudio.find(name)({"random_aug": True, "random_aug_prob": 1.0, key: True})
        colours = background.train()(torch.nn.functional.normalize(torch.randn(4, 2, 2, 3), dim=-1))
        assert colours.reshape(-1, 3).unique(dim=0).shape[0] == 1


def test_old_checkpoints_hold_omegaconf_lists_and_load(tmp_path):
    old = {
        "state_dict": {"geometry.w": torch.ones(2)}, "epoch": 0, "global_step": 7,
        "optimizer_states": [{"param_groups": [{"betas": OmegaConf.create([0.9, 0.99])}]}],
    }  # fmt: skip
    torch.save(old, tmp_path / "last.ckpt")
    weights, _, step = load_module_weights(str(tmp_path / "last.ckpt"), module_name="geometry")
    assert weights["w"].tolist() == [1, 1] and step == 7


def test_an_unknown_name_lists_its_neighbours():
    with pytest.raises(KeyError, match="nerf-volume-renderer"):
        threestudio.find("nerf-volume-rendrer")


def test_the_background_is_evaluated_in_pieces(small_geometry):
    """A part of an image at a time, whatever the number of images."""
    parts = {
        "geometry": threestudio.find("implicit-volume")(small_geometry),
        "material": threestudio.find("no-material")({}),
        "background": threestudio.find("solid-color-background")({}),
    }
    renderer = threestudio.find("nerf-volume-renderer")(
        {"num_samples_per_ray": 8, "eval_chunk_size": 20}, **parts
    ).eval()
    asked = []
    forward = parts["background"].forward
    parts["background"].forward = lambda dirs: asked.append(dirs.numel() // 3) or forward(dirs)
    c2w = torch.eye(4)
    c2w[2, 3] = 2.0
    rays_o, rays_d = get_rays(get_ray_directions(7, 9, 9.0), c2w[None], keepdim=True)
    with torch.no_grad():
        renderer(rays_o, rays_d, light_positions=torch.zeros(1, 3))
    assert max(asked) <= 20 and sum(asked) == 63
