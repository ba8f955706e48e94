"""A tiny system and data module, and an entry point for runs of it in other processes."""

import logging
import os
import sys
import time
from dataclasses import dataclass, field

import pytorch_lightning as pl
import threestudio
import torch
import torch.utils.tensorboard  # noqa: F401 - loaded by the server, once for all runs
from threestudio.launcher.trainer import run_stage
from threestudio.systems.base import BaseSystem
from threestudio.utils import rng
from threestudio.utils.base import BaseModule, Updateable
from threestudio.utils.config import load_config, parse_structured
from threestudio.utils.misc import get_rank
from torch.utils.data import DataLoader, IterableDataset


class StepDataset(IterableDataset, Updateable):
    """Batches that are a function of the step, as our own datasets are."""

    def __init__(self, start_step: int, foreign: bool) -> None:
        self.start_step = start_step
        self.foreign = foreign

    def __iter__(self):
        step = self.start_step
        while True:
            yield {"step": step}
            step += 1

    def collate(self, batch):
        if self.foreign:
            return {**batch, "x": torch.randn(8, 4)}
        return {**batch, "x": rng.randn_items((8, 4), "camera", batch["step"])}


@threestudio.register("tiny-datamodule")
class TinyDataModule(pl.LightningDataModule):
    @dataclass
    class Config:
        foreign: bool = False
        n_views: int = 2
        n_workers: int = 0

    def __init__(self, cfg=None):
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg or {})

    def train_dataloader(self):
        start = self.trainer.global_step if self.trainer is not None else 0
        dataset = StepDataset(start, self.cfg.foreign)
        return DataLoader(dataset, num_workers=self.cfg.n_workers, batch_size=None,
                          collate_fn=dataset.collate)

    def val_dataloader(self):
        return DataLoader([{"index": i} for i in range(self.cfg.n_views)], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader


@threestudio.register("tiny-net")
class TinyNet(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        width: int = 16
        noise: bool = False

    def configure(self):
        width = self.cfg.width
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, 1)
        )
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("ended", torch.zeros(()))
        self.step = -1

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.step = global_step

    def update_step_end(self, epoch, global_step):
        if self.training:
            self.ended += 0.5

    def forward(self, x):
        self.seen += int(self.training)
        return self.layers(x) * (1 + 0.01 * self.ended)


@threestudio.register("tiny-system")
class TinySystem(BaseSystem):
    strict_optimizer_groups = True

    @dataclass
    class Config(BaseSystem.Config):
        net: dict = field(default_factory=dict)
        nan_step: int = -1
        nan_in: str = "loss"
        sleep_sec: float = 0.0
        sleep_before_sec: float = 0.0

    def configure(self):
        if self.cfg.sleep_before_sec:
            print("building")
            time.sleep(self.cfg.sleep_before_sec)
        self.net = threestudio.find("tiny-net")(self.cfg.net)

    def training_step(self, batch, batch_idx):
        assert self.net.step == self.true_global_step == batch["step"]
        if self.cfg.sleep_sec:
            print(f"at step {self.true_global_step}.")
            time.sleep(self.cfg.sleep_sec)
        out = self.net(batch["x"])
        noise = torch.rand(()) if self.net.cfg.noise else 0.5
        error = out - batch["x"].sum(-1, keepdim=True)
        loss = error.square().mean() + noise * out.square().mean()
        self.log("train/loss_fit", loss)
        if self.true_global_step == self.cfg.nan_step:
            if self.cfg.nan_in == "loss":
                loss = loss * float("nan")
            else:
                loss.register_hook(lambda grad: grad * float("inf"))
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        if self.cfg.sleep_sec:
            time.sleep(self.cfg.sleep_sec)
        value = self.net(torch.ones(2, 4)).detach().mean().expand(4, 4)
        self.save_grayscale_image(f"it{self.true_global_step}-{batch['index']}.png", value, (-9, 9))

    def on_validation_epoch_end(self):
        pass

    def test_step(self, batch, batch_idx):
        self.save_rgb_image(
            f"it{self.true_global_step}-test/{batch['index']}.png", torch.rand(5, 7, 3)
        )

    def on_test_epoch_end(self):
        if get_rank() != 0:  # only rank 0 writes pictures; here they may not lie there yet
            return
        folder = f"it{self.true_global_step}-test"
        self.save_json(f"{folder}.json", {"views": len(os.listdir(self.get_save_path(folder)))})


def make_config(folder, overrides=()):
    text = f"""
    name: tiny
    tag: run
    use_timestamp: false
    exp_root_dir: {folder}
    data_type: tiny-datamodule
    system_type: tiny-system
    system:
      optimizer:
        name: Adam
        args: {{lr: 0.01, betas: [0.9, 0.99]}}
        params:
          net: {{lr: 0.02}}
      scheduler: {{name: ExponentialLR, interval: step, args: {{gamma: 0.99}}}}
    trainer:
      max_steps: 30
      log_every_n_steps: 1
      num_sanity_val_steps: 0
      val_check_interval: 7
      check_val_every_n_epoch: null
    """
    return load_config(text, cli_args=list(overrides), from_string=True)


def run_in_child(folder, mode, overrides, log, environment=()):
    """Entry point of a forked process: standard output and error go to the file ``log``."""
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    # The process writes through its own objects, which the fork copied from the server.
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", buffering=1)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1)
    logging.basicConfig(format="[%(levelname)s] %(message)s", stream=sys.stderr)
    logging.getLogger("pytorch_lightning").setLevel(logging.INFO)
    torch.set_num_threads(1)
    os.chdir(os.path.dirname(log))
    try:
        run_stage(make_config(folder, overrides), mode, ["--config", "none.yaml", *overrides])
    except (ValueError, OSError) as error:
        print(f"error: {error}")
        sys.exit(1)
    print("DONE")
