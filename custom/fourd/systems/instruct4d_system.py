"""Instruct 4D-to-4D (Mou et al. 2024): edit a moving scene with a sentence, `instruct4d-system`.

A field that was fitted to videos is trained on, while an image editor changes these videos frame by
frame: a plan says which frames are edited when, a worker edits them, a buffer keeps them, and every
training step takes its colours from the buffer as it then stands. Originals never change: they are
what edits are conditioned on, and where flow and depth come from.

Edits lie in the folder `edits` of the run as soon as they are made. A run that is killed and
resumed shows its field the same edits at the same steps.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import threestudio
import torch
from threestudio.launcher.guards import StoppedEarly
from threestudio.utils.checkpoint_schedule import CheckpointSchedule
from threestudio.utils.rng import experiment_seed
from torch import Tensor

from custom.fourd.data.flow_cache import CachedFlow
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.editing.buffer import EditBuffer, adopt_edits
from custom.fourd.editing.executor import ProcessRanks, Ranks, StopEditing, make_executor
from custom.fourd.editing.field_depth import FieldDepth, field_name, render_row
from custom.fourd.editing.options import EditConfig, edit_options
from custom.fourd.editing.plan import EditPlan, KeyRound, Window, make_plan
from custom.fourd.editing.schedule import make_schedule, steps_needed
from custom.fourd.editing.worker import EditSources
from custom.fourd.ops.optical_flow import make_flow_estimator

from .edit_evaluation import EditEvaluation
from .edit_reporter import EditReporter
from .video_reconstruction import VideoReconstruction

EDITS, DEPTH = "edits", "depth"
MEMORY_KEYS = ("chunk_size", "half_precision_weights", "enable_channels_last_format")
"""Keys of the guidance that change memory, not what an edit is."""
PACE_KEYS = (
    "executor", "device", "items_per_turn", "turn_interval_steps", "min_edit_fraction",
    "post_edit_steps", "preview_every", "flow_cache_dir",
)  # fmt: skip
"""Keys of the edit that say when and where, not what."""


@threestudio.register("instruct4d-system")
class Instruct4dSystem(EditEvaluation, VideoReconstruction):
    """Trains a fitted field on frames while they are edited by an instruction."""

    @dataclass
    class Config(VideoReconstruction.Config):
        edit: EditConfig = field(default_factory=EditConfig)
        """order, strengths, warps and pace of the edit"""

    cfg: Config
    edit_buffer: EditBuffer | None = None
    """The frames as they stand, in training and after it."""

    def configure(self) -> None:
        super().configure()
        self.edit_options = edit_options(self.cfg.edit)
        self._restored: dict[str, Any] = {}
        self._resume_step = 0
        self._executor = None
        self._edit_seconds = 0.0

    @property
    def _frames(self) -> VideoScene:
        """The frames that are edited, as they were filmed."""
        return self.trainer.datamodule.scene

    # Before training

    def setup(self, stage: str | None = None) -> None:
        """Load the edit model, where frames will be edited.

        Raises:
            ValueError: there is no fitted field to start from, or no instruction.
            ModelUnavailableError: the edit model cannot be had.
        """
        if stage == "fit" and not hasattr(self, "guidance"):
            if not self.resumed and not self.cfg.weights:
                raise ValueError(
                    "system.weights is empty; expected a field that was fitted to the same videos. "
                    "Give its checkpoint, or chain both: --config "
                    "custom/configs/instruct4d_train.yaml custom/configs/instruct4d_edit.yaml."
                )
            processor = threestudio.find(self.cfg.prompt_processor_type)(self.cfg.prompt_processor)
            self.prompt_processor = processor
            self.guidance = threestudio.find(self.cfg.guidance_type)(self.cfg.guidance)
            if self.edit_options.device is not None:
                self.guidance.move_to(torch.device(self.edit_options.device))
        super().setup(stage)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._restored = checkpoint.get("edit") or {}
        self._resume_step = int(checkpoint.get("global_step", 0))
        self._edit_seconds = float(self._restored.get("seconds", 0.0))

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        seconds = self._edit_seconds + (self._reporter.seconds if self._executor else 0.0)
        checkpoint["edit"] = {"field": self._field, "seconds": seconds}

    def on_fit_start(self) -> None:
        """Plan the edit, and extend the training where it is too short for it."""
        super().on_fit_start()
        scene, options = self._frames, self.edit_options
        rows = scene.train_rows()
        frames = list(
            zip(scene.camera_ids[rows].tolist(), scene.time_ids[rows].tolist(), strict=True)
        )
        self.edit_plan = make_plan(options, frames)
        self._ranks = ProcessRanks() if self.trainer.world_size > 1 else Ranks()
        loop = self.trainer.fit_loop.epoch_loop
        planned = max(1, loop.max_steps)
        self.edit_schedule = make_schedule(self.edit_plan, options, planned, self._ranks.size)
        needed = steps_needed(self.edit_schedule, options, planned)
        if needed > loop.max_steps:
            threestudio.info(
                "training is extended from %d to %d steps: edits run up to step %d",
                loop.max_steps, needed, needed - options.post_edit_steps,
            )  # fmt: skip
            loop.max_steps = needed
        threestudio.info(
            "the plan: %d edits of %d frames, %d before training", len(self.edit_plan.items),
            self.edit_plan.n_frames,
            sum(len(turn.items()) for turn in self.edit_schedule if turn.step == 0),
        )  # fmt: skip

    def on_train_start(self) -> None:
        """Edit what training waits for.

        Raises:
            ValueError: the folder holds another edit, or lacks what the checkpoint was trained on.
        """
        step = self._resume_step
        self._field = str(self._restored.get("field") or field_name(self.scene))
        self._write_plan()
        self.edit_buffer = EditBuffer(
            self._frames, self._edits_folder(), self._identity(), self._ranks.rank == 0
        )
        # A run that is killed while training waits must find something to resume.
        for callback in self.trainer.callbacks:
            if isinstance(callback, CheckpointSchedule) and step == 0:
                callback.save(self.trainer)
        self._reporter = EditReporter(self, self.edit_options.preview_every)
        self._executor = make_executor(
            self.edit_options, self.edit_schedule, self._sources(step), self._reporter, self._ranks
        )
        self._reporter.wait(self._executor.total)
        try:
            self._executor.begin(step)
        except StopEditing:
            raise StoppedEarly from None
        finally:
            self._reporter.train()

    def _sources(self, step: int) -> EditSources:
        frames, options = self._frames, self.edit_options
        folder = self.edit_buffer.folder / DEPTH
        # One ray per pixel: a mean over a silhouette is the depth of nothing.
        unedited = partial(render_row, self.scene, frames, samples_per_axis=1)
        depth = FieldDepth(folder, self._field, frames, unedited if step == 0 else None)
        if step == 0:
            depth.prepare(_rows_with_depth(self.edit_plan, frames, options.use_depth))
        flow = CachedFlow(make_flow_estimator(options.flow), options.flow_cache_dir)
        embeddings = self.prompt_processor.embeddings()
        return EditSources(
            self.guidance, embeddings, frames, self.edit_buffer, flow, depth, self._render_rows
        )

    def _render_rows(self, rows: list[int]) -> Tensor:
        return torch.cat([render_row(self.scene, self._frames, row).rgb for row in rows])

    def _edits_folder(self) -> Path:
        """The run's own folder of edits; where another run is continued, with what that one made.

        Raises:
            ValueError: the edits are not beside the checkpoint.
        """
        folder = Path(self.get_save_dir()).parent / EDITS
        if folder.exists() or not self._restored or self._ranks.rank != 0:
            return folder
        source = Path(self.trainer.ckpt_path).parent.parent / EDITS
        if source.is_dir():
            adopt_edits(source, folder)
        elif self._resume_step > 0:
            raise ValueError(
                f"{source} does not exist; the checkpoint {self.trainer.ckpt_path} was trained on "
                "the edits that its run keeps there. Resume from a checkpoint in its own folder."
            )
        return folder

    def _identity(self) -> dict[str, Any]:
        """What decides the edits."""
        options = {k: v for k, v in asdict(self.edit_options).items() if k not in PACE_KEYS}
        guidance = {k: v for k, v in self.guidance.cfg.items() if k not in MEMORY_KEYS}
        frames = self._frames.frames
        digest = hashlib.sha256(str(tuple(frames.shape)).encode())
        for row in (0, len(frames) // 2, len(frames) - 1):
            digest.update(frames[row].contiguous().numpy().tobytes())
        return {
            "instruction": self.prompt_processor.cfg.instruction,
            "edit": options,
            "guidance": {k: v if isinstance(v, (bool, int, float)) else str(v)
                         for k, v in guidance.items()},
            "plan": hashlib.sha256(str(self.edit_plan).encode()).hexdigest()[:16],
            "frames": digest.hexdigest()[:16],
            "field": self._field,
            "seed": experiment_seed(),
        }  # fmt: skip

    def _write_plan(self) -> None:
        self.save_with_writer(
            "edits/plan.txt",
            lambda path: Path(path).write_text(f"{self.edit_plan}\n", encoding="utf-8"),
        )

    # Training

    def on_train_batch_start(self, batch: dict, batch_idx: int, unused: int = 0) -> None:
        """Edit what is due, and give the batch the colours of the frames as they stand."""
        super().on_train_batch_start(batch, batch_idx, unused)
        self._executor.turn(self.global_step)
        if not self._executor.is_done and self.edit_options.executor == "threaded":
            loop = self.trainer.fit_loop.epoch_loop
            wanted = self.global_step + 1 + self.edit_options.post_edit_steps
            loop.max_steps = max(loop.max_steps, wanted)
        # Batches are drawn ahead of time, when an edit may still have been missing.
        batch["rgb"] = self.edit_buffer.colors(batch["index"], batch["pixels"]).to(batch["rgb"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One step on rays with the colours that they have after the edits so far."""
        self.log("train/edits_done", float(self._executor.done))
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        super().on_train_end()
        if self._executor is not None and not self.trainer.should_stop:
            self._executor.finish()
        elif self._executor is not None:
            self._executor.cancel()

    def on_exception(self, exception: BaseException) -> None:
        """Let no thread outlive the training."""
        super().on_exception(exception)
        if self._executor is not None:
            self._executor.cancel()

    def _circumstances(self) -> dict[str, Any]:
        seconds = self._edit_seconds + (self._reporter.seconds if self._executor else 0.0)
        return super()._circumstances() | {
            "instruction": str(self.cfg.prompt_processor.get("instruction", "")),
            "order": self.edit_options.order,
            "edit_seconds": round(seconds, 2) or None,
        }


def _rows_with_depth(plan: EditPlan, frames: VideoScene, use_depth: bool) -> list[int]:
    """Rows whose depth some item of the plan asks for."""
    wanted: set[tuple[int, int]] = set()
    for item in plan.items if use_depth else ():
        if isinstance(item, KeyRound) and len(item.writes()) > 1:
            wanted.update(item.writes())
        elif isinstance(item, Window) and item.key_cameras:
            wanted.update(item.frames())
            wanted.update((camera, time) for camera in item.key_cameras for time in item.times)
    known = {
        pair: row
        for row, pair in enumerate(
            zip(frames.camera_ids.tolist(), frames.time_ids.tolist(), strict=True)
        )
    }
    return sorted(known[pair] for pair in wanted if pair in known)
