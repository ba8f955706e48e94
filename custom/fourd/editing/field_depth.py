"""Depth of a field before it is edited: what warps between cameras see as the scene's surfaces.

Training changes the field, so depths are rendered before it starts and kept on disk. A file is
named by the field's weights and by the camera, so that neither another checkpoint nor another frame
list or size is ever taken for it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import threestudio
import torch
from jaxtyping import Float
from torch import Tensor, nn

from custom.fourd.data.video_scene import VideoScene
from custom.fourd.renderers.scene import Scene, SceneImages

LEAST_ALPHA = 0.5
"""Where a render is less opaque there is no surface, and depth is 0."""


def field_name(scene: Scene) -> str:
    """What tells one field's weights from another's."""
    digest = hashlib.sha256()
    for part in (scene.geometry, scene.material, scene.background, scene.renderer):
        for key, value in sorted(part.state_dict().items()) if isinstance(part, nn.Module) else ():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def render_row(
    scene: Scene, frames: VideoScene, row: int, samples_per_axis: int | None = None
) -> SceneImages:
    """A field as a frame's camera sees it at the frame's time; see `Scene.film`."""
    one = slice(row, row + 1)
    return scene.film(
        frames.c2w[one], frames.intrinsics[one], frames.height, frames.width,
        frames.frame_times[one], samples_per_axis=samples_per_axis,
    )  # fmt: skip


class FieldDepth:
    """Depths of frames, Euclidean distances along unit rays, 0 where there is no surface.

    Args:
        folder: where they are kept.
        field: see `field_name`.
        frames: the cameras.
        render: makes a row's images of the unedited field; None where there is none any more.
    """

    def __init__(
        self,
        folder: str | Path,
        field: str,
        frames: VideoScene,
        render: Callable[[int], SceneImages] | None,
    ) -> None:
        self.folder, self.field, self.frames = Path(folder), field, frames
        self.render = render

    def __call__(self, rows: Sequence[int]) -> Float[Tensor, "r h w"]:
        """Depths of some rows, from disk where they are there.

        Raises:
            ValueError: one is missing and the unedited field is gone.
        """
        return torch.stack([self._depth(int(row)) for row in rows])

    def prepare(self, rows: Sequence[int]) -> int:
        """Render what is missing; returns how many were."""
        missing = [int(row) for row in rows if self._read(int(row)) is None]
        for row in missing:
            self._depth(row)
        return len(missing)

    def path(self, row: int) -> Path:
        """The file of a row."""
        frames = self.frames
        digest = hashlib.sha256(f"{frames.height} {frames.width}".encode())
        for value in (frames.c2w[row], frames.intrinsics[row], frames.frame_times[row]):
            digest.update(value.contiguous().numpy().tobytes())
        camera, time = int(frames.camera_ids[row]), int(frames.time_ids[row])
        name = f"{self.field}-camera{camera:02d}-time{time:04d}-{digest.hexdigest()[:12]}.npy"
        return self.folder / name

    def _depth(self, row: int) -> Float[Tensor, "h w"]:
        depth = self._read(row)
        if depth is None:
            if self.render is None:
                raise ValueError(
                    f"{self.path(row)} is missing, and the field has been trained since; expected "
                    "the depths that the edit began with. Start a new edit from system.weights."
                )
            images = self.render(row)
            surface = images.depth * (images.alpha > LEAST_ALPHA)
            depth = surface[0, ..., 0].cpu().to(torch.float16)
            self._write(row, depth)
        return depth.float()

    def _read(self, row: int) -> Tensor | None:
        path = self.path(row)
        try:
            depth = torch.from_numpy(np.load(path, allow_pickle=False))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            threestudio.warn("%s is damaged (%s).", path, error)
            return None
        return depth if depth.shape == (self.frames.height, self.frames.width) else None

    def _write(self, row: int, depth: Tensor) -> None:
        path = self.path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.stem}.{os.getpid()}.part")
        with open(part, "wb") as file:
            np.save(file, depth.numpy())
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
