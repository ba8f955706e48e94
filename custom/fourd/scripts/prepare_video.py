"""Decode the videos of a scene into pictures, once, so that every later start reads them at once.

    python -m custom.fourd.scripts.prepare_video data/coffee_martini --downsample 2

SOURCE is a video or a folder of videos; frames go to `frames_2x/<video>/` beside it. Stop it at any
moment: the same command goes on where it stopped. A cut video is refused and named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from custom.fourd.data.prepared_frames import prepare
from custom.fourd.data.video_frames import VIDEOS, list_videos


def prepare_all(
    source: Path, downsample: float, report: Callable[[Path, int, int], None]
) -> list[Path]:
    """Decode a video or all videos of a folder, in order of names; see `prepare`.

    Raises:
        ValueError: nothing is there to decode, or see `prepare`.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist; expected a video or a folder of videos.")
    videos = list_videos(source) if source.is_dir() else [source]
    if not videos:
        raise ValueError(f"{source} holds no video; expected files ending in {', '.join(VIDEOS)}.")
    folders = []
    for video in videos:
        report(video, 0, 0)
        folders.append(
            prepare(video, downsample, lambda done, total, v=video: report(v, done, total))
        )
    return folders


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 1 after a refusal, whose sentence it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="a video, or a folder of videos")
    parser.add_argument("--downsample", type=float, default=1.0, help="divide sizes by this")
    arguments = parser.parse_args(argv)
    try:
        folders = _with_progress(arguments.source, arguments.downsample)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(folders)} videos are ready in {folders[0].parent}")
    return 0


def _with_progress(source: Path, downsample: float) -> list[Path]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn()
    ) as progress:
        tasks: dict[Path, int] = {}

        def report(video: Path, done: int, total: int) -> None:
            if video not in tasks:
                tasks[video] = progress.add_task(video.name, total=None)
            if total or done:
                progress.update(tasks[video], completed=done, total=total or None)

        return prepare_all(source, downsample, report)


if __name__ == "__main__":
    sys.exit(main())
