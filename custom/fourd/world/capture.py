"""Who films a scene of the world, from where and when; the truth of every frame.

Legend: n frames, m cameras of a rig, size_px pixels of height and width (s).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from custom.fourd.ops.camera import camera_from_orbit

from .grammar import WorldScene, parse_caption
from .render import render

ELEVATION_DEG, DISTANCE, FOVY_RAD = 15.0, 3.0, math.radians(40.0)
BALL_RADIUS = math.sqrt(3)
"""Of the ball around the scene's box [-1, 1]^3: content lies at DISTANCE plus or minus this."""
RECORD = "world.json"
WHITE = (1.0, 1.0, 1.0)


@dataclass
class WorldCapture:
    """Cameras and times at which a scene is filmed, one row per frame."""

    scene: WorldScene
    c2w: Float[Tensor, "n 4 4"]
    """poses of the contract"""
    frame_times: Float[Tensor, "n"]
    """scene times in [0, 1]"""
    camera_ids: Int[Tensor, "n"]
    """which camera, from 0; camera 0 is the held-out one of a rig"""
    time_ids: Int[Tensor, "n"]
    """position in time, from 0"""
    size_px: int
    """height and width of the frames"""
    fovy_rad: float = FOVY_RAD
    """vertical field of view"""
    background: tuple[float, float, float] = WHITE
    """colour in [0, 1]"""

    def __len__(self) -> int:
        return len(self.c2w)

    @property
    def bounds(self) -> tuple[float, float]:
        """Nearest and farthest distance at which any camera can see content."""
        distance = self.c2w[:, :3, 3].norm(dim=-1)
        return max(0.05, float(distance.min()) - BALL_RADIUS), float(distance.max()) + BALL_RADIUS

    def ids(self) -> tuple[list[int], list[int]]:
        """Return the camera ids and the time ids."""
        return self.camera_ids.tolist(), self.time_ids.tolist()

    def render(self) -> tuple[Float[Tensor, "n s s 3"], Float[Tensor, "n s s"]]:
        """Return the true colours in [0, 1] and depths along unit rays, 0 for background."""
        parts = [self._render(slice(at, at + 16)) for at in range(0, len(self), 16)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def frames(self) -> UInt8[Tensor, "n s s 3"]:
        """Return the true colours, rounded to 8 bits."""
        return (self.render()[0] * 255).round().clamp(0, 255).to(torch.uint8)

    def _render(self, rows: slice) -> tuple[Tensor, Tensor]:
        c2w, size = self.c2w[rows], self.size_px
        images = render(
            self.scene,
            c2w,
            torch.full((len(c2w),), self.fovy_rad),
            size,
            size,
            self.frame_times[rows],
            torch.tensor(self.background),
        )
        return images.rgb, images.depth[..., 0]


def arc_azimuths(n_cameras: int = 8, span_deg: float = 60.0) -> Float[Tensor, "m"]:
    """Return azimuths in degrees, evenly over an arc around the front, an inner one first.

    The first camera is the one that DyNeRF's readers hold out, so it must not be at the rim.
    """
    azimuths = torch.linspace(-span_deg / 2, span_deg / 2, n_cameras)
    inner = (n_cameras - 1) // 2
    return torch.cat([azimuths[inner : inner + 1], azimuths[:inner], azimuths[inner + 1 :]])


def rig_capture(
    scene: WorldScene,
    azimuths_deg: Float[Tensor, "m"],
    n_times: int = 16,
    size_px: int = 64,
    background: Sequence[float] = WHITE,
) -> WorldCapture:
    """Standing cameras that all film the whole motion, camera after camera."""
    n_cameras = len(azimuths_deg)
    poses = camera_from_orbit(torch.full_like(azimuths_deg, ELEVATION_DEG), azimuths_deg, DISTANCE)
    times = torch.arange(n_times)
    return WorldCapture(
        scene,
        poses.repeat_interleave(n_times, dim=0),
        (times / max(1, n_times - 1)).repeat(n_cameras),
        torch.arange(n_cameras).repeat_interleave(n_times),
        times.repeat(n_cameras),
        size_px,
        background=tuple(background),
    )


def path_capture(
    scene: WorldScene,
    n_times: int = 16,
    size_px: int = 64,
    swing_deg: float = 60.0,
    background: Sequence[float] = WHITE,
) -> WorldCapture:
    """One camera that swings to and fro around the front while the scene moves; 0 stands still."""
    times = torch.arange(n_times)
    frame_times = times / max(1, n_times - 1)
    azimuths_deg = 0.5 * swing_deg * torch.sin(2 * math.pi * frame_times)
    poses = camera_from_orbit(torch.full_like(azimuths_deg, ELEVATION_DEG), azimuths_deg, DISTANCE)
    zeros = torch.zeros_like(times)
    return WorldCapture(
        scene, poses, frame_times, zeros, times, size_px, background=tuple(background)
    )


def read_truth(path: Path) -> WorldCapture:
    """Return what `world.json` of a written folder (or that file itself) says was filmed."""
    path = Path(path)
    facts = json.loads((path / RECORD if path.is_dir() else path).read_text(encoding="utf-8"))
    return WorldCapture(
        parse_caption(facts["caption"]),
        torch.tensor(facts["c2w"]),
        torch.tensor(facts["frame_times"]),
        torch.tensor(facts["camera_ids"]),
        torch.tensor(facts["time_ids"]),
        facts["size_px"],
        facts["fovy_rad"],
        tuple(facts["background"]),
    )


def join_captures(first: WorldCapture, second: WorldCapture) -> WorldCapture:
    """Return the frames of two captures of one scene, the first's before the second's."""
    columns = ("c2w", "frame_times", "camera_ids", "time_ids")
    parts = [torch.cat([getattr(first, name), getattr(second, name)]) for name in columns]
    return WorldCapture(first.scene, *parts, first.size_px, first.fovy_rad, first.background)


def record_of(capture: WorldCapture) -> dict[str, Any]:
    """Return the content of `world.json`, which `read_truth` reads."""
    return {
        "caption": capture.scene.caption,
        "size_px": capture.size_px,
        "fovy_rad": capture.fovy_rad,
        "background": list(capture.background),
        "frame_times": capture.frame_times.tolist(),
        "camera_ids": capture.camera_ids.tolist(),
        "time_ids": capture.time_ids.tolist(),
        "c2w": capture.c2w.tolist(),
    }
