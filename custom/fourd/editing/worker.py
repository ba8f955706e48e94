"""Carries out one item of a plan: warps, paints, and returns what frames become.

The worker reads the buffer and never writes it. What it denoises towards is always the original
frame; what others look at is a copy; flow and depth are those of the scene before the edit.

Legend: r frames of h x w pixels that an item works on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from threestudio.utils import rng
from torch import Tensor

from custom.fourd.data.video_scene import VideoScene
from custom.fourd.guidance.anchor_instructpix2pix_guidance import Anchor
from custom.fourd.ops.depth_warp import DepthCheck, DepthWarper
from custom.fourd.ops.flow_warp import CHECKS, average_along_flow, warp_by_flow
from custom.fourd.ops.optical_flow import FlowEstimator, estimate_both

from .buffer import EditBuffer
from .options import EditConfig
from .plan import (
    AnchorFrame,
    EditItem,
    FrameKey,
    KeyRound,
    RestPaint,
    TimeBlend,
    Window,
)


class EditModel(Protocol):
    """What the worker asks of a guidance; see `AnchorInstructPix2PixGuidance`."""

    def edit(self, images: Tensor, conditions: Tensor, *args: Any) -> Tensor:
        """Edited frames."""
        ...

    def set_attention(self, attention: str) -> None:
        """Change what frames attend to."""
        ...


@dataclass
class EditSources:
    """Where a worker takes everything from."""

    model: EditModel
    prompt_embeddings: Float[Tensor, "3 l d"]
    """Of [instruction, "", ""]"""
    scene: VideoScene
    """Originals and cameras"""
    buffer: EditBuffer
    flow: FlowEstimator
    depth: Callable[[Sequence[int]], Float[Tensor, "r h w"]]
    """Of the unedited field, 0 where unknown"""
    render: Callable[[Sequence[int]], Float[Tensor, "r h w 3"]]
    """The field as it stands"""


@dataclass
class EditResult:
    """What an item made of the frames that it writes."""

    rows: tuple[int, ...]
    """Rows of the scene"""
    images: Float[Tensor, "r h w 3"]
    shown: list[ShownFrame] = field(default_factory=list)
    """Frames that were diffused, for a picture"""


@dataclass
class ShownFrame:
    """One frame of an item's picture."""

    frame: FrameKey
    before: Float[Tensor, "h w 3"]
    """The original"""
    start: Float[Tensor, "h w 3"]
    """What denoising began from"""
    after: Float[Tensor, "h w 3"]
    is_warped: Bool[Tensor, "h w"]
    """Where the start was carried over from edited frames"""


@dataclass
class _Starts:
    """What denoising begins from, and where that was warped."""

    images: Float[Tensor, "r h w 3"]
    is_warped: Bool[Tensor, "r h w"]


class EditWorker:
    """Runs items.

    Args:
        sources: see `EditSources`.
        options: see `options.edit_options`.
    """

    def __init__(self, sources: EditSources, options: EditConfig) -> None:
        self.sources, self.options = sources, options
        self.scene, self.buffer = sources.scene, sources.buffer
        self.flow_check = CHECKS[options.flow_check]
        sources.model.set_attention(options.attention)

    @torch.no_grad()
    def run(self, item: EditItem) -> EditResult:
        """Return what an item makes of its frames; the buffer stays as it is.

        Random: each frame's noise, role "edit-noise/ID" with the row as item; an anchor's, role
        "edit-anchor/ID" of the item that made it, so that all windows see the same; what frames
        share, role "edit-noise-shared" with the pass-independent step 0.

        Raises:
            ValueError: what the item needs is not there, or the model refuses it.
        """
        if isinstance(item, KeyRound):
            return self._key_round(item)
        if isinstance(item, RestPaint):
            return self._rest_paint(item)
        if isinstance(item, Window):
            return self._window(item)
        if isinstance(item, TimeBlend):
            return self._blend(item)
        raise TypeError(f"{item!r} is no item that this worker knows.")

    # Items

    def _key_round(self, item: KeyRound) -> EditResult:
        rows, targets = self._rows(item.frames()), self._rows(item.writes())[len(item.cameras) :]
        starts = self._plain_starts(item, rows)
        edited = self._edit(item, rows, starts.images, None)
        if not self.options.use_depth or len(rows) + len(targets) < 2:
            return self._result(item, rows, starts, edited)
        views = [*rows, *targets]
        images = torch.cat((edited, self._now(item, targets))) if targets else edited
        keys = list(range(len(rows)))
        depth = self.sources.depth(views)
        reconciled, _ = self._warper(views, depth, self.options.depth_tau_keys).propagate(
            images, keys, keys
        )
        result = self._result(item, rows, starts, reconciled)
        if targets:
            images = torch.cat((reconciled, images[len(rows) :]))
            made, _ = self._warper(views, depth, self.options.depth_tau_rest).propagate(
                images, list(range(len(rows), len(views))), keys, item.warp_ratio
            )
            result.rows, result.images = tuple(views), torch.cat((reconciled, made))
        return result

    def _rest_paint(self, item: RestPaint) -> EditResult:
        rows = self._rows(item.frames())
        # The round before has warped them already.
        images = self.buffer.current(rows)
        starts = _Starts(images, torch.zeros(images.shape[:3], dtype=torch.bool))
        return self._result(item, rows, starts, self._edit(item, rows, images, item.anchor))

    def _window(self, item: Window) -> EditResult:
        rows = self._rows(item.frames())
        starts = self._plain_starts(item, rows)
        self._warp(item, starts)
        edited = self._edit(item, rows, starts.images, item.anchor)
        result = self._result(item, rows, starts, edited)
        kept = [place for place, time in enumerate(item.times) if time in item.kept]
        result.rows, result.images = tuple(rows[place] for place in kept), edited[kept]
        return result

    def _blend(self, item: TimeBlend) -> EditResult:
        rows = self._rows(item.frames())
        now, originals = self.buffer.current(rows), self.buffer.original(rows)
        blended, is_joined = average_along_flow(
            now,
            originals,
            lambda of, towards: estimate_both(self.sources.flow, originals[of], originals[towards]),
            item.reach,
            self.options.time_agreement,
            self.flow_check,
        )
        return self._result(item, rows, _Starts(now, is_joined), blended)

    # Where denoising begins

    def _plain_starts(self, item: EditItem, rows: list[int]) -> _Starts:
        images = self._now(item, rows)
        anchor = getattr(item, "anchor", None)
        if item.from_render and anchor is not None and anchor.frame in item.frames():
            # Its edit of this round is not in the field yet.
            place = item.frames().index(anchor.frame)
            images[place] = self.buffer.current([rows[place]])[0]
        return _Starts(images, torch.zeros(images.shape[:3], dtype=torch.bool))

    def _now(self, item: EditItem, rows: list[int]) -> Float[Tensor, "r h w 3"]:
        if item.from_render and rows:
            return self.sources.render(rows).cpu()
        return self.buffer.current(rows)

    def _warp(self, item: Window, starts: _Starts) -> None:
        """Carry edits over to the window's frames: along time, from key cameras, or from both."""
        for place, time in enumerate(item.times):
            if item.anchor is not None and (item.camera, time) == item.anchor.frame:
                continue  # The key frame is edited; nothing is to be carried there.
            warps = [w for w in (self._by_flow(item, time), self._by_depth(item, time)) if w]
            if not warps:
                continue
            (image, is_valid), *others = warps
            for other, also_valid in others:
                both = is_valid & also_valid
                mixed = torch.lerp(other, image, self.options.temporal_share)
                image = torch.where(is_valid.unsqueeze(-1), image, other)
                image = torch.where(both.unsqueeze(-1), mixed, image)
                is_valid = is_valid | also_valid
            now = starts.images[place]
            starts.images[place] = torch.where(is_valid.unsqueeze(-1), image, now)
            starts.is_warped[place] = is_valid

    def _by_flow(self, item: Window, time: int) -> tuple[Tensor, Tensor] | None:
        if not self.options.use_flow or item.reference is None or item.reference == time:
            return None
        target, source = self._rows(((item.camera, time), (item.camera, item.reference)))
        here, there = self.buffer.original((target, source))
        flow, flow_back = estimate_both(self.sources.flow, here, there)
        warp = warp_by_flow(
            self.buffer.current([source]), here[None], flow[None], flow_back[None], self.flow_check
        )
        return warp.warped[0], warp.is_valid[0]

    def _by_depth(self, item: Window, time: int) -> tuple[Tensor, Tensor] | None:
        cameras = [c for c in item.key_cameras if self._has((c, time))]
        if not self.options.use_depth or not cameras:
            return None
        rows = self._rows(((item.camera, time), *((camera, time) for camera in cameras)))
        warper = self._warper(rows, self.sources.depth(rows), self.options.depth_tau_rest)
        warp = warper.warp(self.buffer.current(rows), 0, list(range(1, len(rows))))
        return warp.image, warp.is_covered

    def _warper(self, rows: list[int], depth: Tensor, tau: float) -> DepthWarper:
        absolute = self.options.depth_tau_is_absolute
        check = DepthCheck(relative=0.0, absolute=tau) if absolute else DepthCheck(relative=tau)
        return DepthWarper(depth, self.scene.c2w[rows], self.scene.intrinsics[rows], check)

    # Diffusion

    def _edit(
        self, item: EditItem, rows: list[int], images: Tensor, anchor: AnchorFrame | None
    ) -> Float[Tensor, "r h w 3"]:
        use = partial(
            self.sources.model.edit,
            images,
            self.buffer.original(rows),
            self.sources.prompt_embeddings,
            item.strength.start,
            item.strength.steps,
        )
        looked_at = self._anchor(anchor) if self.options.use_anchor and anchor else None
        generators = [rng.generator(f"edit-noise/{item.id}", 0, row) for row in rows]
        return use(looked_at, generators, rng.generator("edit-noise-shared", 0)).cpu()

    def _anchor(self, anchor: AnchorFrame) -> Anchor:
        (row,) = self._rows((anchor.frame,))
        if anchor.item is None:
            image = self.buffer.current([row])[0]
        else:
            image = self.buffer.result(anchor.item, row)
        name = anchor.item or "now"
        return Anchor(
            image, self.buffer.original([row])[0], rng.generator(f"edit-anchor/{name}", 0, row)
        )

    # Rows and pictures

    def _rows(self, frames: Sequence[FrameKey]) -> list[int]:
        return [self.scene.index(camera, time) for camera, time in frames]

    def _has(self, frame: FrameKey) -> bool:
        try:
            self.scene.index(*frame)
        except KeyError:
            return False
        return True

    def _result(
        self, item: EditItem, rows: list[int], starts: _Starts, after: Tensor
    ) -> EditResult:
        before = self.buffer.original(rows)
        frames = zip(item.frames(), before, starts.images, after, starts.is_warped, strict=True)
        return EditResult(tuple(rows), after, [ShownFrame(*values) for values in frames])
