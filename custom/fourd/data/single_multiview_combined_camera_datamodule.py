"""View groups, images and clips in one run: `single-multiview-combined-camera-datamodule`.

Every step is of one kind, and all processes agree on it, since the kind selects the guidance
(4D-fy's hybrid score distillation).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import threestudio
from omegaconf import DictConfig
from threestudio.data.camera_config import validate_number
from threestudio.data.uncond import RandomCameraDataModule
from threestudio.utils.base import Updateable
from threestudio.utils.config import parse_structured
from torch.utils.data import IterableDataset

from .random_multiview_camera_datamodule import (
    RandomMultiviewCameraDataModuleConfig,
    RandomMultiviewCameraIterableDataset,
    validate_multiview_config,
)
from .single_view_camera_datamodule import (
    SingleViewCameraDataModuleConfig,
    SingleViewCameraDataset,
    SingleViewCameraIterableDataset,
    draw_guidance_choice,
    validate_single_view_config,
)


@dataclass
class SingleMultiviewCombinedCameraDataModuleConfig:
    """Keys of `single-multiview-combined-camera-datamodule`."""

    prob_multi_view: float | None = None
    """probability that a step renders view groups; null means never"""
    single_view: SingleViewCameraDataModuleConfig = field(
        default_factory=SingleViewCameraDataModuleConfig
    )
    """images and clips, and the views of validation and test"""
    multi_view: RandomMultiviewCameraDataModuleConfig = field(
        default_factory=RandomMultiviewCameraDataModuleConfig
    )
    """view groups"""


class RandomSingleMultiViewCameraIterableDataset(IterableDataset, Updateable):
    """A stream that takes each step from the single-view or the multi-view stream.

    Args:
        cfg_single_view: parsed `SingleViewCameraDataModuleConfig`.
        cfg_multi_view: parsed `RandomMultiviewCameraDataModuleConfig`.
        prob_multi_view: probability of a multi-view step; None is 0.
    """

    def __init__(
        self, cfg_single_view: Any, cfg_multi_view: Any, prob_multi_view: float | None = None
    ) -> None:
        super().__init__()
        # Updateable reaches both through these attributes.
        self.train_dataset_single = SingleViewCameraIterableDataset(
            cfg_single_view, "data.single_view"
        )
        self.train_dataset_multi = RandomMultiviewCameraIterableDataset(
            cfg_multi_view, "data.multi_view"
        )
        self.prob_multi_view = 0.0 if prob_multi_view is None else prob_multi_view

    def attach_trainer(self, trainer: pl.Trainer | None) -> None:
        """Take the place in the run from a trainer, if any."""
        self.train_dataset_single.attach_trainer(trainer)
        self.train_dataset_multi.attach_trainer(trainer)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Show the state of ``global_step`` in the attributes of both streams."""
        self.train_dataset_single.update_step(epoch, global_step, on_load_weights)
        self.train_dataset_multi.update_step(epoch, global_step, on_load_weights)

    def is_multi_view_step(self, step: int) -> bool:
        """Return whether ``step`` renders view groups; equal on every process."""
        return draw_guidance_choice(step)[0] < self.prob_multi_view

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield the places of the batches to come, without end."""
        return iter(self.train_dataset_single)

    def collate(self, batch: dict[str, int]) -> dict[str, Any]:
        """Return the cameras of a step; "single_view" and "is_video" say of which kind."""
        step = batch.get("step", self.train_dataset_single.shown_step)
        if self.is_multi_view_step(step):
            return self.train_dataset_multi.collate(batch)
        return self.train_dataset_single.collate(batch)


@threestudio.register("single-multiview-combined-camera-datamodule")
class SingleMultiviewCombinedCameraDataModule(RandomCameraDataModule):
    """View groups, images and clips for training; single views for evaluation.

    Args:
        cfg: the keys of `Config`.

    Raises:
        TypeError: for an unknown key, in the sub-configs too.
        ValueError: for a value that cannot work, before anything is built.
    """

    Config = SingleMultiviewCombinedCameraDataModuleConfig
    eval_dataset_class = SingleViewCameraDataset

    def __init__(self, cfg: dict | DictConfig | None = None) -> None:
        # The sub-configs arrive as plain mappings; each is parsed on its own, so that an unknown
        # key is reported there.
        cfg = {} if cfg is None else dict(cfg)
        self.cfg_single = parse_structured(
            SingleViewCameraDataModuleConfig, cfg.pop("single_view", None) or {}
        )
        self.cfg_multi = parse_structured(
            RandomMultiviewCameraDataModuleConfig, cfg.pop("multi_view", None) or {}
        )
        super().__init__({**cfg, "single_view": self.cfg_single, "multi_view": self.cfg_multi})

    def validate_config(self) -> None:
        """Raise ValueError where the configuration cannot work."""
        if self.cfg.prob_multi_view is not None:
            validate_number(self.cfg.prob_multi_view, "data.prob_multi_view", 0, 1)
        validate_single_view_config(self.cfg_single, "data.single_view")
        validate_multiview_config(self.cfg_multi, "data.multi_view")

    def build_train_dataset(self) -> IterableDataset:
        """Return the combined training stream."""
        return RandomSingleMultiViewCameraIterableDataset(
            self.cfg_single, self.cfg_multi, self.cfg.prob_multi_view
        )

    def build_eval_dataset(self, split: str) -> SingleViewCameraDataset:
        """Return the views of "val" or "test", which the single-view config describes."""
        return self.eval_dataset_class(self.cfg_single, split)
