"""Progress of a run: steps per second, time left, loss and memory.

On a terminal a live bar, elsewhere (a log file, a pipe) one line every few seconds. Nothing here
waits for the GPU except when a number is shown.
"""

import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

_BAR_PAUSE_SEC = 0.25
_LINE_PAUSE_SEC = 10.0
_WINDOW = 40


class RateMeter:
    """Steps per second over the last few dozen reports, so pauses and warm-up fade out."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque(maxlen=_WINDOW)

    def add(self, now: float, step: int) -> None:
        """Record that ``step`` was reached at time ``now`` (s)."""
        self._points.append((now, step))

    def rate(self) -> float | None:
        """Steps per second, or None before there are two reports apart in time."""
        if len(self._points) < 2:
            return None
        (t_first, first), (t_last, last) = self._points[0], self._points[-1]
        return (last - first) / (t_last - t_first) if t_last > t_first else None


def format_eta(seconds: float | None) -> str:
    """``m:ss`` or ``h:mm:ss``; ``-:--`` if unknown."""
    if seconds is None or not 0 <= seconds < 1e8:
        return "-:--"
    minutes, secs = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


def memory_gb(device: torch.device | None = None) -> float:
    """Peak memory so far in GB (1e9 bytes): of the GPU if ``device`` is one, else of the process.

    Reports the current resident size where the peak is unknown.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def loss_of(outputs: Any) -> float | None:
    """The loss in what Lightning hands to ``on_train_batch_end``, None if there is none."""
    loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return float(loss.detach())
    return None


def describe(step: int, total: int, rate: float | None, loss: float | None, gb: float) -> str:
    """One line, such as ``step 40/400, 12.5 steps/s, 0:29 left, loss 0.123, 1.2 GB``."""
    parts = [f"step {step}/{total}" if total > 0 else f"step {step}"]
    parts.append(f"{rate:.3g} steps/s" if rate else "- steps/s")
    if total > 0:
        parts.append(f"{format_eta((total - step) / rate if rate else None)} left")
    if loss is not None:
        parts.append(f"loss {loss:.4g}")
    return ", ".join([*parts, f"{gb:.1f} GB"])


class ProgressDisplay:
    """A bar on a terminal, elsewhere a line now and then.

    Args:
        live: draw a bar; by default if standard error is a terminal.
        stream: where lines go, standard error by default.
        line_pause_sec: least time between two lines.
    """

    def __init__(
        self, live: bool | None = None, stream: Any = None, line_pause_sec: float = _LINE_PAUSE_SEC
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty() if live is None else live
        self.pause_sec = _BAR_PAUSE_SEC if self.live else line_pause_sec
        self._shown = 0.0
        self._bar: Any = None
        self._task: Any = None

    def begin(self, title: str, total: int, visible: bool = True) -> None:
        """Start anew; 0 as ``total`` is an unknown one, and without ``visible`` no bar is drawn."""
        self.end()
        self._shown = time.monotonic()
        if not self.live or not visible:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bar = Progress(
            TextColumn("{task.fields[title]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=Console(file=self.stream),
            auto_refresh=False,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=total or None, title=title)

    def is_due(self) -> bool:
        """Whether enough time has passed since something was shown."""
        return time.monotonic() - self._shown >= self.pause_sec

    def show(self, text: str, done: int) -> None:
        """Show where things stand."""
        self._shown = time.monotonic()
        try:
            if self._bar is not None:
                self._bar.update(self._task, completed=done, description=text, refresh=True)
            elif not self.live:
                print(text, file=self.stream, flush=True)
        except (OSError, ValueError):
            # A closed terminal or pipe must not end the run; from here on it is silent.
            self._bar, self.live = None, True

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class RunProgress(ProgressDisplay, pl.Callback):
    """Shows a training, and the frames of a test; arguments are those of `ProgressDisplay`."""

    _meter: RateMeter
    _n_test = 0

    # Training

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._meter = RateMeter()
        self._meter.add(time.monotonic(), trainer.global_step)
        self.begin("training", max(trainer.max_steps, 0), trainer.is_global_zero)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step, total = trainer.global_step, trainer.max_steps
        if not self.is_due() and step != total:
            return
        self._meter.add(time.monotonic(), step)
        text = describe(
            step, total, self._meter.rate(), loss_of(outputs), memory_gb(pl_module.device)
        )
        self.show(text, step)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end()

    # Test

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        batches = trainer.num_test_batches
        self._n_test = int(sum(batches)) if sum(batches) != float("inf") else 0
        self.begin("rendering", self._n_test, trainer.is_global_zero)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        done = batch_idx + 1
        if self.is_due() or done == self._n_test:
            self.show(f"view {done}/{self._n_test}" if self._n_test else f"view {done}", done)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.end()
