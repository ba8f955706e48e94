"""Callbacks that watch over a training: finite numbers, global generators, requests to stop."""

import functools
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

import threestudio
from threestudio.launcher.signals import StopSignals
from threestudio.utils.checkpoint_schedule import CheckpointSchedule, NonFiniteError
from threestudio.utils.rng import generator, seed_global_generators

# How often, in steps, the device is asked whether a loss or gradient was not finite. Asking makes
# the CPU wait for the GPU; between two questions bad updates are skipped on the device itself.
_ASK_EVERY = 50


class StoppedEarly(Exception):
    """Leaves Lightning's loops when a validation is cut short by a request to stop."""


class NonFiniteGuard(pl.Callback):
    """Lets no update be made from a loss or gradient that is NaN or infinite.

    On the CPU each step is checked before its update. On CUDA the check stays on the device:
    a fused optimizer skips the update by itself, and the fault is reported within 50 steps; an
    optimizer that cannot do that is checked each step.

    With a 16-bit gradient scaler, infinite gradients are part of its search for a scale and are
    left to it; the loss is checked all the same.

    Args:
        policy: "stop" raises; "skip" leaves the update out and goes on.
        max_skips: how many updates in all may be left out before the run stops anyway.

    Raises:
        ValueError: unknown policy.
        NonFiniteError: at a fault, naming the step and the loss terms.
    """

    def __init__(self, policy: str = "stop", max_skips: int = 10) -> None:
        if policy not in ("stop", "skip"):
            raise ValueError(f"non_finite_policy is {policy!r}; expected 'stop' or 'skip'.")
        self.policy = policy
        self.max_skips = max_skips
        self.n_skipped = 0
        self._loss_ok: torch.Tensor | None = None
        self._found: torch.Tensor | None = None

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: torch.Tensor
    ) -> None:
        ok = loss.detach().isfinite().all()
        self._loss_ok = ok if self._loss_ok is None else self._loss_ok & ok

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        ok = torch.tensor(True) if self._loss_ok is None else self._loss_ok
        self._loss_ok = None
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            ok = ok & _grads_finite(optimizer, ok.device)
        if trainer.world_size > 1:
            # One rank that left the update out would part from the others for good.
            bad = (~ok).float().to(trainer.strategy.root_device)
            ok = trainer.strategy.reduce(bad, reduce_op="sum") == 0
        if ok.is_cuda and _skips_on_device(optimizer) and self.policy == "stop":
            bad = (~ok).float()
            optimizer.found_inf = bad
            self._found = bad if self._found is None else torch.maximum(self._found, bad)
            if trainer.global_step % _ASK_EVERY == 0:
                self._ask(trainer, pl_module)
        elif not bool(ok):
            self._fault(trainer, pl_module, optimizer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._ask(trainer, pl_module)

    def _ask(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._found is not None and bool(self._found):
            raise NonFiniteError(_fault_text(trainer.global_step, pl_module))

    def _fault(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        text = _fault_text(trainer.global_step, pl_module)
        if self.policy == "stop":
            raise NonFiniteError(text)
        self.n_skipped += 1
        if self.n_skipped > self.max_skips:
            raise NonFiniteError(f"{text} It was update {self.n_skipped} to be left out.")
        threestudio.warn(
            "update left out (%d of at most %d): %s", self.n_skipped, self.max_skips, text
        )
        optimizer.zero_grad(set_to_none=True)


def _grads_finite(optimizer: Any, device: torch.device) -> torch.Tensor:
    grads = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    if not grads:
        return torch.tensor(True, device=device)
    # Sums are one pass each and cannot hide a fault: NaN and infinity survive addition. A finite
    # gradient whose sum overflows would need values near 1e38, which is a fault as well.
    sums = torch.stack([grad.sum().float().to(device) for grad in grads])
    return sums.isfinite().all()


def _skips_on_device(optimizer: Any) -> bool:
    return bool(optimizer.defaults.get("fused")) and hasattr(
        optimizer, "_step_supports_amp_scaling"
    )


def _fault_text(step: int, module: Any) -> str:
    terms = []
    for name, value in getattr(module, "_last_logged", {}).items():
        number = float(value)
        terms.append(f"{name}={number:.4g}")
    listed = ", ".join(terms) if terms else "none was logged"
    return (
        f"the loss or a gradient is not finite at step {step}; the update was not made. "
        f"Loss terms: {listed}. Lower their weights or the learning rate, and resume from the "
        "last checkpoint."
    )


class SeedGlobalGenerators(pl.Callback):
    """Re-seeds the global generators before every batch is drawn and before every step.

    For foreign modules only. Lightning fetches one batch ahead, so the draw of batch k happens
    during step k - 1, or before the first step of a run that starts at k; seeding each draw by its
    own batch makes both alike.
    """

    def __init__(self, datamodule: pl.LightningDataModule | None) -> None:
        self.datamodule = datamodule

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit" or self.datamodule is None:
            return
        for name in ("train_dataloader", "val_dataloader"):
            self.datamodule.__dict__[name] = self._with_own_seeds(trainer, name)

    def _with_own_seeds(self, trainer: pl.Trainer, name: str) -> Any:
        """The data module's method, whose loaders take nothing from the global generators.

        A new iterator draws its workers' seed, globally unless it has a generator. A resumed run
        makes iterators where a whole run has them already: for its first batch, and for a
        validation that was due at the step of its checkpoint.
        """
        make_loader = getattr(type(self.datamodule), name)

        @functools.wraps(make_loader)
        def dataloader() -> Any:
            loader = make_loader(self.datamodule)
            for part in loader if isinstance(loader, (list, tuple)) else [loader]:
                if isinstance(part, DataLoader) and part.generator is None:
                    part.generator = generator("global-loader", trainer.global_step)
            if name == "train_dataloader":
                # Lightning asks for the loader once, then at once fetches the first batch.
                seed_global_generators(trainer.global_step, "global-data")
            return loader

        return dataloader

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for name in ("train_dataloader", "val_dataloader"):
            if self.datamodule is not None:
                self.datamodule.__dict__.pop(name, None)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Not on_train_epoch_start, which a run that resumes within an epoch does not pass.
        seed_global_generators(trainer.global_step + 1, "global-data")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        seed_global_generators(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        seed_global_generators(trainer.global_step + 1, "global-data")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seed_global_generators(trainer.global_step + 1, "global-data")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seed_global_generators(trainer.global_step, "global-validation")

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        seed_global_generators(trainer.global_step, "global-test")


class StopOnRequest(pl.Callback):
    """Ends the training after the step in which SIGINT or SIGTERM arrived, all saved."""

    def __init__(self, signals: StopSignals, schedule: CheckpointSchedule | None) -> None:
        self.signals = signals
        self.schedule = schedule
        if schedule is not None:
            schedule.stop_requested = lambda: signals.requested

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.install()
        self.signals.training = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        flag = self.signals.requested
        if trainer.world_size > 1:
            flag = trainer.strategy.reduce_boolean_decision(flag, all=False)
        if flag:
            # Without a limit of 0 Lightning would first run a whole validation.
            trainer.limit_val_batches = 0
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self.signals.requested and self.signals.training and trainer.world_size == 1:
            if self.schedule is not None:
                self.schedule.save(trainer)
            raise StoppedEarly

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.training = False

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.signals.training = False
