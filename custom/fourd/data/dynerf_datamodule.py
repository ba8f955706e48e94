"""Synchronised videos with `poses_bounds.npy`: DyNeRF (Neural 3D Video), `dynerf-datamodule`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from torch import Tensor

from .llff_poses import LlffCameras, normalise_cameras, read_poses_bounds
from .prepared_frames import is_prepared, prepared_sources
from .video_frames import FrameSource, downsampled_size, list_pictures, list_videos, natural_order
from .video_scene import VideoScene
from .video_scene_datamodule import (
    SPACES,
    VideoSceneDataModule,
    VideoSceneDataModuleConfig,
    choose_cameras,
    choose_frames,
    stack_cameras,
)

# cam13 of coffee_martini is out of step with the others; it is the thirteenth row.
UNSYNCHRONISED = ("coffee_martini", "cam13", 12)
ASPECT_TOLERANCE = 0.01


@dataclass
class DyNeRFDataModuleConfig(VideoSceneDataModuleConfig):
    """Keys of `dynerf-datamodule`; `dataroot` is the folder of `camNN.mp4`, `poses_bounds.npy`."""

    hold_out_cameras: Any = field(default_factory=lambda: [0])
    """cameras kept for validation, by position or by name; the dataset's authors hold cam00 out"""
    space: str = "world"
    """space of the rays: "world", or "ndc" (normalised device coordinates, near plane 1)"""
    normalise: str = "llff"
    """"llff" moves the average pose to the origin and the nearest content to 0.93; "none" keeps
    the file's world"""
    skip_cameras: Any = None
    """cameras to leave out, by position or by name; null leaves out cam13 of coffee_martini, which
    is out of step, [] nothing"""
    use_prepared: bool = True
    """read the frames that `prepare_video` decoded, where they are there"""


@threestudio.register("dynerf-datamodule")
class DyNeRFDataModule(VideoSceneDataModule):
    """Rays of synchronised videos; see `VideoSceneDataModule`."""

    Config = DyNeRFDataModuleConfig

    @property
    def ndc(self) -> bool:
        """Whether rays are in normalised device coordinates."""
        return self.cfg.space == "ndc"

    def validate_config(self) -> None:
        """Raise ValueError where a key has a value that cannot work."""
        super().validate_config()
        if self.cfg.space not in SPACES:
            raise ValueError(f"data.space is {self.cfg.space!r}; expected 'world' or 'ndc'.")
        if self.cfg.normalise not in ("llff", "none"):
            raise ValueError(
                f"data.normalise is {self.cfg.normalise!r}; expected 'llff' or 'none'."
            )
        if self.ndc and self.cfg.normalise == "none":
            raise ValueError(
                "data.space: ndc needs data.normalise: llff, since its near plane is 1 in the "
                "normalised world."
            )

    def inspect(self) -> None:
        """Check poses, the number of videos and their frames, and the held-out cameras."""
        cameras = read_poses_bounds(self.root / "poses_bounds.npy")
        sources = camera_sources(self.root)
        cameras, sources = self._leave_out(cameras, sources)
        names = [source.name for source in sources]
        self._held_out = choose_cameras(self.cfg.hold_out_cameras, names, "data.hold_out_cameras")
        if self.cfg.use_prepared:
            sources = prepared_sources(sources, self.cfg.downsample)
        self._chosen = choose_frames(sources, self.cfg.frame_list, "data.frame_list")
        self._cameras, self._sources = cameras, sources

    def read_scene(self) -> VideoScene:
        """Decode all frames.

        Raises:
            ValueError: a video is cut, its size does not fit, or see `VideoScene`.
        """
        cameras, file_from_scene = self._cameras, None
        if self.cfg.normalise == "llff":
            cameras, file_from_scene = normalise_cameras(cameras)
        height, width = self._size()
        parts = stack_cameras(self._sources, self._chosen, height, width)
        row = parts["camera_ids"]
        held_out = torch.tensor([i in self._held_out for i in range(len(cameras))])
        return VideoScene(
            **parts,
            c2w=cameras.c2w.float()[row],
            intrinsics=self._intrinsics(cameras, height, width).float()[row],
            held_out=held_out[row],
            near=float(cameras.bounds.min()),
            far=float(cameras.bounds.max()),
            train_on_held_out=self.cfg.parity,
            file_from_scene=None if file_from_scene is None else file_from_scene.float(),
        )

    def _size(self) -> tuple[int, int]:
        """Height and width of the frames to read, from the first camera's own size."""
        first = self._sources[0]
        height, width = (round(side) for side in self._cameras.sizes[0].tolist())
        seen = first.first_size()
        if abs(seen[1] * height / (seen[0] * width) - 1) > ASPECT_TOLERANCE:
            raise ValueError(
                f"{first.path} has frames of {seen[1]} x {seen[0]} pixels, but row 0 of "
                f"poses_bounds.npy says {width} x {height}; expected one shape."
            )
        if is_prepared(first):
            return seen
        return downsampled_size(*seen, self.cfg.downsample)

    def _intrinsics(self, cameras: LlffCameras, height: int, width: int) -> Float[Tensor, "n 3 3"]:
        """Focal lengths scaled per axis from the size that the row states; centred."""
        matrices = torch.eye(3, dtype=torch.float64).repeat(len(cameras), 1, 1)
        matrices[:, 0, 0] = cameras.focal * width / cameras.sizes[:, 1]
        matrices[:, 1, 1] = cameras.focal * height / cameras.sizes[:, 0]
        matrices[:, 0, 2], matrices[:, 1, 2] = 0.5 * width, 0.5 * height
        return matrices

    def _leave_out(
        self, cameras: LlffCameras, sources: list[FrameSource]
    ) -> tuple[LlffCameras, list[FrameSource]]:
        """Apply `skip_cameras`, and refuse rows that do not fit the videos."""
        names = [source.name for source in sources]
        scene, bad, bad_row = UNSYNCHRONISED
        skip = self.cfg.skip_cameras
        is_bad_scene = skip is None and scene in str(self.root.resolve())
        if is_bad_scene and bad not in names and len(cameras) == len(sources) + 1:
            threestudio.info(
                "%s is not there; row %d of poses_bounds.npy is left out", bad, bad_row
            )
            return cameras.without(bad_row), sources
        if len(cameras) != len(sources):
            raise ValueError(
                f"{self.root / 'poses_bounds.npy'} has {len(cameras)} rows, but there are "
                f"{len(sources)} cameras: {', '.join(names)}. Expected one row per camera, in "
                "the order of names; is a video missing?"
            )
        if skip is not None:
            out = choose_cameras(skip, names, "data.skip_cameras")
        else:
            out = {names.index(bad)} if is_bad_scene and bad in names else set()
            if out:
                threestudio.info("%s of %s is out of step with the others; left out", bad, scene)
        for position in sorted(out, reverse=True):
            cameras = cameras.without(position)
            sources = sources[:position] + sources[position + 1 :]
        if not sources:
            raise ValueError("data.skip_cameras leaves no camera; expected at least one.")
        return cameras, sources


def camera_sources(root: Path) -> list[FrameSource]:
    """Return the cameras of a folder by name: its videos, or the folders of pictures in `frames`.

    Raises:
        ValueError: there is neither.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; expected one with camNN.mp4 files.")
    videos = list_videos(root)
    if videos:
        return [FrameSource(video) for video in videos]
    frames = root / "frames"
    folders = [path for path in frames.iterdir() if path.is_dir()] if frames.is_dir() else []
    folders = sorted((f for f in folders if list_pictures(f)), key=natural_order)
    if not folders:
        raise ValueError(
            f"{root} holds no video and no folder frames/<camera> with pictures; expected "
            "camNN.mp4 files beside poses_bounds.npy."
        )
    return [FrameSource(folder) for folder in folders]
