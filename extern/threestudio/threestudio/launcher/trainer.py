"""Runs one stage: builds data module and system, hands them to Lightning, keeps the run safe."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

import threestudio
from threestudio.launcher.guards import (
    NonFiniteGuard,
    SeedGlobalGenerators,
    StopOnRequest,
    StoppedEarly,
)
from threestudio.launcher.progress import RunProgress
from threestudio.launcher.quiet import silence_lightning
from threestudio.launcher.ranks import share_among_ranks
from threestudio.launcher.run_logs import make_loggers, make_monitors
from threestudio.launcher.signals import INTERRUPTED, StopSignals, folder_lock
from threestudio.launcher.starting_point import has_weights
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.callbacks import CodeSnapshotCallback, ConfigSnapshotCallback
from threestudio.utils.checkpoint import find_newest_checkpoint, load_checkpoint
from threestudio.utils.checkpoint_schedule import AtomicCheckpointIO, CheckpointSchedule
from threestudio.utils.config import config_to_primitive
from threestudio.utils.misc import find_last_path, get_rank
from threestudio.utils.redaction import redact, redact_tree
from threestudio.utils.rng import seed_global_generators, set_experiment_seed

MODES = ("train", "validate", "test", "export")
# Global generators before the first step: the initial weights of modules that draw from them.
_CONSTRUCTION = -1


@dataclass
class StageResult:
    """What a stage leaves behind.

    Attributes:
        trial_dir: its output folder.
        last_checkpoint: its newest checkpoint; None if it wrote none (evaluation runs).
    """

    trial_dir: Path
    last_checkpoint: Path | None


def run_stage(
    cfg: Any,
    mode: str,
    argv: Sequence[str] = (),
    verbose: bool = False,
    config_path: str | Path | None = None,
) -> StageResult:
    """Run one stage to its end.

    Args:
        cfg: an `ExperimentConfig` as `load_config` returns it; ``cfg.trial_dir`` is the output
            folder. ``cfg.resume`` is a checkpoint, a folder of checkpoints, or "auto" for the
            newest in ``trial_dir``.
        mode: "train" (ends with the test), "validate", "test" or "export".
        argv: the command line, for the record and to find the config file.
        verbose: let Lightning speak.
        config_path: the config file, copied to ``configs/raw.yaml``; by default the one that
            ``--config`` names in ``argv``.

    Raises:
        SystemExit: with 130 after Ctrl-C (saved and rendered) or 143 after SIGTERM (saved).
        ValueError: unknown mode, evaluation without weights, an unfit or damaged checkpoint, or a
            loss that is not finite (`NonFiniteError`).
        FileNotFoundError: a checkpoint that does not exist.
        OSError: the output folder cannot be written, or is in use by another training.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    silence_lightning(verbose)
    trial_dir = Path(cfg.trial_dir)
    with ExitStack() as stack:
        signals = stack.enter_context(StopSignals())
        if get_rank() == 0:
            _check_writable(trial_dir)
            if mode == "train":
                stack.enter_context(folder_lock(trial_dir))
                _sweep_save_folder(trial_dir / "save")
        resume = _resolve_resume(cfg, mode)
        run = _Run(cfg, mode, trial_dir, resume, signals)
        run.build()
        if mode == "train":
            run.train(list(argv), config_path or _config_of(argv))
        else:
            run.evaluate()
    if signals.requested:
        raise SystemExit(signals.exit_code)
    return StageResult(trial_dir, run.last_checkpoint)


class _Run:
    """The parts of one stage, while it runs."""

    def __init__(
        self, cfg: Any, mode: str, trial_dir: Path, resume: Path | None, signals: StopSignals
    ) -> None:
        self.cfg = cfg
        self.mode = mode
        self.trial_dir = trial_dir
        self.resume = resume
        self.signals = signals
        self.last_checkpoint: Path | None = None

    def build(self) -> None:
        """Build data module and system, from the config's seed alone."""
        set_experiment_seed(int(self.cfg.seed))
        seed_global_generators(_CONSTRUCTION)
        self.datamodule = threestudio.find(self.cfg.data_type)(self.cfg.data)
        system_cfg = self.cfg.system
        if self.resume is not None and system_cfg.get("weights"):
            # The checkpoint replaces them, and their file may be gone by now.
            system_cfg = OmegaConf.merge(system_cfg, {"weights": None})
        self.system = threestudio.find(self.cfg.system_type)(
            system_cfg, resumed=self.resume is not None
        )
        self.system.set_save_dir(str(self.trial_dir / "save"))
        self.system.profile = str(self.cfg.get("profile", ""))
        self.system.profile_is_builtin = bool(self.cfg.get("profile_is_builtin", False))

    def train(self, argv: list[str], config_path: Path | None) -> None:
        """Fit, then test with the weights in memory."""
        if get_rank() == 0:
            _write_command(self.trial_dir, argv)
        options = _trainer_options(self.cfg)
        guard = NonFiniteGuard(options.pop("non_finite_policy", "stop"))
        schedule = None
        if options.pop("enable_checkpointing", True):
            schedule = CheckpointSchedule(
                self.trial_dir / "ckpts", self._metadata(), self.cfg.checkpoint
            )
        callbacks = [
            StopOnRequest(self.signals, schedule), guard, SeedGlobalGenerators(self.datamodule),
            CodeSnapshotCallback(str(self.trial_dir / "code"), use_version=False),
            ConfigSnapshotCallback(
                config_path, self.cfg, str(self.trial_dir / "configs"), use_version=False
            ),
            *([schedule] if schedule is not None else []),
        ]
        loggers = self._start_loggers() if get_rank() == 0 else []
        trainer = self._trainer(options, [*callbacks, *make_monitors(loggers)], loggers)
        self._report_resume(trainer.max_steps)
        try:
            self._fit_and_test(trainer, schedule)
        finally:
            self.system.finish_loggers()

    def _fit_and_test(self, trainer: pl.Trainer, schedule: CheckpointSchedule | None) -> None:
        try:
            trainer.fit(self.system, datamodule=self.datamodule, ckpt_path=self._path())
        except StoppedEarly:
            pass
        finally:
            self.signals.training = False
        if schedule is not None:
            # The next stage starts from it on every rank, in the folder that rank 0 wrote.
            self.last_checkpoint = trainer.strategy.broadcast(schedule.last_path or self.resume)
        if self.signals.exit_code in (0, INTERRUPTED):
            self._final_test(trainer)

    def _start_loggers(self) -> list:
        self.system.start_loggers(self.trial_dir, config_to_primitive(self.cfg))
        return make_loggers(self.trial_dir, self.system.get_loggers())

    def _final_test(self, trainer: pl.Trainer) -> None:
        step = self.system.global_step
        trainer.test(self.system, datamodule=self.datamodule, verbose=False)
        if self.last_checkpoint is not None:
            threestudio.info("step %d: weights in %s", step, self.last_checkpoint)

    def evaluate(self) -> None:
        """Validate, test or export with the weights of the checkpoint."""
        self._take_status()
        options = _trainer_options(self.cfg)
        options.pop("non_finite_policy", None)
        options.pop("enable_checkpointing", None)
        if self.mode == "export" and not _exports_views(self.system):
            # The exporter runs once, after the loop over the views, which it does not need.
            options["limit_predict_batches"] = 1
        trainer = self._trainer(
            {**options, "enable_checkpointing": False}, [SeedGlobalGenerators(None)], False
        )
        common = {"datamodule": self.datamodule, "ckpt_path": self._path()}
        if self.mode == "validate":
            trainer.validate(self.system, verbose=False, **common)
        elif self.mode == "test":
            trainer.test(self.system, verbose=False, **common)
        else:
            trainer.predict(self.system, return_predictions=False, **common)

    def _take_status(self) -> None:
        """Tell the system at which step its weights stand, so that files and schedules agree."""
        if self.resume is not None:
            checkpoint = load_checkpoint(self.resume)
            status = int(checkpoint.get("epoch", 0)), int(checkpoint.get("global_step", 0))
        else:
            status = getattr(self.system, "_weights_status", None)
        if status is not None:
            self.system.set_resume_status(*status)

    def _trainer(self, options: dict, callbacks: list, loggers: Any) -> pl.Trainer:
        if options.pop("enable_progress_bar", True) and get_rank() == 0:
            callbacks = [RunProgress(), *callbacks]
        return pl.Trainer(
            callbacks=callbacks,
            logger=loggers,
            plugins=[AtomicCheckpointIO(), *_as_list(options.pop("plugins", None))],
            enable_progress_bar=False,
            default_root_dir=str(self.trial_dir),
            **options,
        )

    def _path(self) -> str | None:
        return None if self.resume is None else str(self.resume)

    def _metadata(self) -> dict[str, Any]:
        return {
            "threestudio_version": threestudio.__version__,
            "config": redact_tree(config_to_primitive(self.cfg)),
            "profile": str(self.cfg.get("profile", "")),
            "seed": int(self.cfg.seed),
        }

    def _report_resume(self, max_steps: int) -> None:
        if self.resume is None:
            return
        checkpoint = load_checkpoint(self.resume)
        step = int(checkpoint.get("global_step", 0))
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                f"resume {self.resume} holds weights but no optimizer; expected a checkpoint of a "
                "training. Start from its weights instead: system.weights=PATH."
            )
        threestudio.info("resuming from %s at step %d of %d.", self.resume, step, max_steps)


def _resolve_resume(cfg: Any, mode: str) -> Path | None:
    """Turn ``cfg.resume`` into a file, and refuse an evaluation without weights."""
    resume = cfg.resume
    if resume == "auto":
        try:
            resume = find_newest_checkpoint(cfg.trial_dir)
        except FileNotFoundError as error:
            if mode != "train" or "no readable" in str(error):
                raise
            threestudio.info("resume=auto: %s Starting at step 0.", str(error).split(";")[0] + ".")
            return None
    if resume is None:
        if mode != "train" and not has_weights(cfg):
            raise ValueError(
                f"--{mode} needs trained weights; give resume=PATH/ckpts/last.ckpt or "
                "system.weights=PATH."
            )
        return None
    path = Path(find_last_path(str(resume)))
    if path.is_dir():
        return find_newest_checkpoint(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"resume={resume} does not exist. Give a checkpoint, its folder, or resume=auto."
        )
    return path


def _trainer_options(cfg: Any) -> dict[str, Any]:
    """Arguments of `pl.Trainer` from the config, completed by what this machine has."""
    options = dict(config_to_primitive(cfg.trainer)) if OmegaConf.is_config(cfg.trainer) else dict(
        cfg.trainer
    )
    for key in ("logger", "callbacks"):
        if options.pop(key, None) is not None:
            threestudio.warn("trainer.%s has no effect; the launcher sets it.", key)
    on_gpu = torch.cuda.is_available() and options.get("accelerator", "gpu") == "gpu"
    options.setdefault("accelerator", "gpu" if on_gpu else "cpu")
    n_gpus = torch.cuda.device_count() if on_gpu else 1
    options = share_among_ranks(options, os.environ, n_gpus)
    options.setdefault("devices", -1 if on_gpu else 1)
    # Under no_grad rather than inference mode, so that analytic normals can ask for gradients.
    options.setdefault("inference_mode", False)
    options.setdefault("enable_model_summary", False)
    return options


def _exports_views(system: Any) -> bool:
    """Whether the export needs the test views: it makes a video, or has its own predict_step."""
    own_step = type(system).predict_step is not BaseLift3DSystem.predict_step
    exporter = system.cfg.get("exporter") or {}
    return own_step or bool(exporter.get("save_video", False))


def _check_writable(folder: Path) -> None:
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to the output folder {folder}: {error.strerror}. "
            "Choose another with exp_root_dir=PATH, or free space there",
        ) from error


def _sweep_save_folder(folder: Path) -> None:
    """Delete half-written pictures and videos of a run that was killed here."""
    for path in folder.rglob(".[0-9]*-*"):
        if path.is_file():
            path.unlink(missing_ok=True)


def _write_command(trial_dir: Path, argv: list[str]) -> None:
    program = sys.argv[0] or "launch.py"
    words = [redact(word) for word in (program, *argv)]
    (trial_dir / "cmd.txt").write_text(f"python {shlex.join(words)}\n", encoding="utf-8")


def _config_of(argv: Sequence[str]) -> Path | None:
    """The file behind ``--config`` on the command line, if it is one and exists."""
    arguments = list(argv)
    for index, argument in enumerate(arguments):
        value = None
        if argument == "--config" and index + 1 < len(arguments):
            value = arguments[index + 1]
        elif argument.startswith("--config="):
            value = argument.partition("=")[2]
        if value is not None:
            return Path(value) if Path(value).is_file() else None
    return None


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
