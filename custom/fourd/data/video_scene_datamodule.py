"""What all data modules of videos share: keys, training rays, and held-out frames to compare with.

A reader derives from `VideoSceneDataModule` and says how its files become a `VideoScene`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import threestudio
import torch
from omegaconf import DictConfig, OmegaConf
from threestudio.data.camera_config import validate_count, validate_number
from threestudio.utils.config import parse_structured
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .batch_places import BatchPlaces
from .ray_batches import RaySampler, SamplingOptions, frame_batch
from .video_frames import FrameSource, parse_frame_list, read_frames
from .video_scene import VideoScene

SPACES = ("world", "ndc")


@dataclass
class VideoSceneDataModuleConfig:
    """Keys that every data module of videos has."""

    dataroot: str = ""
    """folder (or file, where the module says so) that holds the data"""
    downsample: float = 1.0
    """frames are read at int(size / downsample) pixels, by Lanczos' filter"""
    frame_list: Any = None
    """which frames: null for all, a number for the first so many, a list, or the text of one:
    "[0, 5, 9]", "180:230" or "range(180, 230)"; read literally"""
    parity: bool = False
    """train on the held-out frames as well, as the release did: metrics then leak"""
    batch_size: int = 4096
    """rays per batch and process"""
    patch_size: int = 1
    """side in pixels of the squares that rays are drawn in; above 1 for perceptual losses"""
    samples_per_axis: int = 1
    """rays per axis of a pixel in training, whose mean is compared with it: real pixels are means
    over their area. batch_size counts rays, so 2 looks at a quarter of the pixels"""
    motion_share: float = 0.1
    """share of the rays drawn from pixels that move, in [0, 1]"""
    motion_until: int | None = None
    """step from which on all pixels are drawn alike; null: never"""
    one_time_per_batch: bool = False
    """draw all rays of a step at one scene time"""
    n_val_views: int = 4
    """held-out frames that validation renders, spread evenly over them; the test renders all"""


class VideoRayDataset(BatchPlaces):
    """An endless stream of ray batches, one per step, from the trainer's step on."""

    def __init__(self, sampler: RaySampler) -> None:
        super().__init__()
        self.sampler = sampler

    def collate(self, place: dict[str, int]) -> dict[str, Any]:
        """Return the rays of a place; see `RaySampler.batch`."""
        return self.sampler.batch(place["step"], self.shard(place))


class VideoFrameDataset(Dataset):
    """Whole frames of a scene, one at a time; see `frame_batch`.

    Args:
        scene: frames and cameras.
        rows: which frames, in order.
        ndc: whether rays are in normalised device coordinates.
    """

    def __init__(self, scene: VideoScene, rows: Tensor, ndc: bool = False) -> None:
        self.scene, self.rows, self.ndc = scene, rows, ndc
        self.n_views = len(rows)

    def __len__(self) -> int:
        return self.n_views

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one frame as a batch of one; "index" is its place in this dataset."""
        if not 0 <= index < self.n_views:
            raise IndexError(f"view {index} of {self.n_views}; expected 0 to {self.n_views - 1}.")
        row = int(self.rows[index])
        place = {"index": torch.tensor([index]), "rows": torch.tensor([row])}
        return frame_batch(self.scene, row, self.ndc) | place


class VideoSceneDataModule(pl.LightningDataModule):
    """Training rays and held-out frames of a scene in files.

    Construction checks the keys and everything that costs little: that files are there, rows fit
    and poses are rigid. Frames are decoded, and checked, when `scene` is first asked for.

    Args:
        cfg: the keys of `Config`.

    Raises:
        TypeError: for an unknown key.
        ValueError: for a value or a file that cannot work, naming it.
    """

    Config = VideoSceneDataModuleConfig

    def __init__(self, cfg: dict | DictConfig | None = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)
        self.validate_config()
        self.inspect()

    def validate_config(self) -> None:
        """Raise ValueError where a key has a value that cannot work."""
        cfg = self.cfg
        if not cfg.dataroot:
            raise ValueError("data.dataroot is empty; expected the path of the data.")
        if not self.root.exists():
            raise ValueError(f"data.dataroot is {cfg.dataroot!r}, which does not exist.")
        validate_number(cfg.downsample, "data.downsample", 1)
        validate_number(cfg.motion_share, "data.motion_share", 0, 1)
        for key in ("batch_size", "patch_size", "samples_per_axis", "n_val_views"):
            validate_count(getattr(cfg, key), f"data.{key}", 1)
        if cfg.motion_until is not None:
            validate_count(cfg.motion_until, "data.motion_until", 0)

    def inspect(self) -> None:
        """Check the files as far as that costs little; readers override it."""

    def read_scene(self) -> VideoScene:
        """Read everything; readers override it."""
        raise NotImplementedError(f"{type(self).__name__} has no reader.")

    @property
    def root(self) -> Path:
        """The data's folder or file."""
        return Path(self.cfg.dataroot).expanduser()

    @property
    def ndc(self) -> bool:
        """Whether rays are in normalised device coordinates."""
        return False

    @cached_property
    def scene(self) -> VideoScene:
        """The frames and cameras, read once."""
        scene = self.read_scene()
        threestudio.info(
            "%s: %d cameras x %d times of %d x %d pixels, %d frames held out",
            self.root.name, len(scene.cameras()), len(scene.times()), scene.width, scene.height,
            int(scene.held_out.sum()),
        )  # fmt: skip
        if self.cfg.parity and bool(scene.held_out.any()):
            threestudio.warn(
                "data.parity trains on the held-out frames; metrics on them are no test."
            )
        return scene

    def setup(self, stage: str | None = None) -> None:
        """Build the datasets of a stage: "fit", "validate", "test", "predict", or None for all."""
        if stage in (None, "fit"):
            self.train_dataset = VideoRayDataset(RaySampler(self.scene, self.sampling_options()))
        rows = self.scene.eval_rows()
        if stage in (None, "fit", "validate"):
            n_views = min(self.cfg.n_val_views, len(rows))
            spread = torch.linspace(0, len(rows) - 1, n_views).round().long()
            self.val_dataset = VideoFrameDataset(self.scene, rows[spread], self.ndc)
        if stage in (None, "test", "predict"):
            self.test_dataset = VideoFrameDataset(self.scene, rows, self.ndc)

    def sampling_options(self) -> SamplingOptions:
        """Return how training rays are drawn, from the keys."""
        cfg = self.cfg
        return SamplingOptions(
            n_rays=cfg.batch_size,
            patch_size=cfg.patch_size,
            motion_share=cfg.motion_share,
            motion_until=cfg.motion_until,
            one_time_per_batch=cfg.one_time_per_batch,
            ndc=self.ndc,
            samples_per_axis=cfg.samples_per_axis,
        )

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, which continues at the trainer's step."""
        self.train_dataset.attach_trainer(self.trainer)
        collate = self.train_dataset.collate
        return DataLoader(self.train_dataset, num_workers=0, batch_size=None, collate_fn=collate)

    def val_dataloader(self) -> DataLoader:
        """Return the loader of some held-out frames, one at a time."""
        return DataLoader(self.val_dataset, num_workers=0, batch_size=None)

    def test_dataloader(self) -> DataLoader:
        """Return the loader of all held-out frames, one at a time."""
        return DataLoader(self.test_dataset, num_workers=0, batch_size=None)

    def predict_dataloader(self) -> DataLoader:
        """Return the loader that export walks over, which is that of the test."""
        return self.test_dataloader()


def plain(value: Any) -> Any:
    """Return a config value without OmegaConf's containers."""
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def choose_cameras(choice: Any, names: list[str], key: str) -> set[int]:
    """Return the positions of cameras that are given by position or by name.

    Raises:
        ValueError: a camera is not there.
    """
    choice = plain(choice)
    if choice is None:
        return set()
    found = set()
    for item in choice if isinstance(choice, (list, tuple)) else [choice]:
        if isinstance(item, str) and item in names:
            found.add(names.index(item))
        elif isinstance(item, int) and not isinstance(item, bool) and 0 <= item < len(names):
            found.add(item)
        else:
            raise ValueError(
                f"{key} names camera {item!r}; expected a position from 0 to {len(names) - 1} or "
                f"one of {', '.join(names)}."
            )
    return found


def choose_frames(sources: list[FrameSource], frame_list: Any, key: str) -> list[int]:
    """Return the frames to read of synchronised cameras, which must all have as many.

    Raises:
        ValueError: the cameras have different numbers of frames, or see `parse_frame_list`.
    """
    first = sources[0]
    for source in sources:
        if source.n_frames != first.n_frames:
            raise ValueError(
                f"{source.path} has {source.n_frames} frames and {first.path} {first.n_frames}; "
                "expected as many in all cameras. Is a video cut?"
            )
    return parse_frame_list(plain(frame_list), first.n_frames, key)


def stack_cameras(
    sources: list[FrameSource], chosen: list[int], height: int, width: int
) -> dict[str, Any]:
    """Read synchronised cameras: the frames of a `VideoScene`, camera after camera, with their ids.

    Raises:
        ValueError: a camera's frames cannot be read, or have another size than the first camera's.
    """
    n_cameras, n_times = len(sources), len(chosen)
    size = sources[0].first_size()
    frames = torch.empty((n_cameras, n_times, height, width, 3), dtype=torch.uint8)
    for camera, source in enumerate(sources):
        if source.first_size() != size:
            height_px, width_px = source.first_size()
            raise ValueError(
                f"{source.path} has frames of {width_px} x {height_px} pixels and "
                f"{sources[0].path} of {size[1]} x {size[0]}; expected one size."
            )
        frames[camera] = read_frames(source, chosen, height, width)
        threestudio.debug("read %s", source.path)
    times = torch.arange(n_times)
    return {
        "frames": frames.flatten(0, 1),
        "camera_ids": torch.arange(n_cameras).repeat_interleave(n_times),
        "time_ids": times.repeat(n_cameras),
        "frame_times": (times / max(1, n_times - 1)).repeat(n_cameras),
        "names": [source.frame_name(index) for source in sources for index in chosen],
    }
