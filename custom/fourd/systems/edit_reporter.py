"""Says what is being edited, and shows it: progress lines and pictures of the items."""

from __future__ import annotations

import math
import time
from typing import Any

import threestudio
import torch
from threestudio.launcher.progress import ProgressDisplay, RateMeter, format_eta
from torch import Tensor
from torch.nn import functional

from custom.fourd.editing.plan import EditItem, describe
from custom.fourd.editing.worker import EditResult, ShownFrame

LARGEST_PX = 256
"""Longer edge of a frame in a picture."""


class EditReporter:
    """The observer of a system's edits.

    Args:
        system: whose savers and trainer are used.
        preview_every: items between two pictures; 0 makes none.

    Attributes:
        seconds: that items took in this process.
    """

    def __init__(self, system: Any, preview_every: int) -> None:
        self.system, self.preview_every = system, preview_every
        self.seconds = 0.0
        self.is_training = False
        self._display = ProgressDisplay()
        self._meter = RateMeter()
        self._began, self._told = 0.0, -math.inf

    def wait(self, total: int) -> None:
        """Editing that training waits for begins: a bar of its own."""
        self._display.begin("editing", total)
        self._told = -math.inf

    def train(self) -> None:
        """Training goes on; from now on there are lines only."""
        self._display.end()
        self.is_training = True

    def begin(self, item: EditItem, done: int, total: int) -> None:
        """Tell what is edited now."""
        self._began = time.monotonic()
        self._meter.add(self._began, done)
        if self._began - self._told < self._display.pause_sec:
            return
        self._told = self._began
        rate = self._meter.rate()
        left = format_eta((total - done) / rate if rate else None)
        text = f"edit {done + 1}/{total}, {left} left: {describe(item)}"
        if self.is_training:
            threestudio.info(text)
        else:
            self._display.show(text, done)

    def end(self, item: EditItem, result: EditResult | None, done: int, total: int) -> None:
        """Write an item's picture, where it is due."""
        if result is None:
            return
        self.seconds += time.monotonic() - self._began
        if self.preview_every and (done - 1) % self.preview_every == 0 and result.shown:
            name = f"edits/{done:04d}-{item.id.replace('/', '-')}.png"
            step = self.system.global_step
            self.system.save_image_grid(name, picture(result.shown), name="edit", step=step)

    def should_stop(self) -> bool:
        """Whether Ctrl-C or SIGTERM came while training waits; in training, its own loop stops."""
        if self.is_training:
            return False
        callbacks = self.system.trainer.callbacks
        signals = (getattr(callback, "signals", None) for callback in callbacks)
        return any(bool(getattr(signal, "requested", False)) for signal in signals)


def picture(shown: list[ShownFrame]) -> list[list[dict[str, Any]]]:
    """Rows for `save_image_grid`: originals, what denoising began from, results, warp masks."""
    rgb = {"type": "rgb", "kwargs": {"data_format": "HWC"}}
    grey = {"type": "grayscale", "kwargs": {"cmap": None, "data_range": (0, 1)}}
    rows = [
        [{**rgb, "img": _small(getattr(frame, name))} for frame in shown]
        for name in ("before", "start", "after")
    ]
    masks = [frame.is_warped.float().unsqueeze(-1) for frame in shown]
    return [*rows, [{**grey, "img": _small(mask)[..., 0]} for mask in masks]]


def _small(image: Tensor) -> Tensor:
    """At most `LARGEST_PX` along the longer edge."""
    height, width = image.shape[:2]
    factor = LARGEST_PX / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    planes = image.movedim(-1, 0)[None].to(torch.float32)
    return functional.interpolate(planes, size, mode="area")[0].movedim(0, -1)
