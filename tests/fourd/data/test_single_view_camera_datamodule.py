"""Images and clips of a moving scene: scene times, moving cameras, evaluation paths."""

import pytest
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.data.uncond import RandomCameraDataModuleConfig, RandomCameraIterableDataset
from threestudio.utils.config import parse_structured
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.data.single_view_camera_datamodule import (
    SingleViewCameraDataModule,
    SingleViewCameraDataModuleConfig,
    SingleViewCameraDataset,
    SingleViewCameraIterableDataset,
    draw_guidance_choice,
    sample_frame_times,
)

STEADY = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}
CLIPS = {
    "static": False,
    "num_frames": 8,
    "simultan": True,
    "prob_single_view_video": 1.0,
    "width_vid": 6,
    "height_vid": 3,
}


@pytest.fixture(autouse=True)
def fixed_seed():
    set_experiment_seed(0)


def config(**values):
    values = {"height": 4, "width": 4, "eval_height": 4, "eval_width": 4, **values}
    return parse_structured(SingleViewCameraDataModuleConfig, OmegaConf.create(values))


def stream(**values):
    return SingleViewCameraIterableDataset(config(**values))


def test_a_static_scene_gets_the_cameras_of_the_contracts_module():
    batch = stream(batch_size=3).collate({"step": 5})
    values = {"height": 4, "width": 4, "batch_size": 3}
    plain = parse_structured(RandomCameraDataModuleConfig, OmegaConf.create(values))
    expected = RandomCameraIterableDataset(plain).collate({"step": 5})
    flags = {"single_view": True, "is_video": False, "train_dynamic_camera": False}
    extra = flags | {"images_per_group": 1}
    assert set(batch) == set(expected) | set(extra)
    assert {key: batch[key] for key in extra} == extra
    for key, value in expected.items():
        assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value)), key


def test_a_clip_is_rendered_by_one_camera_at_its_own_size():
    batch = stream(**CLIPS).collate({"step": 0})
    assert batch["is_video"] is True and batch["single_view"] is True
    assert batch["rays_d"].shape == (1, 3, 6, 3)
    assert (batch["height"], batch["width"]) == (3, 6)
    assert batch["c2w"].shape == (1, 4, 4)
    assert batch["frame_times"].shape == batch["frame_times_video"].shape == (8,)
    # The vertical field of view spans the clip's height: f = 3 / (2 tan(fovy / 2)).
    corner = batch["rays_d"][0, 0, 0] @ batch["c2w"][0, :3, :3]
    focal_px = 1.5 / torch.tan(0.5 * batch["fovy"][0])
    assert torch.allclose(-corner[:2] / corner[2], torch.stack([-2.5 / focal_px, 1 / focal_px]))


def test_clips_come_as_often_as_asked_for_and_alike_on_every_rank():
    first, second = stream(**{**CLIPS, "prob_single_view_video": 0.3}), stream(**CLIPS)
    second.cfg.prob_single_view_video = 0.3
    second.rank, second.world_size = 1, 2
    kinds = [first.is_video_step(step) for step in range(1000)]
    assert kinds == [second.is_video_step(step) for step in range(1000)]
    # Three standard deviations of a binomial of 1000 draws.
    assert abs(sum(kinds) / 1000 - 0.3) < 0.044
    for without in ({"simultan": False}, {"prob_single_view_video": None}):
        assert not any(stream(**{**CLIPS, **without}).is_video_step(step) for step in range(9))


def test_a_video_probability_without_simultan_says_that_it_does_nothing(caplog):
    with caplog.at_level("WARNING", logger="pytorch_lightning"):
        stream(prob_single_view_video=0.5)
    assert "data.prob_single_view_video has no effect without data.simultan: true" in caplog.text


def test_the_two_guidance_draws_are_independent_and_uniform():
    draws = torch.tensor([draw_guidance_choice(step) for step in range(2000)])
    for column in draws.T:
        ordered = column.sort().values
        assert (ordered - torch.arange(2000) / 2000).abs().max() < 1.95 / 2000**0.5
    assert torch.corrcoef(draws.T)[0, 1].abs() < 0.07


def test_times_without_jitter_cover_the_clip_with_both_ends():
    assert sample_frame_times(config(num_frames=5), 3).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_times_with_t0_are_spaced_by_one_frame_and_jittered_within_it():
    cfg = config(num_frames=16, sample_rand_frames="t0")
    offsets = []
    for step in range(500):
        frame_times = sample_frame_times(cfg, step)
        assert torch.allclose(frame_times.diff(), torch.full((15,), 1 / 16), atol=1e-6)
        assert 0.0 <= frame_times[0] < 1 / 16 and frame_times[-1] < 1.0
        offsets.append(16 * frame_times[0])
    ordered = torch.stack(offsets).sort().values
    assert (ordered - torch.arange(500) / 500).abs().max() < 1.95 / 500**0.5


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_moving_camera_has_a_pose_per_frame(batch_size):
    moving = stream(batch_size=batch_size, train_dynamic_camera=True, **CLIPS, **STEADY)
    batch = moving.collate({"step": 2})
    assert batch["train_dynamic_camera"] is True
    assert batch["c2w"].shape == (8 * batch_size, 4, 4)
    assert batch["frame_times"].shape == (8,)
    for clip in range(batch_size):
        azimuth_deg = batch["azimuth"][8 * clip : 8 * (clip + 1)]
        steps_deg = azimuth_deg.diff()
        assert torch.allclose(steps_deg, steps_deg[:1].expand(7), atol=1e-4)
        assert 0.0 < steps_deg.abs().max() <= 90.0 / 8
        position = batch["camera_positions"][8 * clip : 8 * (clip + 1)]
        # Position and azimuth tell the same: the original moved it by the elevation's change.
        told = torch.rad2deg(torch.atan2(position[:, 1], position[:, 0]))
        assert ((told - azimuth_deg + 180.0) % 360.0 - 180.0).abs().max() < 1e-2


def test_a_moving_camera_stays_in_its_ranges():
    moving = stream(
        train_dynamic_camera=True,
        elevation_range=[0, 8],
        azimuth_range=[-20, 20],
        camera_distance_range=[2.5, 3.0],
        **CLIPS,
        **STEADY,
    )
    moved_elevation = moved_distance = 0.0
    turning = stream(train_dynamic_camera=True, **CLIPS, **STEADY)
    turns = [turning.collate({"step": step})["azimuth"].diff().abs().max() for step in range(20)]
    assert max(turns) > 90.0 / 16, "the azimuth has a speed of its own, not the elevation's"
    for step in range(60):
        batch = moving.collate({"step": step})
        assert 0.0 <= batch["elevation"].min() and batch["elevation"].max() <= 8.0
        assert batch["azimuth"].abs().max() <= 20.0
        assert 2.5 <= batch["camera_distances"].min() and batch["camera_distances"].max() <= 3.0
        moved_elevation = max(moved_elevation, float(batch["elevation"].diff().abs().max()))
        moved_distance = max(moved_distance, float(batch["camera_distances"].diff().abs().max()))
    assert 1.0 < moved_elevation <= 180.0 / (16 * 8) + 1e-4
    assert 0.02 < moved_distance <= 0.5 / 8 + 1e-5


def test_images_never_move_their_camera():
    values = {**CLIPS, "prob_single_view_video": 0.0, "train_dynamic_camera": True}
    batch = stream(**values).collate({"step": 0})
    assert batch["train_dynamic_camera"] is False and batch["c2w"].shape == (1, 4, 4)
    assert batch["frame_times"].shape == (8,)


def test_ranks_share_moving_clips_as_one_joint_batch_would():
    values = {"train_dynamic_camera": True, "sample_rand_frames": "t0", **CLIPS}
    joint = stream(batch_size=2, **values).collate({"step": 6})
    parts = []
    for rank in range(2):
        part = stream(batch_size=1, **values)
        part.rank, part.world_size = rank, 2
        parts.append(part.collate({"step": 6}))
    assert torch.equal(torch.cat([part["c2w"] for part in parts]), joint["c2w"])
    assert torch.equal(parts[1]["frame_times"], joint["frame_times"])


def test_static_evaluation_has_no_times():
    views = SingleViewCameraDataset(config(n_test_views=3), "test")
    batch = views.collate([views[1]])
    assert "frame_times" not in batch and batch["azimuth"].tolist() == [180.0]


def test_validation_spreads_its_views_over_the_clip():
    views = SingleViewCameraDataset(
        config(static=False, num_frames=4, num_frames_factor=2, n_val_views=4), "val"
    )
    batches = [views.collate([views[index]]) for index in range(4)]
    times = torch.cat([batch["frame_times"] for batch in batches])
    assert torch.allclose(times, torch.tensor([0, 2, 4, 6]) / 7)
    assert [float(batch["azimuth"]) for batch in batches] == [0.0, 90.0, 180.0, 270.0]
    assert torch.equal(batches[0]["frame_times_video"], torch.linspace(0, 1, 8))


@pytest.mark.parametrize(
    "test_traj, n_views", [("motion_smooth", 124), ("motion_smooth_full", 128), (None, 512)]
)
def test_dynamic_test_walks_its_path(test_traj, n_views):
    cfg = config(static=False, num_frames=16, num_frames_factor=4, test_traj=test_traj)
    views = SingleViewCameraDataset(cfg, "test")
    assert len(views) == n_views
    last = views.collate([views[n_views - 1]])
    assert last["frame_times"].shape == (1,) and last["train_dynamic_camera"] is False
    first = views.collate([views[0]])
    assert float(first["azimuth"]) == (0.0 if test_traj is None else 360.0)
    assert float(first["frame_times"]) == 0.0


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"num_frames": 0}, r"data\.num_frames has the value 0; expected an integer of at least 1"),
        ({"width_vid": 0}, r"data\.width_vid has the value 0"),
        ({"sample_rand_frames": "t1"}, r"sample_rand_frames is 't1'; expected null or 't0'"),
        ({"prob_single_view_video": 1.5}, r"prob_single_view_video has the value 1\.5; .*\[0, 1\]"),
        ({"test_traj": "spiral"}, r"test_traj is 'spiral'; expected null, 'motion_smooth'"),
        (
            {"static": False, "num_frames": 6, "test_traj": "motion_smooth"},
            r"num_test_loop_static 4 and num_frames \* num_frames_factor 6; expected an even",
        ),
        ({"fovy_range": [60, 15]}, r"data\.fovy_range is \[60, 15\], which is reversed"),
    ],
)
def test_wrong_values_are_named_before_anything_is_built(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        SingleViewCameraDataModule(OmegaConf.create(values))


def test_module_is_found_under_its_names():
    assert threestudio.find("single-view-camera-datamodule") is SingleViewCameraDataModule
    assert threestudio.find("4dfy-random-camera-datamodule") is SingleViewCameraDataModule


def test_distances_relative_to_the_field_of_view():
    """The distance is then the visible half height, for images and for clips that move."""
    values = {"relative_radius": True, "fovy_range": [15, 60], "camera_distance_range": [0.8, 1.0]}
    for extra in ({}, CLIPS, {**CLIPS, "train_dynamic_camera": True}):
        relative = stream(**{**STEADY, **values, **extra}).collate({"step": 3})
        half_height = relative["camera_distances"] * torch.tan(relative["fovy"] / 2)
        absolute = stream(**{**STEADY, **values, "relative_radius": False, **extra})
        expected = absolute.collate({"step": 3})
        torch.testing.assert_close(half_height, expected["camera_distances"])
        assert 0.8 <= half_height.min() and half_height.max() <= 1.0
        for key in ("elevation", "azimuth", "fovy"):
            assert torch.equal(relative[key], expected[key]), "no other draw may shift"
        away = relative["camera_positions"].norm(dim=-1)
        torch.testing.assert_close(away, relative["camera_distances"])
