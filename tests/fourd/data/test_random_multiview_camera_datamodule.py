"""Groups of views around one object."""

import math

import pytest
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.utils.camera import camera_from_orbit
from threestudio.utils.config import parse_structured
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.data.random_multiview_camera_datamodule import (
    RandomMultiviewCameraDataModule,
    RandomMultiviewCameraDataModuleConfig,
    RandomMultiviewCameraIterableDataset,
)

STEADY = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}


@pytest.fixture(autouse=True)
def fixed_seed():
    set_experiment_seed(0)


def stream(**values):
    values = {"height": 4, "width": 4, "n_view": 4, "batch_size": 8, **values}
    return RandomMultiviewCameraIterableDataset(
        parse_structured(RandomMultiviewCameraDataModuleConfig, OmegaConf.create(values))
    )


def groups(batch, key, n_view=4):
    return batch[key].view(-1, n_view, *batch[key].shape[1:])


def test_views_of_a_group_share_all_but_the_azimuth():
    batch = stream().collate({"step": 3})
    for key in ("elevation", "camera_distances", "fovy"):
        of_groups = groups(batch, key)
        assert torch.equal(of_groups, of_groups[:, :1].expand_as(of_groups)), key
        assert of_groups[0, 0] != of_groups[1, 0], key
    azimuth_deg = groups(batch, "azimuth")
    assert torch.allclose(azimuth_deg.diff(dim=1), torch.full((2, 3), 90.0), atol=1e-4)
    assert azimuth_deg[0, 0] != azimuth_deg[1, 0]


def test_azimuths_of_three_views_divide_the_range_given():
    batch = stream(n_view=3, batch_size=3, azimuth_range=[0, 90], **STEADY).collate({"step": 0})
    assert torch.allclose(batch["azimuth"].diff(), torch.full((2,), 30.0), atol=1e-4)
    expected = camera_from_orbit(batch["elevation"], batch["azimuth"], batch["camera_distances"])
    assert torch.allclose(batch["c2w"], expected, atol=2e-6)


def test_start_azimuths_are_uniform_over_their_quarter():
    many = stream(batch_size=4)
    starts = [many.collate({"step": step})["azimuth"][0] for step in range(300)]
    fractions = ((torch.stack(starts) + 180.0) / 90.0).sort().values
    assert (fractions - torch.arange(300) / 300).abs().max() < 1.95 / math.sqrt(300)


def test_relative_distance_fixes_the_visible_half_height():
    values = {"camera_distance_range": [0.8, 1.0], "fovy_range": [15, 60]}
    for step in range(20):
        batch = stream(relative_radius=True, **values).collate({"step": step})
        half_height = batch["camera_distances"] * torch.tan(0.5 * batch["fovy"])
        assert 0.8 <= half_height.min() + 1e-5 and half_height.max() <= 1.0 + 1e-5
        absolute = stream(relative_radius=False, **values).collate({"step": step})
        assert torch.allclose(absolute["camera_distances"], half_height, atol=1e-5)


def test_zoom_narrows_the_view_after_the_distance_is_fixed():
    plain = stream(fovy_range=[40, 40]).collate({"step": 1})
    zoomed = stream(fovy_range=[40, 40], zoom_range=[0.5, 0.5]).collate({"step": 1})
    assert torch.equal(plain["camera_distances"], zoomed["camera_distances"])
    assert torch.allclose(zoomed["fovy"], torch.full((8,), math.radians(20.0)))
    spread = stream(fovy_range=[40, 40], zoom_range=[0.5, 1.0]).collate({"step": 1})["fovy"]
    assert spread[0] == spread[3] and spread[0] != spread[4]


def test_fovy_is_in_radians():
    fovy = stream(fovy_range=[15, 60]).collate({"step": 0})["fovy"]
    assert math.radians(15) <= fovy.min() and fovy.max() <= math.radians(60)


def test_flags_and_times():
    batch = stream().collate({"step": 0})
    assert batch["single_view"] is False and batch["is_video"] is False
    assert batch["images_per_group"] == 4
    assert "frame_times" not in batch
    # 4D-fy's third stage gives the view groups scene times by num_frames alone.
    dynamic = stream(num_frames=16, sample_rand_frames="t0").collate({"step": 0})
    assert dynamic["frame_times"].shape == (16,) and dynamic["is_video"] is False


def test_resolution_and_batch_follow_the_published_schedule_of_stage_one():
    schedule = stream(
        height=[4, 8], width=[4, 8], batch_size=[8, 4], resolution_milestones=[5], n_view=4
    )
    assert schedule.collate({"step": 4})["rays_d"].shape == (8, 4, 4, 3)
    assert schedule.collate({"step": 5})["rays_d"].shape == (4, 8, 8, 3)


def test_groups_stay_whole_on_their_rank():
    joint = stream(batch_size=8).collate({"step": 9})
    for rank in range(2):
        part = stream(batch_size=4)
        part.rank, part.world_size = rank, 2
        batch = part.collate({"step": 9})
        for key in ("c2w", "azimuth", "light_positions", "fovy"):
            assert torch.equal(batch[key], joint[key][4 * rank : 4 * (rank + 1)]), key


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"n_view": 0}, r"data\.n_view has the value 0; expected an integer of at least 1"),
        (
            {"n_view": 4, "batch_size": [8, 6], "height": [4, 8], "resolution_milestones": [5]},
            r"data\.batch_size has the value 6, which data\.n_view 4 does not divide; .*example 4",
        ),
        ({"n_view": 4, "batch_size": 2}, r"batch_size has the value 2, .* example 4"),
        ({"zoom_range": [1.0, 0.5]}, r"data\.zoom_range is \[1\.0, 0\.5\], which is reversed"),
        (
            {"zoom_range": [1.0, 4.0], "fovy_range": [15, 60]},
            r"zoom_range \[1\.0, 4\.0\] widens data\.fovy_range \[15, 60\] to 240 degrees",
        ),
        ({"num_frames": 0}, r"data\.num_frames has the value 0"),
    ],
)
def test_wrong_values_are_named_before_anything_is_built(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        RandomMultiviewCameraDataModule(OmegaConf.create(values))


def test_module_gives_groups_to_training_and_single_views_to_evaluation():
    module = RandomMultiviewCameraDataModule(
        {"n_view": 4, "batch_size": 4, "height": 4, "width": 4, "eval_height": 4, "eval_width": 4}
    )
    module.setup()
    assert next(iter(module.train_dataloader()))["c2w"].shape == (4, 4, 4)
    assert next(iter(module.val_dataloader()))["c2w"].shape == (1, 4, 4)


def test_module_is_found_under_its_names():
    for name in (
        "random-multiview-camera-datamodule",
        "mvdream-random-multiview-camera-datamodule",
        "4dfy-random-multiview-camera-datamodule",
    ):
        assert threestudio.find(name) is RandomMultiviewCameraDataModule
