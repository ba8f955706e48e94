"""Frames from videos and from folders of pictures, whole or refused.

Legend: T frames of h x w pixels, uint8 sRGB, row 0 at the top.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
_RANGE = re.compile(r"^range\(\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*)?(?:,\s*(-?\d+)\s*)?\)$")
_SLICE = re.compile(r"^(\d*)\s*:\s*(\d*)(?:\s*:\s*(\d+))?$")


def natural_order(path: str | Path) -> list[tuple[int, int | str]]:
    """Return a key that sorts `2.png` before `10.png`: runs of digits compare as numbers."""
    parts = re.split(r"(\d+)", Path(path).name)
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts if part]


def list_pictures(folder: Path) -> list[Path]:
    """Return the pictures of a folder in natural order; hidden files are none."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    return sorted((path for path in found if path.name[0] != "."), key=natural_order)


def list_videos(folder: Path) -> list[Path]:
    """Return the videos of a folder in natural order; hidden files are none."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in VIDEOS]
    return sorted((path for path in found if path.name[0] != "."), key=natural_order)


def parse_frame_list(value: str | Sequence[int] | int | None, n_frames: int, key: str) -> list[int]:
    """Return which frames of a video to use, read literally: nothing is run as code.

    Args:
        value: None for all; an integer for the first so many; a list; or its text: "[0, 5, 9]",
            "180:230" (start and stop of a slice, with an optional step) or "range(180, 230)".
        n_frames: frames that the video holds.
        key: where the value stands in the config, for messages.

    Raises:
        ValueError: the text is none of these, or a frame is missing or named twice.
    """
    if isinstance(value, str):
        value = _parse_text(value.strip(), n_frames, key)
    if value is None:
        chosen = list(range(n_frames))
    elif isinstance(value, int) and not isinstance(value, bool):
        chosen = list(range(value))
    else:
        chosen = list(value)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise ValueError(f"{key} is {value!r}; expected whole numbers, at least one.")
    outside = [index for index in chosen if not 0 <= index < n_frames]
    if outside:
        raise ValueError(
            f"{key} asks for frame {outside[0]}; the video has {n_frames} frames, 0 to "
            f"{n_frames - 1}."
        )
    falls = [b for a, b in zip(chosen, chosen[1:]) if b <= a]
    if falls:
        raise ValueError(
            f"{key} names frame {falls[0]} after a later one or twice; expected frames that grow, "
            "since their order is time."
        )
    return chosen


def _parse_text(text: str, n_frames: int, key: str) -> list[int] | int | None:
    whole, part = _RANGE.match(text), _SLICE.match(text)
    if whole:
        return list(range(*(int(group) for group in whole.groups() if group is not None)))
    if part:
        start, stop, step = (int(group) if group else None for group in part.groups())
        stop = n_frames if stop is None else stop
        return list(range(start or 0, stop, step or 1))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if not isinstance(value, (list, tuple, int)):
        raise ValueError(
            f"{key} is {text!r}; expected a list such as [0, 5, 9], a slice 180:230, or "
            "range(180, 230)."
        )
    return list(value) if isinstance(value, tuple) else value


def count_frames(path: Path) -> int:
    """Return how many frames a video's index lists; 0 where the container does not tell.

    Raises:
        ValueError: the file is no readable video, or shorter than its own boxes say.
    """
    import av

    _check_boxes(path)
    try:
        with av.open(str(path)) as container:
            return int(_video_stream(container, path).frames)
    except av.error.FFmpegError as error:
        raise ValueError(_unreadable(path, error)) from error


def _check_boxes(path: Path) -> None:
    """Find a cut mp4 without decoding: its top-level boxes state their lengths."""
    if path.suffix.lower() not in (".mp4", ".mov", ".m4v"):
        return
    at, size = 0, path.stat().st_size
    with path.open("rb") as file:
        while at + 8 <= size:
            file.seek(at)
            header = file.read(16)
            if at == 0 and header[4:8] != b"ftyp":
                return
            length = int.from_bytes(header[:4], "big")
            if length == 1:
                length = int.from_bytes(header[8:16], "big")
            if length == 0:
                return
            at += max(length, 8)
    if at and at != size:
        raise ValueError(
            f"{path} is cut: it has {size} bytes, and its boxes go on to {max(at, size)}. Copy the "
            "file again."
        )


def decode_video(path: Path) -> Iterator[np.ndarray]:
    """Yield a video's frames [h w 3] in order, turned upright as its metadata says.

    Raises:
        ValueError: see `decode_timed`.
    """
    for _, picture in decode_timed(path):
        yield picture


def decode_timed(path: Path) -> Iterator[tuple[float | None, np.ndarray]]:
    """Yield (when it is shown, in seconds; None if the file does not tell) and each frame [h w 3].

    Frames come in order, turned upright as the file's metadata says.

    Raises:
        ValueError: the file is no readable video, or it is cut: decoding fails, or fewer frames
            come out than its index lists. The message names the file and how far it got.
    """
    import av

    done = 0
    try:
        with av.open(str(path)) as container:
            stream = _video_stream(container, path)
            # The index also lists what an edit list hides; a cut file loses its end.
            listed = int(stream.frames)
            for frame in container.decode(stream):
                picture = frame.to_ndarray(format="rgb24")
                turns = round(getattr(frame, "rotation", 0) / 90) % 4
                yield frame.time, np.ascontiguousarray(np.rot90(picture, turns))
                done += 1
    except av.error.FFmpegError as error:
        raise ValueError(_unreadable(path, error, done)) from error
    if done == 0 or done < listed:
        raise ValueError(
            f"{path} is cut: {done} of its {listed} frames can be decoded. Copy the file again."
        )


def _video_stream(container, path: Path):
    if not container.streams.video:
        raise ValueError(f"{path} holds no video stream; expected a video such as an mp4.")
    return container.streams.video[0]


def _unreadable(path: Path, error: Exception, done: int = 0) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return (
        f"{path} is no whole video: decoding stopped after {done} frames ({reason}). Is the file "
        "cut? Copy it again."
    )


def read_picture(path: Path) -> np.ndarray:
    """Return a picture as [h w 3] uint8, or [h w 4] where it has an alpha channel.

    Raises:
        ValueError: the file is no whole picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            mode = "RGBA" if "A" in picture.getbands() or "transparency" in picture.info else "RGB"
            return np.asarray(picture.convert(mode))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing; expected a picture there.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no whole picture ({error}); copy it again.") from error


def downsampled_size(height: int, width: int, downsample: float) -> tuple[int, int]:
    """Return (int(h / downsample), int(w / downsample)), the size that releases use.

    Raises:
        ValueError: nothing would be left, or downsample is below 1.
    """
    size = int(height / downsample), int(width / downsample)
    if downsample < 1 or min(size) < 1:
        raise ValueError(
            f"downsample is {downsample} for frames of {height} x {width}; expected at least 1 "
            "and at most the smaller side."
        )
    return size


def resize_frame(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture at another size, by Lanczos' filter with its support scaled."""
    if picture.shape[:2] == (height, width):
        return picture
    from PIL import Image

    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def over_background(picture: np.ndarray, background: Sequence[float]) -> np.ndarray:
    """Return [h w 3]: a picture with alpha laid over a colour in [0, 1]; others as they are."""
    if picture.shape[-1] == 3:
        return picture
    alpha = picture[..., 3:].astype(np.float32) / 255.0
    colour = 255.0 * np.asarray(background, dtype=np.float32)
    mixed = picture[..., :3] * alpha + colour * (1.0 - alpha)
    return np.rint(mixed).astype(np.uint8)


class FrameSource:
    """The frames of one camera: a video, or a folder of pictures.

    Args:
        path: a video file, or a folder with pictures in natural order.
        background: colour in [0, 1] behind pictures that have an alpha channel.

    Raises:
        ValueError: nothing is there to read.
    """

    def __init__(self, path: Path, background: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        self.path, self.background = Path(path), background
        self.pictures = list_pictures(self.path) if self.path.is_dir() else None
        if self.pictures is None and not self.path.is_file():
            raise ValueError(f"{self.path} is missing; expected a video or a folder of pictures.")
        if self.pictures == []:
            raise ValueError(f"{self.path} holds no picture; expected {', '.join(PICTURES)} files.")
        self.n_frames = count_frames(self.path) if self.pictures is None else len(self.pictures)

    @property
    def name(self) -> str:
        """Of the camera: the file's or folder's name without its ending."""
        return self.path.name if self.pictures is not None else self.path.stem

    def frame_name(self, index: int) -> str:
        """Return what to call a frame in a message."""
        return str(self.pictures[index]) if self.pictures else f"{self.path} frame {index}"

    def first_size(self) -> tuple[int, int]:
        """Return (height, width) of the first frame, in pixels."""
        first = next(self.frames(range(1)))
        return first.shape[0], first.shape[1]

    def frames(self, chosen: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Yield the chosen frames [h w 3] uint8 in order, all of one size.

        A video is decoded up to the last frame asked for.

        Raises:
            ValueError: a frame is unreadable, missing, or of another size than the first.
        """
        size: tuple[int, int] | None = None
        for index, picture in self._decoded(chosen):
            size = size or picture.shape[:2]
            if picture.shape[:2] != size:
                raise ValueError(
                    f"{self.frame_name(index)} is {picture.shape[1]} x {picture.shape[0]} pixels; "
                    f"expected {size[1]} x {size[0]} like the first frame of {self.path}."
                )
            yield picture

    def _decoded(self, chosen: Sequence[int] | None) -> Iterator[tuple[int, np.ndarray]]:
        if self.pictures is not None:
            for index in range(len(self.pictures)) if chosen is None else chosen:
                picture = read_picture(self.pictures[index])
                yield index, over_background(picture, self.background)
            return
        wanted = None if chosen is None else set(chosen)
        last = max(wanted, default=-1) if wanted is not None else None
        for index, picture in enumerate(decode_video(self.path)):
            if wanted is None or index in wanted:
                yield index, picture
            if index == last:
                return


def read_frames(
    source: FrameSource, chosen: Sequence[int], height: int, width: int
) -> UInt8[Tensor, "T h w 3"]:
    """Return the chosen frames of a camera at a size in pixels.

    Raises:
        ValueError: see `FrameSource.frames`.
    """
    frames = torch.empty((len(chosen), height, width, 3), dtype=torch.uint8)
    row = 0
    for row, picture in enumerate(source.frames(chosen), start=1):
        frames[row - 1] = torch.from_numpy(resize_frame(picture, height, width).copy())
    if row != len(chosen):
        raise ValueError(
            f"{source.path} gave {row} of the {len(chosen)} frames asked for, up to frame "
            f"{chosen[-1]}; the video is shorter than the others or cut."
        )
    return frames
