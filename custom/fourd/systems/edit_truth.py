"""The true edited world of an instruction, where data and instruction are of the world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import threestudio
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from custom.fourd.data.video_scene import VideoScene
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.world.capture import RECORD, WorldCapture, read_truth
from custom.fourd.world.edits import EditedScene, EditError, parse_instruction
from custom.fourd.world.render import flow as true_flow

LEAST_AGREEMENT_DB = 22.0
"""Frames that agree less with what `world.json` says were filmed otherwise. Another moment of a
scene has up to 20 dB; the same one at half of 24 pixels, which another filter shrank, has 24."""


@dataclass
class EditTruth:
    """What frames show after an edit; an instruction may have several answers."""

    capture: WorldCapture
    frames: VideoScene
    answers: tuple[EditedScene, ...]
    world_from_scene: Float[Tensor, "4 4"] | None = None
    """Similarity that takes the frames' world to the true one; None where they are equal"""
    chosen: int = 0
    """The answer that figures are measured against"""

    @property
    def answer(self) -> EditedScene:
        """The chosen one."""
        return self.answers[self.chosen]

    def render(self, row: int, answer: EditedScene | None = None) -> Float[Tensor, "1 h w 3"]:
        """The true edited image of a frame's camera and time."""
        c2w, fovy, time = self._camera(row)
        return (answer or self.answer).render(
            c2w, fovy, self.frames.height, self.frames.width, time,
            torch.tensor(self.capture.background),
        ).rgb  # fmt: skip

    def flow(self, row: int, other: int) -> tuple[Float[Tensor, "1 2 h w"], Bool[Tensor, "1 h w"]]:
        """The edited surface's motion from one frame to another, in pixels, and where it is seen.

        Between cameras at one time this is parallax by the true depth.
        """
        here, there = self._camera(row), self._camera(other)
        found = true_flow(self.answer.scene, *here, *there, self.frames.height, self.frames.width)
        return found.optical.movedim(-1, 1), found.is_visible

    def choose(self, rows: list[int], images: Float[Tensor, "r h w 3"]) -> None:
        """Take the answer that renders of some rows are nearest to."""
        scores = [
            float(psnr(images, torch.cat([self.render(row, answer) for row in rows])).mean())
            for answer in self.answers
        ]
        self.chosen = max(range(len(scores)), key=scores.__getitem__)

    def agrees(self, row: int) -> bool:
        """Whether the unedited frame is what the world shows there."""
        truth = self.render(row, EditedScene(self.capture.scene))
        seen = self.frames.frames[row : row + 1].float() / 255
        return float(psnr(seen, truth)) >= LEAST_AGREEMENT_DB

    def _camera(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pose in the world, vertical field of view, and time of a frame."""
        frames = self.frames
        c2w = frames.c2w[row]
        if self.world_from_scene is not None:
            c2w = self.world_from_scene @ c2w
            c2w = torch.cat((torch.nn.functional.normalize(c2w[:, :3], dim=0), c2w[:, 3:]), dim=1)
        fovy = 2 * torch.atan(0.5 * frames.height / frames.intrinsics[row, 1, 1])
        return c2w[None], fovy[None], frames.frame_times[row : row + 1]


def find_truth(dataroot: str | Path, frames: VideoScene, instruction: str) -> EditTruth | None:
    """Return the true edited world, or None, with a line where the world cannot tell.

    Args:
        dataroot: the folder or video that the frames were read from.
        frames: its frames.
        instruction: of the edit.
    """
    path = Path(dataroot).expanduser()
    record = path / RECORD if path.is_dir() else path.with_name(f"{path.stem}.{RECORD}")
    if not record.is_file():
        return None
    capture = read_truth(record)
    try:
        answers = parse_instruction(instruction).answers(capture.scene)
    except EditError as error:
        threestudio.info("no truth to measure against: %s", error)
        return None
    rows = frames.eval_rows().tolist()
    is_whole = len(frames.times()) == len(set(capture.time_ids.tolist()))
    # Some formats keep the true world in their files, others in what readers make of them.
    for similarity in (frames.file_from_scene, None):
        truth = EditTruth(capture, frames, answers, similarity)
        if is_whole and all(truth.agrees(row) for row in (rows[0], rows[-1])):
            return truth
    threestudio.info(
        "no truth to measure against: the frames are not those of %s (is it a selection?)",
        record.name,
    )
    return None
