"""Base classes of every system: `BaseSystem` and `BaseLift3DSystem`.

Order of a training batch: the batch is collated; `on_train_batch_start` preprocesses it and
updates the step-dependent state of the dataset and of every `Updateable` part; `training_step`;
backward and optimizer; `on_train_batch_end` runs the matching ``update_step_end``. Validation,
test and prediction follow the same order.
"""

import itertools
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

import threestudio
from threestudio.models.exporters.base import Exporter
from threestudio.systems.utils import parse_optimizer, parse_scheduler
from threestudio.systems.weights import StateMatch, describe_problems, match_state
from threestudio.utils.base import Updateable, update_end_if_possible, update_if_possible
from threestudio.utils.checkpoint import load_checkpoint
from threestudio.utils.config import parse_structured
from threestudio.utils.misc import (
    C,
    cleanup,
    find_last_path,
    get_device,
    get_rank,
    load_module_weights,
)
from threestudio.utils.saving import SaverMixin


class BaseSystem(pl.LightningModule, Updateable, SaverMixin):
    """A Lightning module with a config, step-dependent parts and savers.

    Attributes:
        strict_optimizer_groups: make an untrained trainable parameter, or an optimizer group
            without one, an error. Our own systems set it; foreign ones get a line in the log.
        late_modules: names of modules that are built after `load_weights`, such as a guidance
            that only training needs; `load_late_weights` takes theirs.
        profile: name of the profile that the run took, for the record; the launcher sets it.
        profile_is_builtin: the config had no profiles of its own, so it may be written for the
            original; the launcher sets it.
        supplied_values: keys of the config, dotted, that the system fills itself, to what stands
            there where a config says ``???``; may be an interpolation.
    """

    strict_optimizer_groups = False
    late_modules: tuple[str, ...] = ()
    profile: str = ""
    profile_is_builtin: bool = False
    supplied_values: Mapping[str, str] = {}

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

    # Construction and weights

    def configure(self) -> None:
        """Build the parts; called once, before weights are loaded; no save folder exists yet."""

    def post_configure(self) -> None:
        """Called once, after weights were loaded."""

    def load_weights(self, weights: str, ignore_modules: list[str] | None = None) -> None:
        """Take model weights from a checkpoint, and let parts adapt to its step.

        A module wholly absent from the file keeps its fresh values, one of the file that this
        system does not have is ignored, each with one line. Step-dependent state is set for the
        step of the file (devices may differ then, hence ``on_load_weights``); when training
        starts, the first batch sets it for step 0 again.

        Raises:
            ValueError: the file is unfit; every key that differs is listed.
            FileNotFoundError: there is no such file.
        """
        path = find_last_path(str(weights))
        checkpoint = load_checkpoint(path)
        left_out = (*(ignore_modules or []), *self.late_modules)
        found = _without(checkpoint.get("state_dict", {}), left_out)
        own = _without(self._stored_state(), left_out)
        match = self._match_weights(own, found, path)
        if not match.loadable:
            raise ValueError(
                f"system.weights {path} has nothing in common with this system; expected a "
                f"checkpoint with modules such as {', '.join(sorted(_roots(own)))}."
            )
        _report_match(match.fresh, match.dropped, path)
        super().load_state_dict(match.loadable, strict=False)
        self._weights_status = (int(checkpoint.get("epoch", 0)),
                                int(checkpoint.get("global_step", 0)))
        self.do_update_step(*self._weights_status, on_load_weights=True)
        self.on_weights_loaded(checkpoint)

    def load_late_weights(self) -> None:
        """Take the weights of ``late_modules`` from `system.weights`, once they are built.

        Call it where such a module is made, after construction and before a run is restored.
        Without `system.weights` nothing happens. The rules are those of `load_weights`; the state
        of no step is set, since training sets it before its first step.

        Raises:
            ValueError: the file is unfit; every key that differs is listed.
            FileNotFoundError: there is no such file.
        """
        ignored = self.cfg.weights_ignore_modules or []
        own = _without(self._stored_state(), ignored)
        own = {key: value for key, value in own.items() if _root(key) in self.late_modules}
        if self.cfg.weights is None or not own:
            return
        path = find_last_path(str(self.cfg.weights))
        stored = _without(load_checkpoint(path).get("state_dict", {}), ignored)
        present = _roots(own)
        found = {key: value for key, value in stored.items() if _root(key) in present}
        match = self._match_weights(own, found, path)
        _report_match(match.fresh, match.dropped, path)
        super().load_state_dict(match.loadable, strict=False)

    def _stored_state(self) -> dict[str, torch.Tensor]:
        """The entries of the state dict that checkpoints hold."""
        own = self.state_dict()
        for key in self._frozen_guidance_keys():
            own.pop(key, None)
        return own

    def _match_weights(self, own: dict, found: dict, path: str) -> StateMatch:
        match = match_state(own, found, {name for name, _ in self.named_parameters()})
        if match.problems:
            raise ValueError(
                f"system.weights {path} does not fit this system: "
                f"{describe_problems(match.problems)}. Use the config and the profile that the "
                "weights were trained with (upstream's have the sizes of profile=low_vram and "
                "paper), or list modules to leave out in system.weights_ignore_modules."
            )
        return match

    def on_weights_loaded(self, checkpoint: dict) -> None:
        """Called with the file that `load_weights` has taken weights from."""

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`, with our sentence when a strict load fails.

        Modules that only the file has at its top level (a guidance that this run does not build)
        are ignored with one line. Frozen parts of a guidance are not stored, hence not required.
        """
        if not strict:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        own = self.state_dict()
        roots = _roots(own)
        dropped = sorted(_roots(state_dict) - roots)
        kept = {key: value for key, value in state_dict.items() if _root(key) in roots}
        not_stored = set(self._frozen_guidance_keys())
        missing = [key for key in own if key not in kept and key not in not_stored]
        problems = [f"{key}: here, but not in the file" for key in missing]
        problems += [f"{key}: in the file, but not here" for key in kept if key not in own]
        problems += [
            f"{key}: shape {tuple(value.shape)} in the file, {tuple(own[key].shape)} here"
            for key, value in kept.items() if key in own and value.shape != own[key].shape
        ]
        if problems:
            raise ValueError(
                f"the checkpoint does not fit this system: {describe_problems(problems)}. "
                "Use the config that it was trained with."
            )
        _report_match([], dropped, "the checkpoint")
        return super().load_state_dict(kept, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave the frozen parts of a guidance out; add the optimizers of parts that have one."""
        state = checkpoint.get("state_dict", {})
        for key in self._frozen_guidance_keys():
            state.pop(key, None)
        own = {name: part.optimizer_state() for name, part in self._parts_with_optimizers()}
        if own:
            checkpoint["part_optimizers"] = own

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Give the parts that have an optimizer of their own its state, where the file has it."""
        stored = checkpoint.get("part_optimizers", {})
        for name, part in self._parts_with_optimizers():
            if name in stored:
                part.load_optimizer_state(stored[name])

    def _parts_with_optimizers(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self.named_modules() if getattr(m, "trains_itself", False)]

    def _frozen_guidance_keys(self) -> list[str]:
        """Keys below those modules of ``guidance*`` whose parameters are all frozen."""
        keys: dict[str, None] = {}
        for name, child in self.named_children():
            if not name.startswith("guidance"):
                continue
            for path, module in child.named_modules(prefix=name):
                flags = [p.requires_grad for p in module.parameters()]
                if flags and not any(flags):
                    keys.update(dict.fromkeys(module.state_dict(prefix=f"{path}.")))
        return list(keys)

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
        """As Lightning's; loss terms are also kept to name them if one is not finite."""
        if "loss" in name:
            self._last_logged[name] = value.detach() if isinstance(value, torch.Tensor) else value
        super().log(name, value, *args, **kwargs)

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


class BaseLift3DSystem(BaseSystem):
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

    def on_predict_start(self) -> None:
        """Build the exporter."""
        self.exporter = threestudio.find(self.cfg.exporter_type)(
            self.cfg.exporter,
            geometry=self.geometry,
            material=self.material,
            background=self.background,
        )
        if isinstance(self.exporter, Exporter):
            self.exporter.attach(self)

    def predict_step(self, batch: dict, batch_idx: int) -> None:
        """Show the view to the exporter; render it, if the exporter asks for a video."""
        if isinstance(self.exporter, Exporter):
            self.exporter.see_view(batch)
        if self.exporter.cfg.save_video:
            self.test_step(batch, batch_idx)

    def on_predict_epoch_end(self) -> None:
        """Run the exporter and save what it returns, in a folder of its own.

        That is `it{N}-export` or, where an earlier export has it, `it{N}-export-2` and so on.
        """
        if self.exporter.cfg.save_video:
            self.on_test_epoch_end()
        folder = None
        for out in self.exporter():
            save = getattr(self, f"save_{out.save_type}", None)
            if save is None:
                raise ValueError(
                    f"{type(self.exporter).__name__} asks for save_type {out.save_type!r}; "
                    f"{type(self).__name__} has no method save_{out.save_type}."
                )
            folder = folder or self._claim_export_folder()
            save(f"{folder}/{out.save_name}", **out.params)

    def _claim_export_folder(self) -> str:
        """Make a new folder for an export, so that none is overwritten; return its name."""
        first = name = f"it{self.true_global_step}-export"
        if get_rank() != 0:
            return first
        for number in itertools.count(2):
            try:
                os.makedirs(os.path.join(self.get_save_dir(), name))
                return name
            except FileExistsError:
                name = f"{first}-{number}"
        raise AssertionError("counting has no end")

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


def _without(state: dict, modules: Iterable[str]) -> dict:
    prefixes = tuple(f"{name}." for name in modules)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _root(key: str) -> str:
    return key.partition(".")[0]


def _roots(state: dict) -> set[str]:
    return {_root(key) for key in state}


def _report_match(fresh: list[str], dropped: list[str], path: str) -> None:
    for name in fresh:
        threestudio.info("%s is not in %s and starts fresh.", name, path)
    for name in dropped:
        threestudio.info("%s of %s is not part of this system and is ignored.", name, path)
