"""Videos of one moving scene with their cameras: what every reader makes and every trainer takes.

Legend: n frames of h x w pixels. A fixed camera's video is all rows of one ``camera_id``; a moving
camera is one stream too, with another pose in each row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

ROTATION_TOLERANCE = 1e-3
"""Largest entry of |R^T R - 1|; files that store poses with four digits pass."""


@dataclass
class VideoScene:
    """Frames of one scene by synchronised cameras, or by one, in memory or memory-mapped.

    All lengths are in the units of the scene's world, in which ``c2w`` stands. Construction checks
    everything.

    Raises:
        ValueError: naming the field, and the frame by its entry in ``names``.
    """

    frames: UInt8[Tensor, "n h w 3"]
    """sRGB colours as the files hold them, row 0 at the top"""
    c2w: Float[Tensor, "n 4 4"]
    """poses of the contract: columns right, up, backward, position"""
    intrinsics: Float[Tensor, "n 3 3"]
    """pinhole matrices in pixels of these frames, pixel centres at +0.5"""
    camera_ids: Int[Tensor, "n"]
    """which stream a frame belongs to"""
    time_ids: Int[Tensor, "n"]
    """position in time; frames of one time_id are simultaneous"""
    frame_times: Float[Tensor, "n"]
    """scene time in [0, 1], growing with time_ids"""
    held_out: Bool[Tensor, "n"]
    """True for frames of validation cameras"""
    near: float
    """nearest content, as a distance along rays"""
    far: float
    """farthest content, as a distance along rays"""
    masks: UInt8[Tensor, "n h w"] | None = None
    """255 where a pixel may be compared (DyCheck's covisible), 0 elsewhere"""
    depth: Float[Tensor, "n h w"] | None = None
    """lidar or truth, Euclidean distance along the unit ray; 0 where missing"""
    names: list[str] = field(default_factory=list)
    """which file each frame came from, for messages"""
    train_on_held_out: bool = False
    """parity with releases that train on their validation camera: it leaks, so metrics lie"""
    file_from_scene: Float[Tensor, "4 4"] | None = None
    """similarity that takes points of the scene's world to the file's; None where they are equal"""

    def __post_init__(self) -> None:
        self.names = list(self.names) or [f"frame {row}" for row in range(len(self.frames))]
        self._check_shapes()
        self._check_cameras()
        self._check_times()
        if not 0.0 < self.near < self.far < float("inf"):
            raise ValueError(
                f"near is {self.near} and far {self.far}; expected 0 < near < far, in scene units."
            )
        if not self.train_on_held_out and bool(self.held_out.all()):
            raise ValueError(
                f"all {len(self)} frames are held out; expected some to train on. "
                "Hold out fewer cameras."
            )
        self._rows = {pair: row for row, pair in enumerate(zip(*self._id_lists(), strict=True))}

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def height(self) -> int:
        """Of the frames, in pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """Of the frames, in pixels."""
        return self.frames.shape[2]

    def index(self, camera_id: int, time_id: int) -> int:
        """Return the row of a camera's frame.

        Raises:
            KeyError: the camera has no frame at that time.
        """
        try:
            return self._rows[int(camera_id), int(time_id)]
        except KeyError:
            raise KeyError(
                f"camera {camera_id} has no frame at time_id {time_id}; cameras are "
                f"{self.cameras()} and time_ids {self.times()}."
            ) from None

    def cameras(self) -> list[int]:
        """Return the camera ids, in order."""
        return sorted(set(self.camera_ids.tolist()))

    def times(self) -> list[int]:
        """Return the time ids, in order."""
        return sorted(set(self.time_ids.tolist()))

    def camera_rows(self, camera_id: int) -> Int[Tensor, "m"]:
        """Return the rows of one stream, by time."""
        rows = torch.nonzero(self.camera_ids == camera_id).flatten()
        return rows[self.time_ids[rows].argsort()]

    def train_rows(self) -> Int[Tensor, "m"]:
        """Return the rows that training may read: not held out, or all with train_on_held_out."""
        if self.train_on_held_out:
            return torch.arange(len(self))
        return torch.nonzero(~self.held_out).flatten()

    def eval_rows(self) -> Int[Tensor, "m"]:
        """Return the held-out rows by camera and time; all rows where none is held out."""
        rows = torch.nonzero(self.held_out).flatten()
        rows = rows if len(rows) else torch.arange(len(self))
        order = sorted(
            rows.tolist(), key=lambda row: (int(self.camera_ids[row]), int(self.time_ids[row]))
        )
        return torch.tensor(order)

    def _id_lists(self) -> tuple[list[int], list[int]]:
        return self.camera_ids.tolist(), self.time_ids.tolist()

    def _check_shapes(self) -> None:
        if self.frames.ndim != 4 or self.frames.shape[-1] != 3 or not self.frames.numel():
            raise ValueError(
                f"frames has shape {tuple(self.frames.shape)}; expected (n, h, w, 3), not empty."
            )
        n, height, width, _ = self.frames.shape
        expected = {
            "frames": ((n, height, width, 3), torch.uint8),
            "c2w": ((n, 4, 4), torch.float32),
            "intrinsics": ((n, 3, 3), torch.float32),
            "camera_ids": ((n,), torch.int64),
            "time_ids": ((n,), torch.int64),
            "frame_times": ((n,), torch.float32),
            "held_out": ((n,), torch.bool),
            "masks": ((n, height, width), torch.uint8),
            "depth": ((n, height, width), torch.float32),
        }
        for name, (shape, dtype) in expected.items():
            value = getattr(self, name)
            if value is None and name in ("masks", "depth"):
                continue
            if tuple(value.shape) != shape or value.dtype != dtype:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)} and type {value.dtype}; expected "
                    f"{shape} and {dtype}, one row per frame."
                )
        if len(self.names) != n:
            raise ValueError(f"names has {len(self.names)} entries for {n} frames.")

    def _check_cameras(self) -> None:
        for row, name in enumerate(self.names):
            check_pose(self.c2w[row], name)
            check_intrinsics(self.intrinsics[row], name)

    def _check_times(self) -> None:
        times, ids = self.frame_times, self.time_ids
        wrong = torch.nonzero(~((times >= 0) & (times <= 1))).flatten()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"{self.names[row]}: its time is {float(times[row])}; expected scene time in "
                "[0, 1]."
            )
        order = torch.argsort(ids, stable=True)
        steps, rises = ids[order].diff(), times[order].diff()
        wrong = torch.nonzero(torch.where(steps > 0, rises <= 0, rises != 0)).flatten()
        if len(wrong):
            first, second = int(order[wrong[0]]), int(order[wrong[0] + 1])
            raise ValueError(
                f"{self.names[second]}: time {float(times[second])} at time_id {int(ids[second])} "
                f"follows time {float(times[first])} at time_id {int(ids[first])} "
                f"({self.names[first]}); expected times that grow with time_id, one per time_id."
            )
        seen: dict[tuple[int, int], int] = {}
        for row, pair in enumerate(zip(*self._id_lists(), strict=True)):
            if pair in seen:
                raise ValueError(
                    f"{self.names[row]} and {self.names[seen[pair]]} are both camera {pair[0]} at "
                    f"time_id {pair[1]}; expected one frame per camera and time."
                )
            seen[pair] = row


def check_pose(c2w: Float[Tensor, "4 4"], name: str) -> None:
    """Check that a pose is rigid and finite.

    Args:
        c2w: camera to world.
        name: the file and row it came from.

    Raises:
        ValueError: naming ``name`` and what is wrong.
    """
    if not bool(torch.isfinite(c2w).all()):
        raise ValueError(f"{name}: its pose holds NaN or infinity; expected finite numbers.")
    rotation = c2w[:3, :3].double()
    error = float((rotation.T @ rotation - torch.eye(3, dtype=torch.float64)).abs().max())
    if error > ROTATION_TOLERANCE:
        raise ValueError(
            f"{name}: the rotation of its pose is not orthonormal (R^T R is off by {error:.2g}); "
            "expected right, up and backward as unit columns. Is the matrix scaled or transposed?"
        )
    if float(torch.linalg.det(rotation)) < 0:
        raise ValueError(
            f"{name}: the rotation of its pose is a reflection; expected a right-handed frame, "
            "right x up = backward. An axis has the wrong sign."
        )
    if not torch.allclose(c2w[3], c2w.new_tensor([0.0, 0.0, 0.0, 1.0])):
        raise ValueError(
            f"{name}: the last row of its pose is {c2w[3].tolist()}; expected [0, 0, 0, 1]. "
            "Is the matrix transposed?"
        )


def check_intrinsics(intrinsics: Float[Tensor, "3 3"], name: str) -> None:
    """Check that a pinhole matrix is [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0.

    Raises:
        ValueError: naming ``name`` and the matrix.
    """
    (fx, skew, _), (zero, fy, _), last = intrinsics.tolist()
    finite = bool(torch.isfinite(intrinsics).all())
    if not finite or fx <= 0 or fy <= 0 or skew or zero or last != [0.0, 0.0, 1.0]:
        raise ValueError(
            f"{name}: its intrinsics are {intrinsics.tolist()}; expected "
            "[[fx, 0, cx], [0, fy, cy], [0, 0, 1]] in pixels with positive focal lengths."
        )
