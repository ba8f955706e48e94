"""One video as a scene seen from one side, by a known or a standing camera."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import threestudio
import torch
from jaxtyping import Float
from threestudio.data.camera_config import validate_count, validate_number
from torch import Tensor

from ..ops.camera import camera_from_orbit, intrinsics_from_fovy
from .transforms_file import (
    distance_bounds,
    frame_intrinsics,
    frame_pose,
    frame_time,
    read_json,
)
from .video_frames import FrameSource, downsampled_size, parse_frame_list, read_frames
from .video_scene import VideoScene
from .video_scene_datamodule import VideoSceneDataModule, VideoSceneDataModuleConfig, plain


@dataclass
class VideoFileDataModuleConfig(VideoSceneDataModuleConfig):
    """Keys of `video-file-datamodule`; `dataroot` is a video, or a folder of pictures."""

    cameras: str | None = None
    """JSON like `transforms.json` with one pose, or one for each frame of the video; null: the
    file of the video's name beside it, and without one a standing camera"""
    fovy_deg: float = 40.0
    """vertical field of view of the standing camera, degrees"""
    elevation_deg: float = 0.0
    """height of the standing camera over the horizon, degrees"""
    azimuth_deg: float = 0.0
    """direction of the standing camera, degrees"""
    camera_distance: float = 3.0
    """distance of the standing camera from the origin, world units"""
    hold_out_every: int = 0
    """hold every so many-th frame out for validation; 0 holds none out"""
    near: float | None = None
    """nearest content along rays, in world units; null: from `scene_radius`"""
    far: float | None = None
    """farthest content along rays, in world units; null: from `scene_radius`"""
    scene_radius: float = 1.7321
    """radius of the ball around the origin that holds the content, where near or far are null"""


@threestudio.register("video-file-datamodule")
class VideoFileDataModule(VideoSceneDataModule):
    """Rays of a single video; see `VideoSceneDataModule`."""

    Config = VideoFileDataModuleConfig

    def validate_config(self) -> None:
        """Raise ValueError where a key has a value that cannot work."""
        super().validate_config()
        cfg = self.cfg
        validate_number(cfg.fovy_deg, "data.fovy_deg", 0, 180, open_low=True, open_high=True)
        validate_number(cfg.elevation_deg, "data.elevation_deg", -90, 90)
        validate_number(cfg.camera_distance, "data.camera_distance", 0, open_low=True)
        validate_count(cfg.hold_out_every, "data.hold_out_every", 0)
        if cfg.hold_out_every == 1:
            raise ValueError("data.hold_out_every is 1; expected 0, or 2 and more.")

    def inspect(self) -> None:
        """Check that the video has frames, and poses and times where a file gives them."""
        self._source = FrameSource(self.root)
        n_frames = self._source.n_frames
        self._chosen = parse_frame_list(plain(self.cfg.frame_list), n_frames, "data.frame_list")
        self._file = self._camera_file()
        self._content = read_json(self._file) if self._file else {}
        entries = self._content.get("frames", []) if self._file else []
        if self._file and len(entries) not in (1, n_frames):
            raise ValueError(
                f"{self._file} lists {len(entries)} poses, but {self._source.path} has {n_frames} "
                "frames; expected one pose, or one for each frame."
            )
        self._entries = entries * n_frames if len(entries) == 1 else entries
        self._poses = [frame_pose(entry, self._pose_name(i)) for i, entry in enumerate(entries)]
        self._times = self._read_times(n_frames)

    def read_scene(self) -> VideoScene:
        """Decode all frames.

        Raises:
            ValueError: the video is cut, its size does not fit the file of poses, or see
                `VideoScene`.
        """
        cfg, count = self.cfg, len(self._chosen)
        seen = self._source.first_size()
        size = downsampled_size(*seen, cfg.downsample)
        c2w, intrinsics = self._cameras(seen, size)
        near, far = distance_bounds(c2w, cfg.near, cfg.far, cfg.scene_radius)
        places = torch.arange(count)
        every = cfg.hold_out_every
        held_out = places % every == every // 2 if every else torch.zeros(count, dtype=torch.bool)
        return VideoScene(
            frames=read_frames(self._source, self._chosen, *size),
            c2w=c2w,
            intrinsics=intrinsics,
            camera_ids=torch.zeros(count, dtype=torch.long),
            time_ids=places,
            frame_times=self._times[self._chosen] if self._timed else places / max(1, count - 1),
            held_out=held_out,
            near=near,
            far=far,
            names=[self._source.frame_name(index) for index in self._chosen],
            train_on_held_out=cfg.parity,
        )

    def _camera_file(self) -> Path | None:
        if self.cfg.cameras is not None:
            return Path(self.cfg.cameras).expanduser()
        beside = self.root.with_suffix(".json")
        return beside if beside.is_file() else None

    def _pose_name(self, index: int) -> str:
        return f"{self._file} frame {index}"

    def _read_times(self, n_frames: int) -> Float[Tensor, "n"]:
        """Times of the file's frames, which must grow; evenly spaced where it has none."""
        times = [frame_time(entry, self._pose_name(i)) for i, entry in enumerate(self._entries)]
        self._timed = len(times) > 1 and len(self._poses) > 1 and times[0] is not None
        if not self._timed:
            return torch.linspace(0.0, 1.0, n_frames)
        for index, time in enumerate(times):
            if time is None:
                raise ValueError(f"{self._pose_name(index)}: it has no time, while others have.")
            if index and time <= times[index - 1]:
                raise ValueError(
                    f"{self._pose_name(index)}: its time {time} does not follow "
                    f"{times[index - 1]}; expected times that grow."
                )
        return torch.tensor(times)

    def _cameras(
        self, seen: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "n 4 4"], Float[Tensor, "n 3 3"]]:
        cfg, count = self.cfg, len(self._chosen)
        if self._file is None:
            pose = camera_from_orbit(cfg.elevation_deg, cfg.azimuth_deg, cfg.camera_distance)
            matrix = intrinsics_from_fovy(math.radians(cfg.fovy_deg), *size)
            return pose.expand(count, 4, 4).clone(), matrix.expand(count, 3, 3).clone()
        moves = len(self._poses) > 1
        poses = [self._poses[index if moves else 0] for index in self._chosen]
        matrices = [
            frame_intrinsics(self._content, self._entries[i], seen, size, self._pose_name(i))
            for i in self._chosen
        ]
        return torch.stack(poses), torch.stack(matrices)
