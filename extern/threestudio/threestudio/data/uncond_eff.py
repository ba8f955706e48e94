"""Random cameras with a regular part of their rays: `eff-random-camera-datamodule`."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import threestudio
from threestudio.data.camera_config import validate_count
from threestudio.data.camera_sampling import CameraSample
from threestudio.data.uncond import (
    RandomCameraDataModule,
    RandomCameraDataModuleConfig,
    RandomCameraIterableDataset,
)
from threestudio.utils.rng import generator


@dataclass
class EffRandomCameraDataModuleConfig(RandomCameraDataModuleConfig):
    """Keys of `random-camera-datamodule`, and how many of an image's rays are made."""

    height: Any = 128
    """image height in pixels, or a list with one entry per resolution"""
    width: Any = 128
    """image width in pixels, or a list"""
    sample_height: int = 64
    """rows of rays per image; divides every height"""
    sample_width: int = 64
    """columns of rays per image; divides every width"""


class EffRandomCameraIterableDataset(RandomCameraIterableDataset):
    """The stream of `random-camera-datamodule`, with every n-th row and column of rays.

    Which of the n rows and columns it starts from changes with the step.
    """

    def _assemble(
        self, cameras: CameraSample, step: int, directions_unit_focal: Tensor
    ) -> dict[str, Any]:
        batch = super()._assemble(cameras, step, directions_unit_focal)
        rows = self._places(batch["height"], self.cfg.sample_height, step, "row")
        columns = self._places(batch["width"], self.cfg.sample_width, step, "column")
        for key in ("rays_o", "rays_d"):
            batch[key] = batch[key][:, rows][:, :, columns]
        return batch | {
            "efficiency_mask": rows[:, None] * batch["width"] + columns,
            "sample_height": self.cfg.sample_height,
            "sample_width": self.cfg.sample_width,
        }

    @staticmethod
    def _places(size: int, count: int, step: int, axis: str) -> Tensor:
        """Indices of the kept rows or columns; random: role "ray-<axis>" of the step, shared."""
        stride = size // count
        first = torch.randint(stride, (), generator=generator(f"ray-{axis}", step))
        return first + stride * torch.arange(count)


@threestudio.register("eff-random-camera-datamodule")
class EffRandomCameraDataModule(RandomCameraDataModule):
    """Random cameras with a part of their rays for training, a full turntable for evaluation.

    A training batch has ``rays_o`` and ``rays_d`` of shape [B, sample_height, sample_width, 3],
    ``height`` and ``width`` of the whole image, and ``efficiency_mask`` [sample_height,
    sample_width], the place of each ray in the whole image, row by row.

    Args:
        cfg: the keys of `Config`.

    Raises:
        ValueError: for a value that cannot work, before anything is built.
    """

    Config = EffRandomCameraDataModuleConfig
    train_dataset_class = EffRandomCameraIterableDataset

    def validate_config(self) -> None:
        """Raise ValueError where the configuration cannot work."""
        super().validate_config()
        for name in ("height", "width"):
            count = getattr(self.cfg, f"sample_{name}")
            validate_count(count, f"data.sample_{name}", 1)
            value = getattr(self.cfg, name)
            for size in [value] if isinstance(value, int) else value:
                if size % count:
                    raise ValueError(
                        f"data.sample_{name} is {count} and data.{name} {size}; expected a divisor "
                        "of it, since every n-th ray is kept."
                    )
