"""`random-camera-datamodule`: batches as a function of the step, evaluation views, real trainer."""

from dataclasses import fields

import pytest
import pytorch_lightning as pl
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraDataset,
    RandomCameraIterableDataset,
)
from threestudio.utils.camera import camera_from_orbit
from threestudio.utils.config import parse_structured
from threestudio.utils.rng import set_experiment_seed

CONTRACT_KEYS = {
    "rays_o": (3,),
    "rays_d": (3,),
    "mvp_mtx": (4, 4),
    "proj_mtx": (4, 4),
    "c2w": (4, 4),
    "camera_positions": (3,),
    "light_positions": (3,),
    "elevation": (),
    "azimuth": (),
    "camera_distances": (),
    "fovy": (),
}
STEADY = {"camera_perturb": 0.0, "center_perturb": 0.0, "up_perturb": 0.0}


@pytest.fixture(autouse=True)
def fixed_seed():
    set_experiment_seed(0)


def dataset(**values):
    values = {"height": 4, "width": 4, **values}
    return RandomCameraIterableDataset(
        parse_structured(RandomCameraDataModuleConfig, OmegaConf.create(values))
    )


def eval_views(split, **values):
    values = {"eval_height": 4, "eval_width": 6, **values}
    return RandomCameraDataset(
        parse_structured(RandomCameraDataModuleConfig, OmegaConf.create(values)), split
    )


def assert_same_batch(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        else:
            assert value == second[key], key


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_key_has_its_shape(batch_size):
    batch = dataset(batch_size=batch_size, height=4, width=5).collate({"step": 2})
    for key, tail in CONTRACT_KEYS.items():
        image = (4, 5) if key.startswith("rays") else ()
        assert batch[key].shape == (batch_size, *image, *tail), key
        assert batch[key].dtype == torch.float32, key
    assert (batch["height"], batch["width"], batch["step"]) == (4, 5, 2)
    assert set(batch) == {*CONTRACT_KEYS, "height", "width", "step"}


@pytest.mark.parametrize("batch_size", [2, 3, 4])
def test_poses_are_those_of_their_angles(batch_size):
    batch = dataset(batch_size=batch_size, **STEADY).collate({"step": 11})
    expected = camera_from_orbit(batch["elevation"], batch["azimuth"], batch["camera_distances"])
    assert torch.allclose(batch["c2w"], expected, atol=2e-6)
    assert torch.allclose(batch["camera_positions"], expected[:, :3, 3], atol=2e-6)
    assert torch.allclose(batch["rays_d"].norm(dim=-1), torch.ones(batch_size, 4, 4), atol=1e-6)


def test_angles_and_sizes_stay_in_their_ranges_and_units():
    stream = dataset(
        batch_size=4,
        elevation_range=[-5, 20],
        azimuth_range=[-30, 60],
        camera_distance_range=[2, 3],
        fovy_range=[15, 60],
    )
    for step in range(40):
        batch = stream.collate({"step": step})
        for key, low, high in (
            ("elevation", -5, 20),
            ("azimuth", -30, 60),
            ("camera_distances", 2, 3),
            ("fovy", 0.2617, 1.0472),
        ):
            assert low <= batch[key].min() and batch[key].max() <= high, key


def test_ray_directions_may_stay_unnormalised():
    batch = dataset(rays_d_normalize=False, **STEADY).collate({"step": 0})
    forward = -batch["c2w"][:, None, None, :3, 2]
    along = (batch["rays_d"] * forward).sum(dim=-1)
    assert torch.allclose(along, torch.ones_like(along), atol=1e-6)


def test_collating_a_step_twice_or_after_others_gives_the_same_batch():
    stream = dataset(batch_size=3)
    expected = dataset(batch_size=3).collate({"step": 7})
    for step in (0, 9, 7, 3):
        stream.update_step(0, step + 5)
        batch = stream.collate({"step": step})
        if step == 7:
            assert_same_batch(batch, expected)


def test_seed_and_step_change_the_cameras():
    stream = dataset(batch_size=2)
    first = stream.collate({"step": 0})["c2w"]
    assert not torch.equal(first, stream.collate({"step": 1})["c2w"])
    set_experiment_seed(1)
    assert not torch.equal(first, stream.collate({"step": 0})["c2w"])


def test_global_generators_are_neither_used_nor_moved():
    stream = dataset(batch_size=2)
    torch.manual_seed(1)
    first, state = stream.collate({"step": 0}), torch.get_rng_state()
    torch.manual_seed(2)
    second = stream.collate({"step": 0})
    assert_same_batch(first, second)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("prefetched", [0, 1, 5])
def test_resolution_changes_exactly_at_its_milestone_whatever_is_prefetched(prefetched):
    stream = dataset(
        height=[4, 8, 16], width=[4, 8, 16], batch_size=[3, 2, 1], resolution_milestones=[3, 5]
    )
    iterator = iter(stream)
    queue = [stream.collate(next(iterator)) for _ in range(prefetched)]
    for step in range(8):
        queue.append(stream.collate(next(iterator)))
        stream.update_step(0, step)
        batch = queue.pop(0)
        expected = 4 if step < 3 else 8 if step < 5 else 16
        assert batch["step"] == step
        assert batch["rays_d"].shape == ({4: 3, 8: 2, 16: 1}[expected], expected, expected, 3)
        assert batch["height"] == expected
        assert stream.height == expected, "the attributes show the step that runs"


def test_milestones_without_a_second_resolution_are_ignored_with_one_line(caplog):
    with caplog.at_level("WARNING", logger="pytorch_lightning"):
        stream = dataset(resolution_milestones=[10])
    assert "data.resolution_milestones is [10] but there is one resolution" in caplog.text
    assert stream.collate({"step": 20})["height"] == 4


def test_views_widen_progressively_from_the_front():
    stream = dataset(
        batch_size=64,
        progressive_until=9,
        eval_elevation_deg=15.0,
        elevation_range=[0, 60],
        **STEADY,
    )
    front = stream.collate({"step": 0})
    assert torch.equal(front["azimuth"], torch.zeros(64))
    assert torch.allclose(front["elevation"], torch.full((64,), 15.0), atol=1e-5)
    stream.update_step(0, 5)
    assert stream.elevation_range == (7.5, 37.5) and stream.azimuth_range == (-90.0, 90.0)
    half = stream.collate({"step": 5})
    assert half["azimuth"].abs().max() <= 90.0 and half["elevation"].max() <= 37.5
    assert stream.collate({"step": 10})["azimuth"].max() > 170.0


def test_without_progression_the_first_step_sees_the_whole_range():
    azimuth = dataset(batch_size=16).collate({"step": 0})["azimuth"]
    assert azimuth.max() - azimuth.min() > 300.0


@pytest.mark.parametrize("uniform", [True, False])
def test_ranks_share_the_step_as_one_joint_batch_would(uniform):
    joint = dataset(batch_size=6, batch_uniform_azimuth=uniform).collate({"step": 4})
    parts = []
    for rank in range(2):
        stream = dataset(batch_size=3, batch_uniform_azimuth=uniform)
        stream.rank, stream.world_size = rank, 2
        parts.append(stream.collate({"step": 4}))
    for key in CONTRACT_KEYS:
        assert torch.equal(torch.cat([part[key] for part in parts]), joint[key]), key


def test_accumulated_batches_make_one_joint_batch_of_their_step():
    joint = dataset(batch_size=4).collate({"step": 1})
    stream = dataset(batch_size=2)
    stream.batches_per_step = 2
    iterator = iter(stream)
    batches = [stream.collate(next(iterator)) for _ in range(4)]
    assert [batch["step"] for batch in batches] == [0, 0, 1, 1]
    assert torch.equal(torch.cat([batches[2]["c2w"], batches[3]["c2w"]]), joint["c2w"])


def test_rank_and_world_size_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    stream = dataset()
    assert (stream.rank, stream.world_size) == (1, 4)


class ForeignDataset(RandomCameraIterableDataset):
    """Collates as upstream's extensions do: from the attributes, without looking at the batch."""

    def collate(self, batch):
        return {"height": self.height, "batch_size": self.batch_size, "step": batch["step"]}


def foreign():
    values = {"height": [4, 8], "width": [4, 8], "batch_size": 2, "resolution_milestones": [3]}
    return ForeignDataset(parse_structured(RandomCameraDataModuleConfig, OmegaConf.create(values)))


def test_a_foreign_collate_sees_the_state_of_its_step():
    stream = foreign()
    iterator = iter(stream)
    ahead = stream.collate(next(iterator))
    for step in range(6):
        batch, ahead = ahead, stream.collate(next(iterator))
        stream.update_step(0, step)
        assert (batch["step"], batch["height"]) == (step, 4 if step < 3 else 8)


def test_a_foreign_data_module_that_resumes_catches_up():
    stream = foreign()
    iterator = iter(stream)
    next(iterator), next(iterator)
    stream.update_step(0, 100)
    assert stream.collate(next(iterator)) == {"height": 8, "batch_size": 2, "step": 100}


def test_loading_weights_does_not_move_the_stream():
    stream = foreign()
    iterator = iter(stream)
    next(iterator)
    stream.update_step(0, 5000, on_load_weights=True)
    assert next(iterator)["step"] == 1


def test_validation_leaves_the_repeated_view_out_and_the_test_ends_with_it():
    assert eval_views("val", n_val_views=4).azimuth_deg.tolist() == [0.0, 90.0, 180.0, 270.0]
    assert eval_views("test", n_test_views=5).azimuth_deg.tolist() == [0, 90, 180, 270, 360]
    assert len(eval_views("test")) == 120 and len(eval_views("val")) == 1


@pytest.mark.parametrize("n_test_views", [1, 3])
def test_evaluation_views_are_those_of_the_orbit(n_test_views):
    views = eval_views("test", n_test_views=n_test_views, eval_camera_distance=3.0)
    for index in range(n_test_views):
        view = views[index]
        expected = camera_from_orbit(15.0, views.azimuth_deg[index], 3.0)
        assert torch.allclose(view["c2w"], expected, atol=1e-6)
        assert torch.equal(view["light_positions"], view["camera_positions"])
        assert view["rays_d"].shape == (4, 6, 3)
        assert (view["index"], view["height"], view["width"]) == (index, 4, 6)
    assert view["fovy"] == pytest.approx(1.2217305)
    with pytest.raises(IndexError, match=f"view {n_test_views} of {n_test_views}"):
        views[n_test_views]


def test_evaluation_collates_one_view_with_a_batch_axis():
    views = eval_views("val", n_val_views=3)
    batch = views.collate([views[2]])
    for key, tail in CONTRACT_KEYS.items():
        image = (4, 6) if key.startswith("rays") else ()
        assert batch[key].shape == (1, *image, *tail), key
    assert batch["index"].tolist() == [2]
    assert (batch["height"], batch["width"]) == (4, 6)


def test_defaults_are_the_contracts():
    cfg = {
        item.name: getattr(RandomCameraDataModuleConfig(), item.name)
        for item in fields(RandomCameraDataModuleConfig)
    }
    assert cfg == {
        "height": 64,
        "width": 64,
        "batch_size": 1,
        "resolution_milestones": [],
        "eval_height": 512,
        "eval_width": 512,
        "eval_batch_size": 1,
        "n_val_views": 1,
        "n_test_views": 120,
        "elevation_range": (-10, 90),
        "azimuth_range": (-180, 180),
        "camera_distance_range": (1, 1.5),
        "fovy_range": (40, 70),
        "camera_perturb": 0.1,
        "center_perturb": 0.2,
        "up_perturb": 0.02,
        "light_position_perturb": 1.0,
        "light_distance_range": (0.8, 1.5),
        "eval_elevation_deg": 15,
        "eval_camera_distance": 1.5,
        "eval_fovy_deg": 70,
        "light_sample_strategy": "dreamfusion",
        "batch_uniform_azimuth": True,
        "progressive_until": 0,
        "rays_d_normalize": True,
    }


def test_module_is_found_by_its_name_and_refuses_before_building():
    module_class = threestudio.find("random-camera-datamodule")
    assert module_class is RandomCameraDataModule
    with pytest.raises(TypeError, match="hieght.*Did you mean 'height'"):
        module_class({"hieght": 4})
    with pytest.raises(ValueError, match="data.n_val_views has the value 0"):
        module_class({"n_val_views": 0})


@pytest.mark.parametrize(
    "stage, present",
    [
        ("fit", {"train_dataset", "val_dataset"}),
        ("validate", {"val_dataset"}),
        ("test", {"test_dataset"}),
        ("predict", {"test_dataset"}),
        (None, {"train_dataset", "val_dataset", "test_dataset"}),
    ],
)
def test_each_stage_builds_its_datasets(stage, present):
    module = RandomCameraDataModule({"eval_height": 4, "eval_width": 4})
    module.setup(stage)
    names = {"train_dataset", "val_dataset", "test_dataset"}
    assert {name for name in names if hasattr(module, name)} == present


def test_evaluation_loaders_walk_all_views_one_by_one():
    module = RandomCameraDataModule(
        {"eval_height": 4, "eval_width": 4, "n_val_views": 2, "n_test_views": 3}
    )
    module.setup()
    for loader, n_views in (
        (module.val_dataloader(), 2),
        (module.test_dataloader(), 3),
        (module.predict_dataloader(), 3),
    ):
        assert [batch["index"].tolist() for batch in loader] == [[i] for i in range(n_views)]


class Recorder(pl.LightningModule):
    """Keeps what a real trainer hands over, and updates the dataset as a system does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.train_dataloader.dataset.do_update_step(0, self.global_step)

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, batch["step"], batch["height"], batch["c2w"].clone()))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, max_steps, resume=None, **trainer):
    module = RandomCameraDataModule(
        {"height": [4, 8], "width": [4, 8], "batch_size": 2, "resolution_milestones": [4]}
    )
    recorder = Recorder()
    runner = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        **trainer,
    )
    runner.fit(recorder, module, ckpt_path=resume, weights_only=True if resume else None)
    runner.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_sees_the_cameras_of_the_run_that_was_never_interrupted(tmp_path):
    whole = fit(tmp_path, 7)
    fit(tmp_path, 3)
    resumed = fit(tmp_path, 7, resume=tmp_path / "3.ckpt")
    assert [entry[:3] for entry in whole] == [(n, n, 4 if n < 4 else 8) for n in range(7)]
    assert [entry[:3] for entry in resumed] == [entry[:3] for entry in whole[3:]]
    for resumed_entry, whole_entry in zip(resumed, whole[3:], strict=True):
        assert torch.equal(resumed_entry[3], whole_entry[3])


@pytest.mark.filterwarnings("ignore")
def test_gradient_accumulation_keeps_the_step_of_the_optimizer(tmp_path):
    seen = fit(tmp_path, 3, accumulate_grad_batches=2)
    assert [(entry[0], entry[1]) for entry in seen] == [(n // 2, n // 2) for n in range(6)]
    assert not torch.equal(seen[0][3], seen[1][3])
