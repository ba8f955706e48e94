"""A moving phone with standing validation cameras: DyCheck's iPhone sequences.

Layout: `camera/<id>.json`, `rgb/<s>x/<id>.png`, `depth/<s>x/<id>.npy` (lidar, training frames),
`covisible/<s>x/<split>/<id>.png`, `splits/<split>.json`, `scene.json`. Positions become
(p - center) * scale, in which `scene.json` states near and far; the axes of the world are the
file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import threestudio
import torch
from jaxtyping import Float
from torch import Tensor

from ..ops.camera import pixel_centres
from .transforms_file import read_json
from .video_frames import (
    downsampled_size,
    over_background,
    parse_frame_list,
    read_picture,
    resize_frame,
)
from .video_scene import VideoScene, check_pose
from .video_scene_datamodule import VideoSceneDataModule, VideoSceneDataModuleConfig, plain


@dataclass
class DyCheckDataModuleConfig(VideoSceneDataModuleConfig):
    """Keys of `dycheck-datamodule`; `dataroot` is the folder of one sequence."""

    use_depth: bool = True
    """read lidar depth of training frames, where it is there"""
    use_masks: bool = True
    """read covisible masks of validation frames, where they are there"""


@dataclass
class _Camera:
    """One camera file, in the scene's world and pixels of the full size."""

    c2w: Tensor
    focal: tuple[float, float]
    centre: tuple[float, float]
    size: tuple[int, int]


@threestudio.register("dycheck-datamodule")
class DyCheckDataModule(VideoSceneDataModule):
    """Rays of a phone's video, validated on other cameras; see `VideoSceneDataModule`.

    Training reads the train split; the val split is held out, with its covisible masks.
    """

    Config = DyCheckDataModuleConfig

    def inspect(self) -> None:
        """Check splits, cameras, and that every picture is there."""
        self._scale, self._center, self._bounds = _read_scene_json(self.root / "scene.json")
        rows = _read_split(self.root, "train")
        n_train = len(rows)
        if (self.root / "splits" / "val.json").is_file():
            rows += _read_split(self.root, "val")
        times = sorted({time for _, _, time in rows[:n_train]})
        chosen = parse_frame_list(plain(self.cfg.frame_list), len(times), "data.frame_list")
        kept = {times[index] for index in chosen}
        self._rows = [row for row in rows if row[2] in kept]
        self._n_train = sum(row[2] in kept for row in rows[:n_train])
        self._last_time = max(time for _, _, time in rows)
        self._cameras = [
            self._read_camera(self.root / "camera" / f"{name}.json") for name, _, _ in self._rows
        ]
        for name, _, _ in self._rows:
            if not self._file("rgb", name, ".png").is_file():
                raise ValueError(f"{self._file('rgb', name, '.png')} is missing.")

    def read_scene(self) -> VideoScene:
        """Read all pictures, depths and masks.

        Raises:
            ValueError: a file is cut, its size does not fit, or see `VideoScene`.
        """
        full = self._cameras[0].size
        size = downsampled_size(*full, self.cfg.downsample)
        count = len(self._rows)
        frames = torch.empty((count, *size, 3), dtype=torch.uint8)
        for row, (name, _, _) in enumerate(self._rows):
            frames[row] = self._read_picture(row, self._file("rgb", name, ".png"), size)
        intrinsics = torch.stack([_intrinsics(camera, size) for camera in self._cameras])
        ids = torch.tensor([row[1:] for row in self._rows])
        return VideoScene(
            frames=frames,
            c2w=torch.stack([camera.c2w for camera in self._cameras]).float(),
            intrinsics=intrinsics,
            camera_ids=ids[:, 0],
            time_ids=ids[:, 1],
            frame_times=ids[:, 1] / max(1, self._last_time),
            held_out=torch.arange(count) >= self._n_train,
            near=self._bounds[0],
            far=self._bounds[1],
            masks=self._read_masks(size),
            depth=self._read_depth(size, intrinsics),
            names=[str(self._file("rgb", name, ".png")) for name, _, _ in self._rows],
            train_on_held_out=self.cfg.parity,
            file_from_scene=self._file_from_scene(),
        )

    def _folder(self, kind: str) -> Path:
        """The folder at the wanted downsampling where there is one, else at full size."""
        wanted = self.root / kind / f"{self.cfg.downsample:g}x"
        return wanted if wanted.is_dir() else self.root / kind / "1x"

    def _file(self, kind: str, name: str, ending: str) -> Path:
        return self._folder(kind) / f"{name}{ending}"

    def _read_picture(self, row: int, path: Path, size: tuple[int, int]) -> Tensor:
        picture = over_background(read_picture(path), (0.0, 0.0, 0.0))
        expected = size if path.parent.name != "1x" else self._cameras[row].size
        if picture.shape[:2] != expected or self._cameras[row].size != self._cameras[0].size:
            raise ValueError(
                f"{path} is {picture.shape[1]} x {picture.shape[0]} pixels; expected "
                f"{expected[1]} x {expected[0]}, by its camera, like the first frame."
            )
        return torch.from_numpy(resize_frame(picture, *size).copy())

    def _read_depth(
        self, size: tuple[int, int], intrinsics: Float[Tensor, "n 3 3"]
    ) -> Float[Tensor, "n h w"] | None:
        """Lidar's z as the distance along the unit ray, in the scene's units; 0 where missing."""
        if not self.cfg.use_depth or not self._folder("depth").is_dir():
            return None
        depth = torch.zeros((len(self._rows), *size))
        centres = pixel_centres(*size, intrinsics)
        for row, (name, _, _) in enumerate(self._rows[: self._n_train]):
            path = self._file("depth", name, ".npy")
            if not path.is_file():
                raise ValueError(f"{path} is missing; set data.use_depth: false to do without.")
            values = np.load(path, allow_pickle=False).astype(np.float32)
            values = values.reshape(values.shape[:2])
            # Averaging across an edge would invent surfaces in the air.
            z_depth = torch.nn.functional.interpolate(
                torch.from_numpy(values)[None, None], size, mode="nearest-exact"
            )[0, 0]
            matrix = intrinsics[row]
            slope = (centres - matrix[:2, 2]) / matrix.diagonal()[:2]
            depth[row] = z_depth * self._scale * (1 + slope.square().sum(-1)).sqrt()
        return torch.where(torch.isfinite(depth), depth, 0.0)

    def _read_masks(self, size: tuple[int, int]) -> Tensor | None:
        folder = self._folder("covisible") / "val"
        if not self.cfg.use_masks or not folder.is_dir():
            return None
        masks = torch.full((len(self._rows), *size), 255, dtype=torch.uint8)
        for row, (name, _, _) in enumerate(self._rows[self._n_train :], start=self._n_train):
            picture = torch.from_numpy(read_picture(folder / f"{name}.png")[..., 0].copy())
            picture = torch.nn.functional.interpolate(
                picture[None, None].float(), size, mode="nearest-exact"
            )[0, 0]
            masks[row] = (picture > 127) * 255
        return masks

    def _read_camera(self, path: Path) -> _Camera:
        facts = read_json(path)
        try:
            world_to_camera = torch.tensor(facts["orientation"], dtype=torch.float64)
            position = torch.tensor(facts["position"], dtype=torch.float64)
            focal, aspect = float(facts["focal_length"]), float(facts.get("pixel_aspect_ratio", 1))
            centre = tuple(float(value) for value in facts["principal_point"])
            width, height = (int(value) for value in facts["image_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no camera ({error!r}); expected orientation, position, focal_length, "
                "principal_point and image_size."
            ) from None
        bends = [facts.get("skew", 0.0), *(facts.get("radial_distortion") or ())]
        bends += facts.get("tangential_distortion") or ()
        if any(abs(value) > 0 for value in bends):
            raise ValueError(
                f"{path}: its lens has skew or distortion {bends}; expected a pinhole. Undistort "
                "the pictures first."
            )
        if world_to_camera.shape != (3, 3) or position.shape != (3,):
            raise ValueError(
                f"{path}: orientation is {tuple(world_to_camera.shape)} and position "
                f"{tuple(position.shape)}; expected 3 x 3 and 3 numbers."
            )
        right, down, forward = world_to_camera
        c2w = torch.eye(4, dtype=torch.float64)
        place = (position - self._center) * self._scale
        c2w[:3] = torch.stack([right, -down, -forward, place], dim=-1)
        check_pose(c2w, str(path))
        return _Camera(c2w, (focal, focal * aspect), centre, (height, width))

    def _file_from_scene(self) -> Float[Tensor, "4 4"]:
        matrix = torch.eye(4)
        matrix[:3, :3] /= self._scale
        matrix[:3, 3] = self._center.float()
        return matrix


def _intrinsics(camera: _Camera, size: tuple[int, int]) -> Float[Tensor, "3 3"]:
    to_y, to_x = size[0] / camera.size[0], size[1] / camera.size[1]
    return torch.tensor(
        [
            [camera.focal[0] * to_x, 0.0, camera.centre[0] * to_x],
            [0.0, camera.focal[1] * to_y, camera.centre[1] * to_y],
            [0.0, 0.0, 1.0],
        ]
    )


def _read_scene_json(path: Path) -> tuple[float, Tensor, tuple[float, float]]:
    facts = read_json(path)
    try:
        scale = float(facts["scale"])
        center = torch.tensor(facts["center"], dtype=torch.float64)
        bounds = float(facts["near"]), float(facts["far"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no scene ({error!r}); expected center, scale, near and far."
        ) from None
    if not scale > 0 or center.shape != (3,):
        raise ValueError(
            f"{path}: scale is {scale} and center {center.tolist()}; expected a positive number "
            "and three."
        )
    return scale, center, bounds


def _read_split(root: Path, split: str) -> list[tuple[str, int, int]]:
    """(name, camera id, time id) of each frame of a split."""
    path = root / "splits" / f"{split}.json"
    facts: Any = read_json(path)
    columns = [facts.get(key) or [] for key in ("frame_names", "camera_ids", "time_ids")]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) != 1 or not lengths[0]:
        raise ValueError(
            f"{path} has {lengths[0]} frame_names, {lengths[1]} camera_ids and {lengths[2]} "
            "time_ids; expected as many of each, at least one."
        )
    return [(str(n), int(c), int(t)) for n, c, t in zip(*columns, strict=True)]
