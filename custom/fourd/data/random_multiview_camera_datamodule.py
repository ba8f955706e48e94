"""Groups of views of one object (MVDream): `random-multiview-camera-datamodule`.

The views of a group share everything but the azimuth, stand evenly around the object, follow each
other in the batch, and never leave the process that drew them.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from threestudio.data.camera_config import plain_list, validate_count, validate_range
from threestudio.data.camera_sampling import (
    CameraSample,
    ItemSpan,
    draw_uniform,
    place_cameras,
    sample_elevation_deg,
)
from threestudio.data.uncond import RandomCameraDataModule

from ..ops.camera import relative_distance
from .single_view_camera_datamodule import (
    SingleViewCameraDataModuleConfig,
    SingleViewCameraDataset,
    SingleViewCameraIterableDataset,
    validate_single_view_config,
)


@dataclass
class RandomMultiviewCameraDataModuleConfig(SingleViewCameraDataModuleConfig):
    """Keys of `random-multiview-camera-datamodule`, beyond those of the single-view one."""

    relative_radius: bool = True
    """multiply the distance by 1 / tan(fovy / 2), so that it is the visible half height"""
    n_view: int = 1
    """views per object; batch_size counts images and must be a multiple"""
    zoom_range: tuple[float, float] = (1.0, 1.0)
    """factor on the field of view, applied after the distance is fixed"""


def validate_multiview_config(cfg: Any, where: str = "data") -> None:
    """Check every key of `random-multiview-camera-datamodule`.

    Raises:
        ValueError: naming the key, its value, what was expected and how to repair it.
    """
    validate_single_view_config(cfg, where)
    validate_count(cfg.n_view, f"{where}.n_view", 1)
    for batch_size in plain_list(cfg.batch_size):
        if batch_size % cfg.n_view:
            below = max(1, batch_size // cfg.n_view) * cfg.n_view
            raise ValueError(
                f"{where}.batch_size has the value {batch_size}, which {where}.n_view "
                f"{cfg.n_view} does not divide; batch_size counts images, write for example "
                f"{below}."
            )
    validate_range(cfg.zoom_range, f"{where}.zoom_range", 0, open_low=True)
    widest = cfg.fovy_range[1] * cfg.zoom_range[1]
    if widest >= 180.0:
        raise ValueError(
            f"{where}.zoom_range {list(cfg.zoom_range)} widens {where}.fovy_range "
            f"{list(cfg.fovy_range)} to {widest:g} degrees; expected less than 180."
        )


class RandomMultiviewCameraIterableDataset(SingleViewCameraIterableDataset):
    """Groups of ``n_view`` cameras around one object each; the item of a draw is the group."""

    def __init__(self, cfg: Any, where: str = "data") -> None:
        validate_multiview_config(cfg, where)
        super().__init__(cfg, where)
        self.zoom_range = tuple(cfg.zoom_range)

    def collate(self, batch: dict[str, int]) -> dict[str, Any]:
        """Return the view groups of a step; see `SingleViewCameraIterableDataset.collate`."""
        place = self._place(batch)
        self._set_step(place.step)
        span = self._span(place, self.batch_size // self.cfg.n_view)
        cameras = self.sample_cameras(span)
        flags = {
            "single_view": False,
            "is_video": False,
            "train_dynamic_camera": False,
            "images_per_group": self.cfg.n_view,
        }
        assembled = self._assemble(cameras, place.step, self.directions_unit_focal)
        return assembled | flags | self._times(place.step)

    def sample_cameras(self, span: ItemSpan) -> CameraSample:
        """Draw groups: view j of V at azimuth low + (u + j) / V * (high - low)."""
        n_view = self.cfg.n_view
        low, high = self.azimuth_range
        places = draw_uniform(span, "azimuth", 0.0, 1.0)[:, None] + torch.arange(n_view)
        azimuth_deg = (low + (high - low) * places / n_view).flatten()
        fovy_rad = torch.deg2rad(draw_uniform(span, "fovy", *self.fovy_range))
        distance = draw_uniform(span, "distance", *self.camera_distance_range)
        if self.cfg.relative_radius:
            distance = relative_distance(distance, fovy_rad)
        zoomed_fovy_rad = fovy_rad * draw_uniform(span, "zoom", *self.zoom_range)
        elevation_deg = sample_elevation_deg(span, self.elevation_range)
        return place_cameras(
            span,
            self.cfg,
            elevation_deg.repeat_interleave(n_view),
            azimuth_deg,
            distance.repeat_interleave(n_view),
            zoomed_fovy_rad.repeat_interleave(n_view),
        )


@threestudio.register("random-multiview-camera-datamodule")
class RandomMultiviewCameraDataModule(RandomCameraDataModule):
    """View groups for training, a turntable of single views for evaluation."""

    Config = RandomMultiviewCameraDataModuleConfig
    train_dataset_class = RandomMultiviewCameraIterableDataset
    eval_dataset_class = SingleViewCameraDataset

    def validate_config(self) -> None:
        """Raise ValueError where the configuration cannot work."""
        validate_multiview_config(self.cfg)
