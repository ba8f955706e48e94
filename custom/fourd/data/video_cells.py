"""Cells of one video, of a folder of pictures or of a single picture: one camera, many times."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from .pair_cells import CellSource, OrbitCameras
from .video_frames import PICTURES, FrameSource, decode_timed, parse_frame_list, read_picture

FITS = ("crop", "pad")


class VideoCells(CellSource):
    """Frames of a standing camera, resized once when prepared.

    Times are those at which frames are shown, however unevenly, the first 0 and the last 1; those
    of pictures are even. Pictures may have an alpha channel; videos are opaque.

    Args:
        path: a video, a folder of pictures in natural order, or a picture.
        camera: what is said of the camera, which the frames do not tell.
        frames: which frames, see `parse_frame_list`; None for all.
        fit: how a frame of another shape becomes h x w: "crop" cuts the middle out, "pad" adds
            transparent margins.
        max_bytes: longer videos lie in a temporary file, of which the system keeps in memory what
            it has room for.
        scene_id, height, width: see `CellSource`.

    Raises:
        ValueError: nothing is there, the file is cut or no video, or a frame is missing.
    """

    is_slow = False

    def __init__(
        self,
        path: Path,
        scene_id: str,
        camera: OrbitCameras,
        height: int,
        width: int,
        frames: Any = None,
        fit: str = "crop",
        max_bytes: int = 2**28,
    ) -> None:
        self.path, self.fit, self.max_bytes = path, fit, max_bytes
        self._listed = frames
        if path.is_file() and path.suffix.lower() in PICTURES:
            self._pictures, self._n_frames = [path], 1
        else:
            source = FrameSource(path)
            self._pictures, self._n_frames = source.pictures, source.n_frames
        if self._n_frames:
            parse_frame_list(frames, self._n_frames, f"frames of {path}")
        super().__init__(scene_id, "", torch.zeros(1), camera, height, width)

    def prepare(self) -> None:
        """Read and resize the frames.

        Raises:
            ValueError: the video is cut, a picture is broken, or sizes differ.
        """
        # Some containers do not say how many frames they hold.
        count = self._n_frames or sum(1 for _ in decode_timed(self.path))
        chosen = parse_frame_list(self._listed, count, f"frames of {self.path}")
        shape = (len(chosen), self.height, self.width, 4)
        self._cells = new_store(shape, self.max_bytes)
        seconds: list[float | None] = []
        size: tuple[int, int] | None = None
        for place, (second, picture) in enumerate(self._frames(chosen)):
            size = size or picture.shape[:2]
            if picture.shape[:2] != size:
                raise ValueError(
                    f"frame {chosen[place]} of {self.path} is {picture.shape[1]} x "
                    f"{picture.shape[0]} pixels; expected {size[1]} x {size[0]} like the first."
                )
            self._cells[place] = fitted_cell(picture, self.height, self.width, self.fit)
            seconds.append(second)
        if len(seconds) != len(chosen):
            raise ValueError(
                f"{self.path} gave {len(seconds)} of the {len(chosen)} frames asked for; it is "
                "shorter than its index says. Copy the file again."
            )
        self.frame_times = shown_times(seconds)
        super().prepare()

    def read_cell(self, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Return a frame."""
        return torch.from_numpy(np.array(self._cells[time_id]))

    def _frames(self, chosen: list[int]) -> Iterator[tuple[float | None, np.ndarray]]:
        if self._pictures is not None:
            for index in chosen:
                yield None, read_picture(self._pictures[index])
            return
        wanted = set(chosen)
        for index, timed in enumerate(decode_timed(self.path)):
            if index in wanted:
                yield timed


def new_store(shape: tuple[int, ...], max_bytes: int) -> np.ndarray:
    """Return an array of bytes: in memory up to ``max_bytes``, else in a temporary file."""
    if int(np.prod(shape)) <= max_bytes:
        return np.zeros(shape, dtype=np.uint8)
    # The file has no name any more, and goes with the array.
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype=np.uint8, mode="w+", shape=shape)


def shown_times(seconds: list[float | None]) -> Tensor:
    """Return when frames are shown, from 0 to 1 [t]; evenly where seconds are missing or fall."""
    count = len(seconds)
    known = [second for second in seconds if second is not None]
    grow = all(b > a for a, b in zip(known, known[1:]))
    if len(known) < count or not grow:
        return torch.arange(count) / max(1, count - 1)
    times = torch.tensor(known, dtype=torch.float64)
    return ((times - times[0]) / (times[-1] - times[0]).clamp_min(1e-9)).float()


def fitted_cell(
    picture: UInt8[np.ndarray, "ph pw channels"], height: int, width: int, fit: str
) -> UInt8[np.ndarray, "h w 4"]:
    """Return a picture with 3 or 4 channels as a cell: colour times alpha, and alpha.

    The aspect is kept; Lanczos' filter with its support scaled.
    """
    from PIL import Image

    whole = picture.shape[:2]
    alpha = picture[..., 3] if picture.shape[-1] == 4 else np.full(whole, 255, np.uint8)
    colour = picture[..., :3]
    if picture.shape[-1] == 4:
        colour = np.rint(colour * (alpha[..., None] / 255.0)).astype(np.uint8)
    scale = (max if fit == "crop" else min)(height / whole[0], width / whole[1])
    inner = [
        min(size, max(1, round(side * scale)))
        for side, size in zip(whole, (height, width), strict=True)
    ]
    spare = [side - part / scale for side, part in zip(whole, inner, strict=True)]
    # Whole pixels where nothing is scaled, so that a crop changes no value.
    margin = [max(0.0, s / 2 if scale != 1 else s // 2) for s in spare]
    spare = [max(0.0, s) for s in spare]
    far = [side - s + m for side, s, m in zip(whole, spare, margin, strict=True)]
    box = (margin[1], margin[0], far[1], far[0])
    cell = np.zeros((height, width, 4), dtype=np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    at = np.s_[top : top + inner[0], left : left + inner[1]]
    for channels, values in ((np.s_[..., :3], colour), (np.s_[..., 3], alpha)):
        image = Image.fromarray(np.ascontiguousarray(values))
        if inner != list(whole):
            image = image.resize((inner[1], inner[0]), Image.Resampling.LANCZOS, box=box)
        cell[at][channels] = np.asarray(image)
    return cell
