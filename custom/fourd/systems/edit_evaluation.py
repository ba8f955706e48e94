"""What an edited scene is measured by: the true edited world where there is one, else itself.

Where data and instruction are of the world, every figure is against the truth: `psnr` on the
held-out camera over all times, how far renders of neighbouring times differ along the true motion
(`temporal_error`), and of neighbouring cameras along the true depth (`view_error`), each beside the
value that the truth itself has. Elsewhere motion is that of the original frames, estimated, and
what is compared with the unedited frames is named so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import threestudio
import torch
from torch import Tensor

from custom.fourd.editing.buffer import EditBuffer
from custom.fourd.editing.field_depth import render_row
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.metrics.warp_consistency import mean_of, warped_difference
from custom.fourd.ops.flow_warp import FlowCheck, valid_flow
from custom.fourd.ops.optical_flow import estimate_both, make_flow_estimator

from .edit_truth import EditTruth, find_truth

N_ANSWER_VIEWS, N_TRAIN_VIEWS, MAX_PAIRS = 4, 8, 64


class EditEvaluation:
    """Mixin of `Instruct4dSystem` with what it does outside of training.

    Uses of the system: `scene`, `_frames`, `edit_buffer`, those of `ReconstructionEvaluation`.
    """

    truth: EditTruth | None = None
    """The true edited world, from the first validation or test on; None where there is none."""
    _truth_is_sought = False

    def _seek_truth(self) -> None:
        if self._truth_is_sought:
            return
        self._truth_is_sought = True
        root = self.trainer.datamodule.cfg.dataroot
        instruction = str(self.cfg.prompt_processor.get("instruction", ""))
        self.truth = find_truth(root, self._frames, instruction)

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._seek_truth()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As of the field, with the true edited frame in the unedited one's place."""
        super().validation_step(self._with_truth(batch), batch_idx)

    def on_test_start(self) -> None:
        super().on_test_start()
        self._seek_truth()
        if self.truth is not None and len(self.truth.answers) > 1:
            rows = self._frames.eval_rows()
            spread = torch.linspace(0, len(rows) - 1, min(N_ANSWER_VIEWS, len(rows))).round().long()
            chosen = rows[spread].tolist()
            self.truth.choose(chosen, torch.cat([self._render_row(row) for row in chosen]))

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As of the field, with the true edited frame in the unedited one's place."""
        super().test_step(self._with_truth(batch), batch_idx)

    def _with_truth(self, batch: dict[str, Any]) -> dict[str, Any]:
        # Depth came with the unedited frames.
        batch = {key: value for key, value in batch.items() if key != "depth"}
        if self.truth is not None:
            batch["rgb"] = self.truth.render(int(batch["rows"][0])).to(batch["rgb"])
        return batch

    def _metrics(self) -> dict[str, Any]:
        found = super()._metrics()
        rows = self._frames.eval_rows().tolist()
        renders = dict(zip(rows, (shown[0] for shown in self._tested.shown), strict=True))
        if self.truth is None:
            found = {f"{name}_to_unedited": value for name, value in found.items()}
            found |= self._consistency_by_estimate(renders)
        else:
            found |= self._against_truth(renders)
        return found | self._against_edits()

    def _tell(self, metrics: dict[str, Any]) -> None:
        if self.truth is None:
            threestudio.info(
                "edited scene: differs along time by %s (the original: %s)",
                metrics["temporal_error"], metrics["temporal_error_original"],
            )  # fmt: skip
            return
        threestudio.info(
            "edited scene against the true one: PSNR %.2f dB (unedited frames: %.2f); error along "
            "time %s of the truth's, between cameras %s",
            metrics["psnr"], metrics["psnr_unedited"], _times(metrics["temporal_error_ratio"]),
            _times(metrics["view_error_ratio"]),
        )  # fmt: skip

    # Against the true edited world

    def _against_truth(self, renders: dict[int, Tensor]) -> dict[str, Any]:
        truth, frames = self.truth, self._frames
        unedited = [
            float(psnr(frames.frames[row : row + 1].float() / 255, truth.render(row)))
            for row in renders
        ]
        found = {
            "answer": truth.answer.scene.caption,
            "style": truth.answer.style,
            "answers": len(truth.answers),
            "psnr_unedited": sum(unedited) / len(unedited),
        }
        in_time = list(_neighbours_in_time(frames, list(renders)))
        between = list(_neighbours_in_view(frames, list(renders)))
        for name, pairs in (("temporal_error", in_time), ("view_error", between)):
            ours, theirs = [], []
            for row, other in _spread(pairs):
                flow, is_visible = truth.flow(row, other)
                images = [self._image(renders, place)[None] for place in (row, other)]
                ours += warped_difference(*images, flow, is_visible).tolist()
                true = truth.render(row), truth.render(other)
                theirs += warped_difference(*true, flow, is_visible).tolist()
            found |= _beside(name, mean_of(ours), mean_of(theirs), "truth")
        return found

    # Against nothing but the frames

    def _consistency_by_estimate(self, renders: dict[int, Tensor]) -> dict[str, Any]:
        frames, ours, theirs = self._frames, [], []
        estimator = make_flow_estimator(self.edit_options.flow)
        for row, other in _spread(list(_neighbours_in_time(frames, list(renders)))):
            pair = [frames.frames[place].float() / 255 for place in (row, other)]
            flow, back = (part[None] for part in estimate_both(estimator, *pair))
            is_visible = valid_flow(flow, back, FlowCheck())
            images = (renders[row][None], renders[other][None])
            ours += warped_difference(*images, flow, is_visible).tolist()
            theirs += warped_difference(*(p[None] for p in pair), flow, is_visible).tolist()
        return _beside("temporal_error", mean_of(ours), mean_of(theirs), "original")

    def _against_edits(self) -> dict[str, Any]:
        """How well the field fits the edited training frames, where they are at hand."""
        buffer: EditBuffer | None = self.edit_buffer
        rows = self._frames.train_rows().tolist()
        if buffer is None:
            return {}
        chosen = [row for row in _spread(rows, N_TRAIN_VIEWS) if bool(buffer.version[row] > 0)]
        fits = [float(psnr(self._render_row(row), buffer.current([row]))) for row in chosen]
        return {
            "psnr_to_edits": mean_of(fits),
            "edited_share": buffer.edited_fraction(rows),
            "edits": len(buffer.journal()),
        }

    def _image(self, renders: dict[int, Tensor], row: int) -> Tensor:
        if row not in renders:
            renders[row] = self._render_row(row)[0]
        return renders[row]

    def _render_row(self, row: int) -> Tensor:
        return render_row(self.scene, self._frames, row).rgb.cpu()


def _neighbours_in_time(frames: Any, rows: list[int]) -> Iterator[tuple[int, int]]:
    """Frames that follow each other in one camera."""
    for row, other in zip(rows, rows[1:]):
        if frames.camera_ids[row] == frames.camera_ids[other]:
            yield row, other


def _neighbours_in_view(frames: Any, rows: list[int]) -> Iterator[tuple[int, int]]:
    """Each frame with that of the nearest other camera at its time."""
    for row in rows:
        same = (frames.time_ids == frames.time_ids[row]) & (
            frames.camera_ids != frames.camera_ids[row]
        )
        others = torch.nonzero(same).flatten()
        if len(others):
            offset = frames.c2w[others, :3, 3] - frames.c2w[row, :3, 3]
            yield row, int(others[offset.norm(dim=-1).argmin()])


def _spread(values: list, count: int = MAX_PAIRS) -> list:
    """At most so many of the values, evenly."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _beside(name: str, ours: float | None, theirs: float | None, whose: str) -> dict[str, Any]:
    ratio = ours / theirs if ours is not None and theirs else None
    return {name: ours, f"{name}_{whose}": theirs, f"{name}_ratio": ratio}


def _times(ratio: float | None) -> str:
    return "unknown" if ratio is None else f"{ratio:.2f} x"
