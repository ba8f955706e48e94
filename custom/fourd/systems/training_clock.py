"""How long a scene has been trained: seconds that survive checkpoints, resuming and evaluation."""

from __future__ import annotations

import time


class TrainingClock:
    """Mixin of a Lightning system that counts the wall seconds of its training loop.

    A checkpoint keeps them as `train_seconds`; a resumed training goes on from there. A training
    that starts from another's weights (`system.weights`) counts from zero, an evaluation of such
    weights reports theirs.
    """

    _train_seconds = 0.0
    _fit_started: float | None = None
    _weights_seconds: float | None = None

    @property
    def training_seconds(self) -> float | None:
        """Seconds that the weights were trained for in their last stage; None if unknown."""
        own = self._seconds_so_far()
        return own if own > 0 else self._weights_seconds

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._fit_started = time.monotonic()

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._train_seconds = self._seconds_so_far()
        self._fit_started = None

    def _seconds_so_far(self) -> float:
        running = 0.0 if self._fit_started is None else time.monotonic() - self._fit_started
        return self._train_seconds + running

    def on_weights_loaded(self, checkpoint: dict) -> None:
        """Take note of how long another run has trained the weights."""
        super().on_weights_loaded(checkpoint)
        seconds = checkpoint.get("train_seconds")
        self._weights_seconds = None if seconds is None else float(seconds)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["train_seconds"] = self._seconds_so_far()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        self._train_seconds = float(checkpoint.get("train_seconds", 0.0))
