"""Videos decoded once into folders of pictures: made so that a stop at any moment loses nothing.

`video.mp4` becomes `frames_2x/video/000000.png`, ... beside it (2 is the downsampling), with a
`source.json` that says which video they are from and whether they are all there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import threestudio
from threestudio.utils.saving import replacing

from .video_frames import FrameSource, count_frames, decode_video, downsampled_size, resize_frame

RECORD = "source.json"


def prepared_folder(video: Path, downsample: float) -> Path:
    """Return where the decoded frames of a video belong."""
    return video.parent / f"frames_{downsample:g}x" / video.stem


def is_prepared(source: FrameSource) -> bool:
    """Return whether a source is a folder that `prepare` made, so already downsampled."""
    return (source.path / RECORD).is_file()


def prepared_sources(sources: list[FrameSource], downsample: float) -> list[FrameSource]:
    """Return the decoded frames of all videos, or the videos where any of them is not ready.

    Frames of another version of a video are not used, with one warning.
    """
    ready = []
    for source in sources:
        folder = prepared_folder(source.path, downsample)
        record = _read_record(folder)
        if source.pictures is not None or record is None or not record["complete"]:
            return sources
        if record["source"] != _identity(source.path):
            threestudio.warn(
                "%s was decoded from another version of %s; the video is read instead. Delete the "
                "folder and run prepare_video again.", folder, source.path,
            )  # fmt: skip
            return sources
        ready.append(FrameSource(folder))
        if ready[-1].n_frames != record["n_frames"]:
            raise ValueError(
                f"{folder} holds {ready[-1].n_frames} pictures, but its {RECORD} says "
                f"{record['n_frames']}. Delete the folder and run prepare_video again."
            )
    return ready


def prepare(
    video: Path, downsample: float = 1.0, report: Callable[[int, int], None] | None = None
) -> Path:
    """Decode a video into its folder of PNG files; frames that are there already are kept.

    Each file appears whole or not at all, and `source.json` says complete at the very end.

    Args:
        video: the file.
        downsample: frames get int(size / downsample) pixels.
        report: called with (frames done, frames in all; 0 if the video does not tell).

    Returns:
        the folder.

    Raises:
        ValueError: the video is cut or unreadable, or the folder holds something else.
    """
    from PIL import Image

    folder = prepared_folder(video, downsample)
    record = {"source": _identity(video), "downsample": downsample, "complete": False}
    known = _read_record(folder)
    if known is None and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds files, but no {RECORD} of this script; expected a new or empty folder."
        )
    if known is not None and known["source"] != record["source"]:
        raise ValueError(
            f"{folder} was decoded from another version of {video}. Delete the folder to decode "
            "this one."
        )
    if known is not None and known["complete"]:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_record(folder, record)
    total, count = count_frames(video), 0
    for picture in decode_video(video):
        path = folder / f"{count:06d}.png"
        if not path.exists():
            size = downsampled_size(*picture.shape[:2], downsample)
            with replacing(path) as temporary:
                Image.fromarray(resize_frame(picture, *size)).save(temporary, compress_level=1)
        count += 1
        if report:
            report(count, total)
    _write_record(folder, record | {"complete": True, "n_frames": count})
    return folder


def _identity(video: Path) -> dict[str, Any]:
    status = video.stat()
    return {"name": video.name, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise ValueError(f"{folder / RECORD} is no JSON ({error}); delete the folder.") from error


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with replacing(folder / RECORD) as temporary:
        Path(temporary).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
