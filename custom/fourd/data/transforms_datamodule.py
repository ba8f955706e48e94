"""Pictures with `transforms.json` and times: nerfstudio, D-NeRF, renders of our own scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import threestudio
import torch
from torch import Tensor

from .transforms_file import (
    distance_bounds,
    frame_intrinsics,
    frame_pose,
    frame_time,
    read_json,
)
from .video_frames import (
    PICTURES,
    downsampled_size,
    over_background,
    parse_frame_list,
    read_picture,
    resize_frame,
)
from .video_scene import VideoScene
from .video_scene_datamodule import (
    VideoSceneDataModule,
    VideoSceneDataModuleConfig,
    choose_cameras,
    plain,
)


@dataclass
class TransformsDataModuleConfig(VideoSceneDataModuleConfig):
    """Keys of `transforms-datamodule`; `dataroot` has `transforms.json` or `transforms_*.json`."""

    hold_out_cameras: Any = field(default_factory=list)
    """cameras kept for validation, by position, where the file names no split"""
    eval_split: str | None = None
    """which of transforms_val.json and transforms_test.json is held out; null: the first there"""
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """colour in [0, 1] behind pictures that have an alpha channel"""
    near: float | None = None
    """nearest content along rays, in world units; null: from `scene_radius`"""
    far: float | None = None
    """farthest content along rays, in world units; null: from `scene_radius`"""
    scene_radius: float = 1.7321
    """radius of the ball around the origin that holds the content, where near or far are null"""


class _Entry(NamedTuple):
    """One frame of a file, before its picture is read."""

    name: str
    picture: Path
    content: dict[str, Any]
    frame: dict[str, Any]
    pose: Tensor
    time: float
    held_out: bool


@threestudio.register("transforms-datamodule")
class TransformsDataModule(VideoSceneDataModule):
    """Rays of posed pictures with times; see `VideoSceneDataModule`."""

    Config = TransformsDataModuleConfig

    def inspect(self) -> None:
        """Check all poses and times, and that every picture is there."""
        entries = [
            entry
            for path, held_out in self._files()
            for entry in _read_entries(path, held_out, self.cfg.eval_split)
        ]
        missing = [entry for entry in entries if not entry.picture.is_file()]
        if missing:
            raise ValueError(
                f"{missing[0].name}: its picture {missing[0].picture} is missing "
                f"({len(missing)} of {len(entries)} are)."
            )
        camera_ids = _streams(entries)
        times = sorted({entry.time for entry in entries})
        chosen = parse_frame_list(plain(self.cfg.frame_list), len(times), "data.frame_list")
        place = {times[index]: index for index in chosen}
        keep = [index for index, entry in enumerate(entries) if entry.time in place]
        self._entries = [entries[index] for index in keep]
        self._camera_ids = torch.tensor([camera_ids[index] for index in keep])
        self._time_ids = torch.tensor([place[entry.time] for entry in self._entries])

    def read_scene(self) -> VideoScene:
        """Read all pictures.

        Raises:
            ValueError: a picture is cut, its size does not fit, or see `VideoScene`.
        """
        entries, cfg = self._entries, self.cfg
        names = [entry.name for entry in entries]
        seen = read_picture(entries[0].picture).shape[:2]
        height, width = downsampled_size(*seen, cfg.downsample)
        frames = torch.empty((len(entries), height, width, 3), dtype=torch.uint8)
        for row, entry in enumerate(entries):
            picture = over_background(read_picture(entry.picture), cfg.background)
            if picture.shape[:2] != seen:
                raise ValueError(
                    f"{entry.picture} is {picture.shape[1]} x {picture.shape[0]} pixels; expected "
                    f"{seen[1]} x {seen[0]} like {entries[0].picture}."
                )
            frames[row] = torch.from_numpy(resize_frame(picture, height, width).copy())
        c2w = torch.stack([entry.pose for entry in entries])
        near, far = distance_bounds(c2w, cfg.near, cfg.far, cfg.scene_radius)
        return VideoScene(
            frames=frames,
            c2w=c2w,
            intrinsics=torch.stack(
                [
                    frame_intrinsics(e.content, e.frame, seen, (height, width), e.name)
                    for e in entries
                ]
            ),
            camera_ids=self._camera_ids,
            time_ids=self._time_ids,
            frame_times=torch.tensor([entry.time for entry in entries]),
            held_out=self._held_out(),
            near=near,
            far=far,
            names=names,
            train_on_held_out=cfg.parity,
        )

    def _held_out(self) -> Tensor:
        """By the file's split if it names one, else by `hold_out_cameras`."""
        marked = torch.tensor([entry.held_out for entry in self._entries])
        if bool(marked.any()):
            return marked
        names = [str(camera) for camera in range(int(self._camera_ids.max()) + 1)]
        chosen = choose_cameras(self.cfg.hold_out_cameras, names, "data.hold_out_cameras")
        return torch.tensor([int(camera) in chosen for camera in self._camera_ids])

    def _files(self) -> list[tuple[Path, bool]]:
        """The files to read, and whether all of a file is held out."""
        if self.root.is_file():
            return [(self.root, False)]
        single, train = self.root / "transforms.json", self.root / "transforms_train.json"
        if single.is_file():
            return [(single, False)]
        if not train.is_file():
            raise ValueError(
                f"{self.root} holds neither transforms.json nor transforms_train.json; expected "
                "one of them."
            )
        splits = [self.cfg.eval_split] if self.cfg.eval_split else ["val", "test"]
        found = [self.root / f"transforms_{split}.json" for split in splits]
        found = [path for path in found if path.is_file()]
        if self.cfg.eval_split and not found:
            raise ValueError(
                f"data.eval_split is {self.cfg.eval_split!r}, but {self.root} holds no "
                f"transforms_{self.cfg.eval_split}.json."
            )
        return [(train, False), *((path, True) for path in found[:1])]


def _read_entries(path: Path, held_out: bool, eval_split: str | None) -> list[_Entry]:
    content = read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not frames:
        raise ValueError(f"{path} lists no frames; expected a list under 'frames'.")
    val_names = set(content.get(f"{eval_split or 'val'}_filenames", ()))
    shared = {key: value for key, value in content.items() if key != "frames"}
    entries, untimed = [], []
    for row, frame in enumerate(frames):
        file_path = str(frame.get("file_path", ""))
        name = f"{path} frame {row} ({file_path})"
        time = frame_time(frame, name)
        if time is None:
            untimed.append(name)
            time = row / max(1, len(frames) - 1)
        pose, picture = frame_pose(frame, name), _picture(path.parent, file_path)
        is_val = held_out or file_path in val_names
        entries.append(_Entry(name, picture, shared, frame, pose, time, is_val))
    if untimed and len(untimed) < len(frames):
        raise ValueError(f"{untimed[0]}: it has no time, while others have; expected one for each.")
    if untimed:
        threestudio.warn("%s has no times; its frames are taken in order as a video.", path)
    return entries


def _picture(folder: Path, file_path: str) -> Path:
    """D-NeRF leaves the ending out."""
    path = folder / file_path
    if path.suffix.lower() in PICTURES:
        return path
    found = [path.with_name(path.name + ending) for ending in PICTURES]
    return next((file for file in found if file.is_file()), found[0])


def _streams(entries: Sequence[_Entry]) -> list[int]:
    """Which camera each frame is from; the held-out ones have cameras of their own.

    A frame may say it (`camera_id`, `camera_label`). Else, frames that are all of different times
    are one camera that moves, and otherwise frames of one pose are one camera.
    """
    keys: list[Any] = [None] * len(entries)
    for split in (False, True):
        rows = [row for row, entry in enumerate(entries) if entry.held_out == split]
        labels = [
            entries[row].frame.get("camera_id", entries[row].frame.get("camera_label"))
            for row in rows
        ]
        if rows and None not in labels:
            found: list[Any] = labels
        elif len({entries[row].time for row in rows}) == len(rows):
            found = [0] * len(rows)
        else:
            found = [tuple(entries[row].pose.flatten().tolist()) for row in rows]
        for row, key in zip(rows, found, strict=True):
            keys[row] = (split, key)
    order = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [order[key] for key in keys]
