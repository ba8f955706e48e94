"""Base classes of every system: `BaseSystem` and `BaseLift3DSystem`.

Order of a training batch: the batch is collated; `on_train_batch_start` preprocesses it and
updates the step-dependent state of the dataset and of every `Updateable` part; `training_step`;
backward and optimizer; `on_train_batch_end` runs the matching ``update_step_end``. Validation,
test and prediction follow the same order.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import threestudio
from threestudio.systems.checkpoint_contents import CheckpointContents
from threestudio.systems.export_run import ExportRun
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.utils.base import Updateable, update_end_if_possible, update_if_possible
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import (
    C,
    cleanup,
    find_last_path,
    get_device,
    load_module_weights,
)
from threestudio.utils.saving import SaverMixin


class BaseSystem(CheckpointContents, pl.LightningModule, Updateable, SaverMixin):
    """A Lightning module with a config, step-dependent parts and savers.

    Attributes:
        strict_optimizer_groups: make an untrained trainable parameter, or an optimizer group
            without one, an error. Our own systems set it; foreign ones get a line in the log.
        profile: name of the profile that the run took, for the record; the launcher sets it.
        profile_is_builtin: the config had no profiles of its own, so it may be written for the
            original; the launcher sets it.
        supplied_values: keys of the config, dotted, that the system fills itself, to what stands
            there where a config says ``???``; may be an interpolation.
        weights_keys: keys of the config that name trained weights; without any of them an
            evaluation is refused unless it resumes.
    """

    strict_optimizer_groups = False
    profile: str = ""
    profile_is_builtin: bool = False
    supplied_values: Mapping[str, str] = {}
    weights_keys: tuple[str, ...] = ("weights",)

    @dataclass
    class Config:
        loggers: dict = field(default_factory=dict)
        """Optional trackers; ``wandb: {enable, project, name}``."""
        loss: dict = field(default_factory=dict)
        """Weights ``lambda_*`` of the loss terms, numbers or schedules."""
        optimizer: dict = field(default_factory=dict)
        """Optimizer grammar, see `threestudio.systems.utils.parse_optimizer`."""
        scheduler: dict | None = None
        """Learning-rate schedule, see `threestudio.systems.utils.parse_scheduler`."""
        weights: str | None = None
        """Checkpoint to take model weights from; ``LAST`` in the path is expanded."""
        weights_ignore_modules: list | None = None
        """Modules whose weights the checkpoint does not replace."""
        cleanup_after_validation_step: bool = False
        """Collect garbage and free cached GPU memory after each validation batch."""
        cleanup_after_test_step: bool = False
        """The same after each test batch."""

    cfg: Config

    def __init__(self, cfg: Any, resumed: bool = False) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, cfg)
        self._save_dir: str | None = None
        self._resumed = resumed
        self._injected_status: tuple[int, int] | None = None
        self._weights_status: tuple[int, int] | None = None
        self._last_logged: dict[str, Any] = {}
        self._save_fault_reported = False
        self.create_loggers(self.cfg.loggers)
        self.configure()
        if self.cfg.weights is not None:
            self.load_weights(self.cfg.weights, self.cfg.weights_ignore_modules)
        self.post_configure()

    # Construction

    def configure(self) -> None:
        """Build the parts; called once, before weights are loaded; no save folder exists yet."""

    def post_configure(self) -> None:
        """Called once, after weights were loaded."""

    # Where the run stands

    @property
    def resumed(self) -> bool:
        """Whether this run continues a checkpoint."""
        return self._resumed

    def set_resume_status(self, current_epoch: int, global_step: int) -> None:
        """Report ``current_epoch`` and ``global_step`` as the true ones, for evaluation runs."""
        self._injected_status = (current_epoch, global_step)

    @property
    def true_global_step(self) -> int:
        """Step that the weights stand at: the injected one in evaluation, else Lightning's."""
        return self.global_step if self._injected_status is None else self._injected_status[1]

    @property
    def true_current_epoch(self) -> int:
        """Epoch that the weights stand at; see `true_global_step`."""
        return self.current_epoch if self._injected_status is None else self._injected_status[0]

    def C(self, value: Any) -> float:
        """Evaluate a scheduled scalar at the current epoch and step."""
        return C(value, self.true_current_epoch, self.true_global_step)

    # Optimization and logging

    def configure_optimizers(self) -> dict[str, Any]:
        """Build the optimizer and the scheduler that the config describes."""
        optimizer = parse_optimizer(self.cfg.optimizer, self)
        result: dict[str, Any] = {"optimizer": optimizer}
        if self.cfg.scheduler is not None:
            result["lr_scheduler"] = parse_scheduler(self.cfg.scheduler, optimizer)
        return result

    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """As Lightning's, in a training step only where it will be written (see `is_log_step`).

        Loss terms are also kept, at every step, to name them if one is not finite.
        """
        if "loss" in name:
            self._last_logged[name] = value.detach() if isinstance(value, torch.Tensor) else value
        is_plain = not args and kwargs.keys() <= {"prog_bar"}
        if is_plain and not self.is_log_step:
            return
        super().log(name, value, *args, **kwargs)

    @property
    def is_log_step(self) -> bool:
        """Whether what is logged now has a reader.

        Of a training step's values the loggers write those of every `trainer.log_every_n_steps`-th
        step; the others would be moved, averaged and thrown away, for a millisecond each. All are
        kept where a callback monitors one, at the last step, and outside of `training_step`.
        """
        trainer = self._trainer
        if trainer is None or self._current_fx_name != "training_step":
            return True
        if any(getattr(callback, "monitor", None) for callback in trainer.callbacks):
            return True
        # Lightning's own rule: it counts neither accumulated batches nor several optimizers' steps.
        is_written = trainer._logger_connector.should_update_logs or trainer.fast_dev_run
        return is_written or self.global_step + 1 == trainer.max_steps

    def on_save_fault(self, path: str, error: OSError) -> None:
        """A picture that cannot be written stops an evaluation, but never a training."""
        trainer = self._trainer
        if trainer is None or trainer.state.fn != "fit":
            raise error
        if not self._save_fault_reported:
            self._save_fault_reported = True
            threestudio.warn("cannot write %s (%s); training goes on without it.", path, error)

    # Steps that a system must define

    def training_step(self, batch: dict, batch_idx: int):
        raise NotImplementedError(f"{type(self).__name__} defines no training_step.")

    def validation_step(self, batch: dict, batch_idx: int):
        raise NotImplementedError(f"{type(self).__name__} defines no validation_step.")

    def test_step(self, batch: dict, batch_idx: int):
        raise NotImplementedError(f"{type(self).__name__} defines no test_step.")

    def predict_step(self, batch: dict, batch_idx: int):
        raise NotImplementedError(f"{type(self).__name__} defines no predict_step.")

    def on_validation_epoch_end(self) -> None:
        raise NotImplementedError(f"{type(self).__name__} defines no on_validation_epoch_end.")

    # Hooks of the four loops

    def preprocess_data(self, batch: dict, stage: str) -> None:
        """Change a batch in place before anything uses it; ``stage`` names the loop."""

    def on_train_batch_start(self, batch: dict, batch_idx: int, unused: int = 0):
        self._start_batch(batch, "train", self.trainer.train_dataloader)

    def on_validation_batch_start(self, batch: dict, batch_idx: int, dataloader_idx: int = 0):
        self._start_batch(batch, "validation", self.trainer.val_dataloaders)

    def on_test_batch_start(self, batch: dict, batch_idx: int, dataloader_idx: int = 0):
        self._start_batch(batch, "test", self.trainer.test_dataloaders)

    def on_predict_batch_start(self, batch: dict, batch_idx: int, dataloader_idx: int = 0):
        self._start_batch(batch, "predict", self.trainer.predict_dataloaders)

    def on_train_batch_end(self, outputs: Any, batch: dict, batch_idx: int) -> None:
        self._end_batch(self.trainer.train_dataloader)

    def on_validation_batch_end(
        self, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._end_batch(self.trainer.val_dataloaders)
        if self.cfg.cleanup_after_validation_step:
            cleanup()

    def on_test_batch_end(
        self, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._end_batch(self.trainer.test_dataloaders)
        if self.cfg.cleanup_after_test_step:
            cleanup()

    def on_predict_batch_end(
        self, outputs: Any, batch: dict, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._end_batch(self.trainer.predict_dataloaders)
        if self.cfg.cleanup_after_test_step:
            cleanup()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Called after backward, before the optimizer moves anything."""

    def _start_batch(self, batch: dict, stage: str, loader: Any) -> None:
        self.preprocess_data(batch, stage)
        self.dataset = _dataset(loader)
        update_if_possible(self.dataset, self.true_current_epoch, self.true_global_step)
        self.do_update_step(self.true_current_epoch, self.true_global_step)

    def _end_batch(self, loader: Any) -> None:
        self.dataset = _dataset(loader)
        update_end_if_possible(self.dataset, self.true_current_epoch, self.true_global_step)
        self.do_update_step_end(self.true_current_epoch, self.true_global_step)


class BaseLift3DSystem(ExportRun, BaseSystem):
    """A system that optimizes geometry, material and background seen through a renderer."""

    @dataclass
    class Config(BaseSystem.Config):
        geometry_type: str = ""
        """Registered name of the geometry."""
        geometry: dict = field(default_factory=dict)
        geometry_convert_from: str | None = None
        """Checkpoint of another run whose geometry the new one starts from."""
        geometry_convert_inherit_texture: bool = False
        """Also copy the networks that give colour."""
        geometry_convert_override: dict = field(default_factory=dict)
        """Changes to the old geometry's config before it is rebuilt."""
        material_type: str = ""
        """Registered name of the material."""
        material: dict = field(default_factory=dict)
        background_type: str = ""
        """Registered name of the background."""
        background: dict = field(default_factory=dict)
        renderer_type: str = ""
        """Registered name of the renderer."""
        renderer: dict = field(default_factory=dict)
        guidance_type: str = ""
        """Registered name of the guidance."""
        guidance: dict = field(default_factory=dict)
        prompt_processor_type: str = ""
        """Registered name of the prompt processor."""
        prompt_processor: dict = field(default_factory=dict)
        exporter_type: str = "mesh-exporter"
        """Registered name of the exporter."""
        exporter: dict = field(default_factory=dict)

    cfg: Config

    def configure(self) -> None:
        """Build geometry, material, background and renderer; guidance is the subclass's own."""
        source = self.cfg.geometry_convert_from
        if source and not self.cfg.weights and not self.resumed:
            self.geometry = self._converted_geometry(find_last_path(source))
        else:
            self.geometry = threestudio.find(self.cfg.geometry_type)(self.cfg.geometry)
        self.material = threestudio.find(self.cfg.material_type)(self.cfg.material)
        self.background = threestudio.find(self.cfg.background_type)(self.cfg.background)
        self.renderer = threestudio.find(self.cfg.renderer_type)(
            self.cfg.renderer,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )

    def _converted_geometry(self, path: str):
        """Rebuild the geometry of another run and hand it to this run's geometry class."""
        config_path = Path(path).parent.parent / "configs" / "parsed.yaml"
        if not config_path.is_file():
            raise FileNotFoundError(
                f"system.geometry_convert_from {path} needs {config_path}, which does not exist; "
                "expected a checkpoint inside the output folder that it was trained in."
            )
        old = parse_structured(self.Config, OmegaConf.load(config_path).system)
        old.geometry.update(self.cfg.geometry_convert_override)
        previous = threestudio.find(old.geometry_type)(old.geometry)
        state, epoch, step = load_module_weights(path, module_name="geometry", map_location="cpu")
        previous.load_state_dict(state, strict=False)
        previous.do_update_step(epoch, step, on_load_weights=True)
        previous = previous.to(get_device())
        converted = threestudio.find(self.cfg.geometry_type).create_from(
            previous, self.cfg.geometry, copy_net=self.cfg.geometry_convert_inherit_texture
        )
        del previous
        cleanup()
        return converted

    def on_fit_start(self) -> None:
        self._announce("Validation results")

    def on_test_start(self) -> None:
        self._announce("Test results")

    def on_test_end(self) -> None:
        self._announce("Test results", done=True)

    def on_predict_end(self) -> None:
        self._announce("Export assets", done=True)

    def guidance_evaluation_save(self, comp_rgb: torch.Tensor, guidance_eval_out: dict) -> None:
        """Write ``it{N}-train.png``: per row the render and what the guidance makes of it.

        Args:
            comp_rgb: renders [B, H, W, 3] in [0, 1].
            guidance_eval_out: ``imgs_noisy``, ``imgs_1step``, ``imgs_1orig``, ``imgs_final``
                (each [B, h, w, 3]) and ``texts``, one per row.
        """
        size = comp_rgb.shape[1:3]
        names = ("imgs_noisy", "imgs_1step", "imgs_1orig", "imgs_final")
        columns = [comp_rgb] + [_resized(guidance_eval_out[name], size) for name in names]
        n_rows = min(len(column) for column in columns)
        self.save_image_grid(
            f"it{self.true_global_step}-train.png",
            [[{"type": "rgb", "img": column[row], "kwargs": {"data_format": "HWC"}}
              for column in columns] for row in range(n_rows)],
            name="train_step",
            step=self.true_global_step,
            texts=guidance_eval_out.get("texts"),
        )

    def _announce(self, what: str, done: bool = False) -> None:
        if self._save_dir is None:
            threestudio.warn("no save folder is set; %s would fail to be saved.", what.lower())
        else:
            verb = "are in" if done else "go to"
            threestudio.info("%s %s %s", what, verb, self._save_dir)


def _dataset(loader: Any) -> Any:
    """Dataset of a dataloader, of the first of several, or None."""
    if isinstance(loader, (list, tuple)):
        loader = loader[0] if loader else None
    return getattr(loader, "dataset", None)


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    moved = F.interpolate(images.permute(0, 3, 1, 2).float(), size, mode="bilinear")
    return moved.permute(0, 2, 3, 1)
