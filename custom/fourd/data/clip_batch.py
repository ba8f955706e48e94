"""From cameras to the frames of clips: the batch that the renderer and a video guidance take."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# One entry per time, or per channel: never per camera, whatever its length.
_NOT_PER_CAMERA = ("frame_times", "frame_times_video")


def clip_batch(batch: dict[str, Any], frame_times: Float[Tensor, "T"]) -> dict[str, Any]:
    """Return a batch in which every camera stands once for each scene time.

    Frames of a clip are neighbours: everything that has one row per camera is repeated alike, and
    ``frame_times`` [B * T] holds the time of each frame. Added are ``num_frames`` = T and
    ``images_per_group`` = T. The given batch is not changed.

    With ``train_dynamic_camera`` the cameras are those of the frames already, T per clip.

    Args:
        batch: cameras with the contract's keys.
        frame_times: times of a clip in [0, 1], shared by all clips.

    Raises:
        ValueError: moving cameras are no whole clips.
    """
    n_cameras, n_times = batch["rays_o"].shape[0], frame_times.numel()
    repeats = n_times
    if batch.get("train_dynamic_camera", False):
        if n_cameras % n_times:
            raise ValueError(
                f"the batch holds {n_cameras} moving cameras; expected a multiple of its "
                f"{n_times} frame_times, one camera per frame."
            )
        repeats = 1
    frames = dict(batch)
    for key, value in batch.items():
        if _per_camera(key, value, n_cameras):
            frames[key] = value.repeat_interleave(repeats, dim=0)
    n_clips = n_cameras * repeats // n_times
    frames["frame_times"] = frame_times.reshape(-1).repeat(n_clips)
    return frames | {"num_frames": n_times, "images_per_group": n_times}


def image_batch(batch: dict[str, Any], frame_time: float | Float[Tensor, ""]) -> dict[str, Any]:
    """Return a batch whose images all show the scene at one time in [0, 1]."""
    n_cameras = batch["rays_o"].shape[0]
    times = torch.as_tensor(frame_time, dtype=torch.float32, device=batch["rays_o"].device)
    return {**batch, "frame_times": times.reshape(1).expand(n_cameras), "num_frames": 1}


def _per_camera(key: str, value: Any, n_cameras: int) -> bool:
    """A flat colour has one entry per channel, so three cameras do not make it theirs."""
    if not isinstance(value, Tensor) or value.ndim == 0 or key in _NOT_PER_CAMERA:
        return False
    if key == "bg_color" and value.ndim == 1:
        return False
    return value.shape[0] == n_cameras
