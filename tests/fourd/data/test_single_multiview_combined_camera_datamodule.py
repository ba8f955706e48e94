"""One run over view groups, images and clips."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.utils.rng import set_experiment_seed

from custom.fourd.data.single_multiview_combined_camera_datamodule import (
    SingleMultiviewCombinedCameraDataModule,
)

STAGE_THREE = {
    "prob_multi_view": 0.5,
    "single_view": {
        "batch_size": [1, 1],
        "width": [4, 8],
        "height": [4, 8],
        "resolution_milestones": [5],
        "camera_distance_range": [2.5, 3.0],
        "fovy_range": [15, 60],
        "elevation_range": [0, 30],
        "static": False,
        "num_frames": 16,
        "simultan": True,
        "prob_single_view_video": 0.5,
        "width_vid": 9,
        "height_vid": 5,
        "sample_rand_frames": "t0",
        "num_frames_factor": 4,
        "eval_height": 4,
        "eval_width": 4,
        "test_traj": "motion_smooth",
    },
    "multi_view": {
        "batch_size": [4, 4],
        "n_view": 4,
        "width": [4, 8],
        "height": [4, 8],
        "resolution_milestones": [5],
        "relative_radius": False,
        "num_frames": "${single_view.num_frames}",
        "sample_rand_frames": "${single_view.sample_rand_frames}",
        "n_val_views": 4,
    },
}


@pytest.fixture(autouse=True)
def fixed_seed():
    set_experiment_seed(0)


def module(**values):
    built = SingleMultiviewCombinedCameraDataModule(OmegaConf.create({**STAGE_THREE, **values}))
    built.setup()
    return built


def kind(batch):
    return "multi" if not batch["single_view"] else "video" if batch["is_video"] else "image"


def test_each_step_is_of_one_kind_and_has_its_shape():
    dataset = module().train_dataset
    shapes = {}
    for step in range(30):
        batch = dataset.collate({"step": step})
        size = 4 if step < 5 else 8
        expected = {"multi": (4, size, size, 3), "image": (1, size, size, 3), "video": (1, 5, 9, 3)}
        shapes[kind(batch)] = batch["rays_d"].shape
        assert batch["rays_d"].shape == expected[kind(batch)]
        assert batch["step"] == step and batch["frame_times"].shape == (16,)
    assert set(shapes) == {"multi", "image", "video"}


def test_kinds_come_in_the_proportions_of_the_third_stage():
    dataset = module().train_dataset
    counts = {"multi": 0, "video": 0, "image": 0}
    for step in range(2000):
        if dataset.is_multi_view_step(step):
            counts["multi"] += 1
        elif dataset.train_dataset_single.is_video_step(step):
            counts["video"] += 1
        else:
            counts["image"] += 1
    # Half, a quarter, a quarter, within three standard deviations of 2000 draws.
    assert abs(counts["multi"] / 2000 - 0.50) < 0.034
    assert abs(counts["video"] / 2000 - 0.25) < 0.030
    assert abs(counts["image"] / 2000 - 0.25) < 0.030


@pytest.mark.parametrize("probability, expected", [(1.0, True), (0.0, False), (None, False)])
def test_certain_probabilities_are_certain(probability, expected):
    dataset = module(prob_multi_view=probability).train_dataset
    assert all(dataset.is_multi_view_step(step) is expected for step in range(200))


def test_every_rank_draws_the_same_kind():
    first, second = module().train_dataset, module().train_dataset
    for part in (second.train_dataset_single, second.train_dataset_multi):
        part.rank, part.world_size = 1, 2
    different = 0
    for step in range(20):
        one, other = first.collate({"step": step}), second.collate({"step": step})
        assert kind(one) == kind(other)
        assert torch.equal(one["frame_times"], other["frame_times"])
        different += not torch.equal(one["c2w"], other["c2w"])
    assert different == 20


def test_both_streams_take_their_place_from_the_trainer():
    dataset = module().train_dataset
    dataset.attach_trainer(
        SimpleNamespace(global_step=7, accumulate_grad_batches=1, global_rank=1, world_size=3)
    )
    for part in (dataset.train_dataset_single, dataset.train_dataset_multi):
        assert (part.start_step, part.rank, part.world_size) == (7, 1, 3)
    assert next(iter(dataset))["step"] == 7


def test_iterating_and_collating_by_step_agree_and_updates_do_not_matter():
    dataset, fresh = module().train_dataset, module().train_dataset
    for step, place in zip(range(8), dataset, strict=False):
        batch = dataset.collate(place)
        expected = fresh.collate({"step": step})
        assert torch.equal(batch["rays_d"], expected["rays_d"])
        dataset.do_update_step(0, max(0, step - 1))
    dataset.update_step(0, 5)
    assert dataset.train_dataset_single.height == dataset.train_dataset_multi.height == 8


def test_a_step_is_shown_to_callers_that_give_none():
    dataset = module().train_dataset
    dataset.update_step(0, 6)
    assert dataset.collate({})["step"] == 6


def test_evaluation_follows_the_single_view_configuration():
    built = module()
    assert len(built.val_dataset) == 1
    assert len(built.test_dataset) == 124
    batch = next(iter(built.test_dataloader()))
    assert batch["rays_d"].shape == (1, 4, 4, 3) and batch["frame_times"].shape == (1,)


def test_defaults_need_no_sub_configuration():
    built = SingleMultiviewCombinedCameraDataModule({"single_view": None})
    assert built.cfg.prob_multi_view is None and built.cfg.multi_view.n_view == 1
    assert SingleMultiviewCombinedCameraDataModule().cfg_single.num_frames == 1


@pytest.mark.parametrize(
    "values, error, sentence",
    [
        ({"prob_multi_view": 1.2}, ValueError, r"data\.prob_multi_view has the value 1\.2"),
        ({"prob_multi": 0.5}, TypeError, "prob_multi.*Did you mean 'prob_multi_view'"),
        ({"multi_view": {"nview": 4}}, TypeError, "nview.*Did you mean 'n_view'"),
        (
            {"multi_view": {"n_view": 4, "batch_size": 3}},
            ValueError,
            r"data\.multi_view\.batch_size has the value 3, which data\.multi_view\.n_view 4",
        ),
        (
            {"single_view": {"fovy_range": [60, 15]}},
            ValueError,
            r"data\.single_view\.fovy_range is \[60, 15\], which is reversed",
        ),
    ],
)
def test_wrong_values_are_named_with_their_path(values, error, sentence):
    with pytest.raises(error, match=sentence):
        SingleMultiviewCombinedCameraDataModule(OmegaConf.create(values))


def test_module_is_found_under_its_names():
    for name in (
        "single-multiview-combined-camera-datamodule",
        "4dfy-single-multiview-combined-camera-datamodule",
    ):
        assert threestudio.find(name) is SingleMultiviewCombinedCameraDataModule


class Recorder(pl.LightningModule):
    """Keeps the kinds and poses that a real trainer hands over."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def on_train_batch_start(self, batch, batch_idx):
        self.trainer.train_dataloader.dataset.do_update_step(0, self.global_step)

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["step"], kind(batch), batch["height"], float(batch["c2w"].sum())))
        return self.weight * 1.0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(tmp_path, max_steps, resume=None):
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
    )
    data = SingleMultiviewCombinedCameraDataModule(OmegaConf.create(STAGE_THREE))
    runner.fit(recorder, data, ckpt_path=resume, weights_only=True if resume else None)
    runner.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
    return recorder.seen


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_continues_with_the_same_kinds_and_cameras(tmp_path):
    whole = fit(tmp_path, 8)
    fit(tmp_path, 4)
    assert [entry[0] for entry in whole] == list(range(8))
    assert fit(tmp_path, 8, resume=tmp_path / "4.ckpt") == whole[4:]


TWO_PROCESSES = """
import sys, torch, pytorch_lightning as pl, custom.fourd, threestudio
from omegaconf import OmegaConf

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []
    def training_step(self, batch, batch_idx):
        self.seen.append((batch["step"], batch["single_view"], batch["c2w"]))
        return self.weight * 1.0
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

cls = threestudio.find("single-multiview-combined-camera-datamodule")
data = cls(OmegaConf.load(sys.argv[1] + "/data.yaml"))
runner = pl.Trainer(max_steps=6, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    limit_val_batches=0, default_root_dir=sys.argv[1])
recorder = Recorder()
runner.fit(recorder, data)
torch.save(recorder.seen, f"{sys.argv[1]}/{runner.global_rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_a_step_as_one_process_would(tmp_path):
    values = {"width": 4, "height": 4, "batch_size": 4}
    single, multi = {**values, "batch_size": 1}, {**values, "n_view": 4}
    local = {"prob_multi_view": 0.5, "single_view": single, "multi_view": multi}
    OmegaConf.save(OmegaConf.create(local), tmp_path / "data.yaml")
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    root = Path(__file__).parents[3]
    subprocess.run(command, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    joint = SingleMultiviewCombinedCameraDataModule(
        {
            "prob_multi_view": 0.5,
            "single_view": {**single, "batch_size": 2},
            "multi_view": {**multi, "batch_size": 8},
        }
    )
    joint.setup("fit")
    for step in range(6):
        expected = joint.train_dataset.collate({"step": step})
        assert [rank[step][:2] for rank in ranks] == [(step, expected["single_view"])] * 2
        assert torch.equal(torch.cat([rank[step][2] for rank in ranks]), expected["c2w"])
