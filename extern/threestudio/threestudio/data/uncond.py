"""Random cameras around the origin: `random-camera-datamodule`.

A training batch is a pure function of (seed, step, place of this process among its peers), so
neither prefetching nor resuming nor the number of processes changes a camera. `batch_size` counts
what one process samples in one batch.
"""

import bisect
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import threestudio
from threestudio.data.camera_config import expand_schedule, plain_list, validate_camera_config
from threestudio.data.camera_sampling import (
    CameraSample,
    ItemSpan,
    camera_batch,
    draw_uniform,
    place_cameras,
    sample_azimuth_deg,
    sample_elevation_deg,
)
from threestudio.utils.base import Updateable
from threestudio.utils.camera import orbit_position
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import get_rank
from threestudio.utils.ops import get_ray_directions


@dataclass
class RandomCameraDataModuleConfig:
    """Keys of `random-camera-datamodule`; ranges are [lower, upper] and drawn from uniformly."""

    height: Any = 64
    """image height in pixels, or a list with one entry per resolution"""
    width: Any = 64
    """image width in pixels, or a list"""
    batch_size: Any = 1
    """images per batch and process, or a list"""
    resolution_milestones: list[int] = field(default_factory=list)
    """steps at which the second, third, ... resolution begins"""
    eval_height: int = 512
    """image height of validation and test, in pixels"""
    eval_width: int = 512
    """image width of validation and test, in pixels"""
    eval_batch_size: int = 1
    """accepted for upstream's configs; evaluation renders one view at a time"""
    n_val_views: int = 1
    """validation views, equally spaced over a full turn"""
    n_test_views: int = 120
    """test views over a full turn, whose last equals its first"""
    elevation_range: tuple[float, float] = (-10, 90)
    """degrees"""
    azimuth_range: tuple[float, float] = (-180, 180)
    """degrees"""
    camera_distance_range: tuple[float, float] = (1, 1.5)
    """world units"""
    fovy_range: tuple[float, float] = (40, 70)
    """vertical field of view, degrees"""
    camera_perturb: float = 0.1
    """half width of the uniform shift of the position, per axis, world units"""
    center_perturb: float = 0.2
    """standard deviation of the point looked at, world units"""
    up_perturb: float = 0.02
    """standard deviation of the up vector"""
    light_position_perturb: float = 1.0
    """standard deviation of the light's direction ("dreamfusion")"""
    light_distance_range: tuple[float, float] = (0.8, 1.5)
    """world units from the origin"""
    eval_elevation_deg: float = 15.0
    """elevation of validation and test, degrees"""
    eval_camera_distance: float = 1.5
    """camera distance of validation and test, world units"""
    eval_fovy_deg: float = 70.0
    """vertical field of view of validation and test, degrees"""
    light_sample_strategy: str = "dreamfusion"
    """"dreamfusion" or "magic3d", see `camera_sampling.sample_light`"""
    batch_uniform_azimuth: bool = True
    """spread the azimuths of one step evenly over the range"""
    progressive_until: int = 0
    """steps over which elevations and azimuths widen from the front view; 0 starts wide"""
    rays_d_normalize: bool = True
    """unit ray directions; otherwise their z in the camera is -1"""


class _Place(NamedTuple):
    """Where one batch stands in its training step."""

    step: int
    shard: int
    """index of the batch among the ``n_shards`` that make the step"""
    n_shards: int


class RandomCameraIterableDataset(IterableDataset, Updateable):
    """An endless stream of camera batches, one per step.

    Iterating yields ``{"step": n}`` and `collate` turns that into the batch. Attributes that
    upstream's extensions read (``height``, ``batch_size``, ``elevation_range``, ...) show the
    state of the step that is being collated, then of the step last given to `update_step`.

    Args:
        cfg: parsed `RandomCameraDataModuleConfig`, or one that extends it.
        where: path of ``cfg`` in the user's file, for error messages.
    """

    def __init__(self, cfg: Any, where: str = "data") -> None:
        super().__init__()
        validate_camera_config(cfg, where)
        self.cfg = cfg
        self.heights, self.widths, self.batch_sizes = expand_schedule(cfg, where)
        milestones = plain_list(cfg.resolution_milestones)
        if milestones and len(self.heights) == 1:
            threestudio.warn(
                "%s.resolution_milestones is %s but there is one resolution; it has no effect.",
                where,
                milestones,
            )
            milestones = []
        self.resolution_milestones = [-1, *milestones]
        self.directions_unit_focals = [
            get_ray_directions(height, width, 1.0)
            for height, width in zip(self.heights, self.widths, strict=True)
        ]
        self.camera_distance_range = tuple(cfg.camera_distance_range)
        self.fovy_range = tuple(cfg.fovy_range)
        self.start_step = 0
        self.batches_per_step = 1
        self.rank = get_rank()
        self.world_size = max(_world_size(), self.rank + 1)
        self._last_update = -1
        self.shown_step = -1
        self._set_step(0)

    def attach_trainer(self, trainer: pl.Trainer | None) -> None:
        """Take the place in the run (first step, rank, accumulation) from a trainer, if any."""
        if trainer is None:
            return
        self.start_step = int(trainer.global_step)
        self.batches_per_step = int(trainer.accumulate_grad_batches)
        self.rank, self.world_size = int(trainer.global_rank), int(trainer.world_size)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Show the state of ``global_step`` in the attributes; `collate` does not depend on it."""
        if not on_load_weights:
            self._last_update = global_step
        self._set_step(global_step)

    def progressive_view(self, global_step: int) -> None:
        """Set the ranges of elevation and azimuth, widening from the evaluation's front view.

        The fraction is min(1, step / (progressive_until + 1)), and 1 where the key is 0.
        """
        until = self.cfg.progressive_until
        fraction = 1.0 if until == 0 else min(1.0, global_step / (until + 1))
        front = self.cfg.eval_elevation_deg
        self.elevation_range = tuple(
            (1.0 - fraction) * front + fraction * bound for bound in self.cfg.elevation_range
        )
        self.azimuth_range = tuple(fraction * bound for bound in self.cfg.azimuth_range)

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield the places of the batches to come, from ``start_step`` on, without end."""
        step, self._last_update = self.start_step, -1
        while True:
            # Data modules that are not ours set no start step when they resume; the trainer's
            # step, which update_step brings, then moves the stream forward. Ours is never behind.
            step = max(step, self._last_update)
            for batch_in_step in range(self.batches_per_step):
                self._set_step(step)
                yield {"step": step, "batch_in_step": batch_in_step}
            step += 1

    def collate(self, batch: dict[str, int]) -> dict[str, Any]:
        """Return the cameras of a step.

        Args:
            batch: what iterating yields; without "step", the step last shown is taken.

        Returns:
            The contract's keys (rays_o, rays_d [B,H,W,3]; mvp_mtx, proj_mtx, c2w [B,4,4];
            camera_positions, light_positions [B,3]; elevation, azimuth in degrees,
            camera_distances, fovy in radians [B]; height, width) and "step".
        """
        place = self._place(batch)
        self._set_step(place.step)
        cameras = self.sample_cameras(self._span(place, self.batch_size))
        return self._assemble(cameras, place.step, self.directions_unit_focal)

    def sample_cameras(self, span: ItemSpan) -> CameraSample:
        """Draw the cameras of ``span`` from the ranges that the attributes show."""
        elevation_deg = sample_elevation_deg(span, self.elevation_range)
        azimuth_deg = sample_azimuth_deg(
            span, self.azimuth_range, stratified=self.cfg.batch_uniform_azimuth
        )
        distance = draw_uniform(span, "distance", *self.camera_distance_range)
        fovy_rad = torch.deg2rad(draw_uniform(span, "fovy", *self.fovy_range))
        return place_cameras(span, self.cfg, elevation_deg, azimuth_deg, distance, fovy_rad)

    def _assemble(
        self, cameras: CameraSample, step: int, directions_unit_focal: Tensor
    ) -> dict[str, Any]:
        height, width = directions_unit_focal.shape[:2]
        normalize = self.cfg.rays_d_normalize
        batch = camera_batch(cameras, height, width, normalize, directions_unit_focal)
        return batch | {"step": step}

    def _set_step(self, step: int) -> None:
        if step == self.shown_step:
            return  # a step is announced several times
        index = bisect.bisect_right(self.resolution_milestones, step) - 1
        self.height, self.width = self.heights[index], self.widths[index]
        self.batch_size = self.batch_sizes[index]
        self.directions_unit_focal = self.directions_unit_focals[index]
        self.shown_step = step
        self.progressive_view(step)

    def _place(self, batch: dict[str, int]) -> _Place:
        shard = batch.get("batch_in_step", 0) * self.world_size + self.rank
        return _Place(
            batch.get("step", self.shown_step), shard, self.batches_per_step * self.world_size
        )

    def _span(self, place: _Place, n_items: int) -> ItemSpan:
        return ItemSpan(
            place.step, first=place.shard * n_items, count=n_items, total=place.n_shards * n_items
        )


class RandomCameraDataset(Dataset):
    """The views of validation ("val") or test ("test"): one turn at the evaluation's elevation.

    Rays are made when a view is asked for; 120 views of 512 x 512 would take 750 MB.

    Args:
        cfg: parsed `RandomCameraDataModuleConfig`, or one that extends it.
        split: "val" leaves the repeated first view out, anything else ends with it.
    """

    def __init__(self, cfg: Any, split: str) -> None:
        super().__init__()
        validate_camera_config(cfg)
        self.cfg = cfg
        self.split = split
        self.azimuth_deg = self.view_azimuths_deg()
        self.n_views = len(self.azimuth_deg)
        self.elevation_deg = torch.full_like(self.azimuth_deg, cfg.eval_elevation_deg)
        self.camera_distances = torch.full_like(self.azimuth_deg, cfg.eval_camera_distance)
        self.fovy = torch.deg2rad(torch.full_like(self.azimuth_deg, cfg.eval_fovy_deg))
        self._directions = get_ray_directions(cfg.eval_height, cfg.eval_width, 1.0)

    def view_azimuths_deg(self) -> Tensor:
        """Return the azimuth of each view in degrees."""
        if self.split == "val":
            return torch.linspace(0.0, 360.0, self.cfg.n_val_views + 1)[:-1]
        return torch.linspace(0.0, 360.0, self.cfg.n_test_views)

    def __len__(self) -> int:
        return self.n_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one view: the contract's keys without a batch axis, and "index"."""
        if not 0 <= index < self.n_views:
            raise IndexError(f"view {index} of {self.n_views}; expected 0 to {self.n_views - 1}.")
        one = slice(index, index + 1)
        position = orbit_position(
            self.elevation_deg[one], self.azimuth_deg[one], self.camera_distances[one]
        )
        cameras = CameraSample(
            self.elevation_deg[one],
            self.azimuth_deg[one],
            self.camera_distances[one],
            self.fovy[one],
            position=position,
            center=torch.zeros_like(position),
            up=position.new_tensor([[0.0, 0.0, 1.0]]),
            light_position=position,
        )
        batch = camera_batch(
            cameras,
            self.cfg.eval_height,
            self.cfg.eval_width,
            self.cfg.rays_d_normalize,
            self._directions,
        )
        view = {
            key: value[0] if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        return {"index": index, **view}

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Any]:
        """Stack views along a new first axis; height and width stay integers."""
        return default_collate(batch) | {
            "height": self.cfg.eval_height,
            "width": self.cfg.eval_width,
        }


@threestudio.register("random-camera-datamodule")
class RandomCameraDataModule(pl.LightningDataModule):
    """Random cameras for training, a turntable for evaluation.

    Args:
        cfg: the keys of `Config`.

    Raises:
        TypeError: for an unknown key.
        ValueError: for a value that cannot work, before anything is built.
    """

    Config = RandomCameraDataModuleConfig
    train_dataset_class = RandomCameraIterableDataset
    eval_dataset_class = RandomCameraDataset

    def __init__(self, cfg: dict | DictConfig | None = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)
        self.validate_config()

    def validate_config(self) -> None:
        """Raise ValueError where the configuration cannot work."""
        validate_camera_config(self.cfg)

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets of a stage: "fit", "validate", "test", "predict", or None for all."""
        if stage in (None, "fit"):
            self.train_dataset = self.build_train_dataset()
        if stage in (None, "fit", "validate"):
            self.val_dataset = self.build_eval_dataset("val")
        if stage in (None, "test", "predict"):
            self.test_dataset = self.build_eval_dataset("test")

    def build_train_dataset(self) -> IterableDataset:
        """Return the training stream."""
        return self.train_dataset_class(self.cfg)

    def build_eval_dataset(self, split: str) -> Dataset:
        """Return the views of "val" or "test"."""
        return self.eval_dataset_class(self.cfg, split)

    def general_loader(
        self, dataset: Any, batch_size: int | None, collate_fn: Any = None
    ) -> DataLoader:
        """Return a loader in this process, which costs nothing since nothing is read."""
        return DataLoader(dataset, num_workers=0, batch_size=batch_size, collate_fn=collate_fn)

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, which continues at the trainer's step."""
        self.train_dataset.attach_trainer(self.trainer)
        return self.general_loader(
            self.train_dataset, batch_size=None, collate_fn=self.train_dataset.collate
        )

    def val_dataloader(self) -> DataLoader:
        """Return the loader of the validation views, one at a time."""
        return self.general_loader(self.val_dataset, 1, self.val_dataset.collate)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of the test views, one at a time."""
        return self.general_loader(self.test_dataset, 1, self.test_dataset.collate)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader that export walks over, which is that of the test."""
        return self.general_loader(self.test_dataset, 1, self.test_dataset.collate)


def _world_size() -> int:
    """Return the number of processes, from the process group or the launcher's environment."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))
