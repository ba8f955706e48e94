"""What the tools that warp frames read: originals, edited pictures, depth, and which frames."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.data.video_frames import over_background, read_picture
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.world.capture import RECORD as WORLD_RECORD
from custom.fourd.world.capture import read_truth
from custom.fourd.world.render import render

WHITE = (1.0, 1.0, 1.0)


def original(scene: VideoScene, row: int) -> Float[Tensor, "h w 3"]:
    """A frame as it was filmed, in [0, 1]."""
    return scene.frames[row].float() / 255


def content_hash(values: Tensor) -> str:
    """What tells one tensor's values from another's."""
    return hashlib.sha256(values.contiguous().numpy().tobytes()).hexdigest()


def read_edited(path: Path, scene: VideoScene) -> Float[Tensor, "h w 3"]:
    """An edited picture in [0, 1], of the size of the scene's frames.

    Raises:
        ValueError: it is missing, damaged, or of another size.
    """
    picture = over_background(read_picture(path), WHITE)
    if picture.shape[:2] != (scene.height, scene.width):
        raise ValueError(
            f"{path} is {picture.shape[1]} x {picture.shape[0]} pixels and the frames are "
            f"{scene.width} x {scene.height}; expected one size. Resize it, or set --downsample."
        )
    return torch.from_numpy(picture.copy()).float() / 255


def picked_times(
    scene: VideoScene, camera: int | None, reference: int | None, targets: list[int] | None
) -> tuple[int, int, list[int]]:
    """The camera, reference and targets asked for, by default the first, its first and all others.

    Raises:
        ValueError: the camera or a frame is not there, or there is nothing to warp to.
    """
    camera = scene.cameras()[0] if camera is None else camera
    times = scene.time_ids[scene.camera_rows(camera)].tolist()
    if not times:
        raise ValueError(f"camera {camera} is not there; the cameras are {scene.cameras()}.")
    reference = times[0] if reference is None else reference
    targets = [time for time in times if time != reference] if targets is None else targets
    for time in [reference, *targets]:
        frame_row(scene, camera, time)
    if not targets:
        raise ValueError(
            f"camera {camera} has no frame but the reference, {reference}; expected another one to "
            "warp to."
        )
    return camera, reference, targets


def frame_row(scene: VideoScene, camera: int, time: int) -> int:
    """The row of a frame.

    Raises:
        ValueError: the camera has none at that time.
    """
    try:
        return scene.index(camera, time)
    except KeyError as error:
        raise ValueError(error.args[0]) from None


def named_rows(scene: VideoScene, views: Sequence[str], time: int | None) -> list[int]:
    """Rows of views that are written CAMERA or CAMERA@TIME, ids both; TIME is ``time`` by default.

    Raises:
        ValueError: a view is written otherwise, or is not there.
    """
    time = scene.times()[0] if time is None else time
    rows = []
    for view in views:
        camera, at, moment = view.partition("@")
        try:
            rows.append(frame_row(scene, int(camera), int(moment) if at else time))
        except ValueError as error:
            if "invalid literal" not in str(error):
                raise
            raise ValueError(
                f"view {view!r} is neither CAMERA nor CAMERA@TIME, such as 3 or 3@0."
            ) from None
    return rows


def scene_depth(
    source: Path, scene: VideoScene, file: Path | None, is_selection: bool
) -> Float[Tensor, "n h w"]:
    """Distance along unit rays for each frame, 0 where unknown.

    Args:
        source: where the scene was read.
        scene: its frames.
        file: an array of the user's; None takes lidar that came with the scene, else the truth
            that `world.json` tells.
        is_selection: whether frames were left out when the scene was read.

    Raises:
        ValueError: there is no depth, or it does not fit the frames.
    """
    if file is not None:
        return _read_depth(file, scene)
    if scene.depth is not None:
        return scene.depth
    record = source / WORLD_RECORD if source.is_dir() else _beside(source)
    if not record.is_file():
        raise ValueError(
            f"{source} comes with no depth; give --depth FILE.npy, distances along rays in world "
            f"units of shape {(len(scene), scene.height, scene.width)}, a frame per row."
        )
    if is_selection:
        raise ValueError(f"{record} tells the depth of all frames only; leave out --frames.")
    truth = read_truth(record)
    fovy = 2 * torch.atan(0.5 * scene.height / scene.intrinsics[:, 1, 1])
    if not math.isclose(float(fovy[0]), truth.fovy_rad, rel_tol=1e-2):
        raise ValueError(f"{record} has another field of view than the cameras of {source}.")
    sizes = (scene.height, scene.width)
    parts = [
        render(truth.scene, c2w[None], angle[None], *sizes, time[None], samples_per_axis=1).depth
        for c2w, angle, time in zip(scene.c2w, fovy, scene.frame_times, strict=True)
    ]
    return torch.cat(parts)[..., 0]


def _beside(video: Path) -> Path:
    return video.with_name(f"{video.stem}.{WORLD_RECORD}")


def _read_depth(file: Path, scene: VideoScene) -> Float[Tensor, "n h w"]:
    try:
        values = np.load(file, allow_pickle=False)
        depth = torch.from_numpy(values.astype(np.float32))
    except (OSError, ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no array of numbers ({error}); expected an .npy.") from error
    expected = (len(scene), scene.height, scene.width)
    if tuple(depth.shape) != expected:
        raise ValueError(
            f"{file} has shape {tuple(depth.shape)}; expected {expected}, a frame per row in the "
            "order of the source."
        )
    return depth
