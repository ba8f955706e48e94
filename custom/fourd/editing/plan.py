"""The plan of an edit: which frames are edited when, from what, and how strongly.

A plan is a pure list. It depends on options, cameras, times and the seed alone, can be printed
before it runs, and says for every item what it reads. Items of one stage do not read what others of
that stage write, unless they are of the same camera; so the cameras of a stage may be edited by
several processes, each camera by one of them and in the order of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from threestudio.utils.rng import derive_seed, generator

from .options import EditConfig, Strength, strength

FrameKey = tuple[int, int]
"""Camera id and time id."""


@dataclass(frozen=True)
class AnchorFrame:
    """The frame whose look others borrow."""

    frame: FrameKey
    item: str | None
    """The item whose result it is, whatever was written since; None takes the buffer as it is."""


@dataclass(frozen=True, kw_only=True)
class EditItem:
    """One piece of work, some frames edited together."""

    id: str
    """Stable over runs; with the experiment's seed it decides every draw of the item."""
    stage: int
    """All items of earlier stages are done before this one begins."""
    shard: int
    """Which process edits it: this number modulo their count."""
    strength: Strength
    from_render: bool = False
    """Frames start from renders of the field rather than from the edits so far."""

    @property
    def seed(self) -> int:
        """Of the item, by the experiment's seed."""
        return derive_seed(f"edit/{self.id}", 0)

    def frames(self) -> tuple[FrameKey, ...]:
        """The frames that are diffused."""
        raise NotImplementedError

    def writes(self) -> tuple[FrameKey, ...]:
        """The frames whose content changes, where all switches are on."""
        return self.frames()


@dataclass(frozen=True, kw_only=True)
class KeyRound(EditItem):
    """Some cameras at the key time, edited jointly, then carried to the others by depth."""

    time: int
    cameras: tuple[int, ...]
    """The first is the anchor."""
    targets: tuple[int, ...] = ()
    """Cameras that are not diffused and take over what the edited ones show."""
    warp_ratio: float = 1.0
    """Share of that, where there is some."""

    def frames(self) -> tuple[FrameKey, ...]:
        return tuple((camera, self.time) for camera in self.cameras)

    def writes(self) -> tuple[FrameKey, ...]:
        return tuple((camera, self.time) for camera in (*self.cameras, *self.targets))


@dataclass(frozen=True, kw_only=True)
class RestPaint(EditItem):
    """Some of the other cameras at the key time, painted after they were warped."""

    time: int
    cameras: tuple[int, ...]
    anchor: AnchorFrame

    def frames(self) -> tuple[FrameKey, ...]:
        return tuple((camera, self.time) for camera in self.cameras)


@dataclass(frozen=True, kw_only=True)
class Window(EditItem):
    """Consecutive frames of one camera, warped along time, and painted together."""

    camera: int
    times: tuple[int, ...]
    """Frames that are diffused, without the anchor."""
    kept: tuple[int, ...]
    """Those of them that are written back."""
    reference: int | None
    """The frame, edited already, from which the others are warped; None warps nothing."""
    anchor: AnchorFrame | None
    key_cameras: tuple[int, ...] = ()
    """Cameras, edited already, from which frames are warped by depth at the same time."""

    def frames(self) -> tuple[FrameKey, ...]:
        return tuple((self.camera, time) for time in self.times)

    def writes(self) -> tuple[FrameKey, ...]:
        return tuple((self.camera, time) for time in self.kept)


@dataclass(frozen=True, kw_only=True)
class TimeBlend(EditItem):
    """All edits of one camera, averaged with their neighbours in time along the flow.

    Nothing is diffused: `strength` is 0.
    """

    camera: int
    times: tuple[int, ...]
    reach: int
    """Neighbours on both sides that count."""

    def frames(self) -> tuple[FrameKey, ...]:
        return tuple((self.camera, time) for time in self.times)


@dataclass(frozen=True)
class EditPlan:
    """All items of an edit in order."""

    items: tuple[EditItem, ...]
    n_frames: int
    """Frames that there are to edit."""
    blocking_stages: int = 0
    """Stages that are done before any training, whatever the gate says."""

    def __str__(self) -> str:
        return "\n".join(describe(item) for item in self.items)

    def stages(self) -> Iterator[tuple[EditItem, ...]]:
        """The items of each stage, in order."""
        for stage in range(max((item.stage for item in self.items), default=-1) + 1):
            yield tuple(item for item in self.items if item.stage == stage)


def make_plan(options: EditConfig, frames: Sequence[FrameKey]) -> EditPlan:
    """Return the plan of an edit.

    Args:
        options: see `options.edit_options`.
        frames: all frames that may be edited, of cameras that training sees.

    Random: key cameras, role "edit-cameras" with the round as step.

    Raises:
        ValueError: there is nothing to edit.
    """
    streams: dict[int, list[int]] = {}
    for camera, time in sorted(set(frames)):
        streams.setdefault(camera, []).append(time)
    if not streams:
        raise ValueError("there is no frame to edit; expected frames of training cameras.")
    planner = _Planner(options, streams)
    plan = {
        "release": planner.release,
        "paper": planner.paper,
        "single_view": planner.single_view,
        "frame_wise": planner.frame_wise,
    }[options.order]
    plan()
    return EditPlan(tuple(planner.items), len(set(frames)), planner.blocking)


def key_strength(options: EditConfig, round_: int, rounds: int) -> Strength:
    """T and n of a round: the key strength times 0.8 + 0.1 (1 + cos(pi round / rounds))."""
    return strength(options, "key").scaled(annealed(round_, rounds))


def annealed(round_: int, rounds: int) -> float:
    """The factor of a round, falling from 1 to about 0.8."""
    return 0.8 + 0.1 * (1 + math.cos(math.pi * round_ / rounds))


@dataclass(frozen=True)
class Slots:
    """Positions in time of a window."""

    reference: int
    diffused: range
    kept: range


def window_slots(n_times: int, length: int, overlap: int) -> list[Slots]:
    """Positions of windows that write every position once.

    Without overlap, windows begin at 0, are warped from the frame before them (the first one from
    its own frame 0) and all their frames are kept. With overlap they are warped from their own
    first frame, which is edited already, as are those up to the overlap; position 0 is not written.
    """
    if overlap == 0:
        starts = range(0, n_times, length)
        ends = [min(start + length, n_times) for start in starts]
        return [
            Slots(max(0, start - 1), range(start, end), range(start, end))
            for start, end in zip(starts, ends, strict=True)
        ]
    found, start, done = [], 0, 1
    while done < n_times:
        end = min(start + length, n_times)
        found.append(Slots(start, range(start + 1, end), range(done, end)))
        start, done = end - overlap, end
    return found


def describe(item: EditItem) -> str:
    """One line about an item."""
    if isinstance(item, TimeBlend):
        return (
            f"{item.id}: camera {item.camera}, times {_span(item.times)}, averaged along the flow "
            f"with {item.reach} before and after"
        )
    how = f"T {item.strength.start} in {item.strength.steps} steps"
    start = ", from renders" if item.from_render else ""
    if isinstance(item, Window):
        times = _span(item.times)
        keys = f", keys {_listed(item.key_cameras)}" if item.key_cameras else ""
        after = "" if item.reference is None else f", after {item.reference}"
        return f"{item.id}: camera {item.camera}, times {times}{after}{keys}, {how}{start}"
    kind = "key round" if isinstance(item, KeyRound) else "other cameras"
    onto = f" onto {_listed(item.targets)}" if isinstance(item, KeyRound) and item.targets else ""
    cameras = _listed(item.cameras)
    return f"{item.id}: {kind} of cameras {cameras}{onto} at time {item.time}, {how}{start}"


class _Planner:
    """Writes items; one method per order."""

    def __init__(self, options: EditConfig, streams: dict[int, list[int]]) -> None:
        self.options, self.streams = options, streams
        self.items: list[EditItem] = []
        self.stage, self.blocking = 0, 0
        self.key_time = min(times[0] for times in streams.values())
        self.joint = [camera for camera, times in streams.items() if self.key_time in times]

    def release(self) -> None:
        options = self.options
        for round_ in range(options.warm_up_steps):
            how = key_strength(options, round_, options.warm_up_steps)
            last = self._key_round(f"key{round_:02d}", round_, how, options.warp_ratio)
            self.stage += 1
        made = self._rest_paint("key", last)
        self.stage += 1
        self.blocking = self.stage
        for number in range(options.passes):
            self._windows(f"pass{number}", number, self.streams, made)
            self.stage += 1

    def paper(self) -> None:
        options = self.options
        for number in range(options.passes):
            name = f"round{number}"
            from_render = self._from_render(number)
            how = key_strength(options, number, options.passes)
            key = self._key_round(f"{name}/key", number, how, 1.0, from_render)
            self.stage += 1
            made = self._rest_paint(name, key, annealed(number, options.passes))
            keys = [camera for camera in self.streams if camera in key.cameras]
            self._windows(name, number, keys, made)
            self.stage += 1
            rest = [camera for camera in self.streams if camera not in key.cameras]
            self._windows(name, number, rest, made, key.cameras)
            self.stage += 1

    def single_view(self) -> None:
        options, made = self.options, {}
        for shard, (camera, times) in enumerate(self.streams.items()):
            key = KeyRound(
                id=f"key/camera{camera:02d}", stage=0, shard=shard, time=times[0],
                cameras=(camera,), strength=strength(options, "key"),
            )  # fmt: skip
            self.items.append(key)
            made[camera] = key.id
        self.stage += 1
        self.blocking = self.stage
        for number in range(options.passes):
            self._windows(f"pass{number}", number, self.streams, made)
            self.stage += 1

    def frame_wise(self) -> None:
        for number in range(self.options.passes):
            self._windows(f"pass{number}", number, self.streams, {})
            self.stage += 1

    def _key_round(
        self, name: str, round_: int, how: Strength, ratio: float, from_render: bool = False
    ) -> KeyRound:
        count = min(self.options.key_cameras, len(self.joint))
        order = torch.randperm(len(self.joint), generator=generator("edit-cameras", round_))
        chosen = sorted(self.joint[place] for place in order[:count].tolist())
        targets = tuple(camera for camera in self.joint if camera not in chosen)
        item = KeyRound(
            id=name, stage=self.stage, shard=0, time=self.key_time, cameras=tuple(chosen),
            targets=targets if self.options.use_depth else (), warp_ratio=ratio, strength=how,
            from_render=from_render,
        )  # fmt: skip
        self.items.append(item)
        return item

    def _rest_paint(self, name: str, key: KeyRound, factor: float = 1.0) -> dict[int, str]:
        """Paint the cameras that a key round left out; return which item made each key frame."""
        made = dict.fromkeys(key.cameras, key.id)
        rest = [camera for camera in self.joint if camera not in key.cameras]
        length = self.options.sequence_length
        how = strength(self.options, "restview_refine").scaled(factor)
        for number, first in enumerate(range(0, len(rest), length)):
            chunk = tuple(rest[first : first + length])
            anchor = AnchorFrame((key.cameras[0], self.key_time), key.id)
            if self.options.rest_anchor == "chunk":
                anchor = AnchorFrame((chunk[0], self.key_time), None)
            item = RestPaint(
                id=f"{name}/rest{number}", stage=self.stage, shard=number, time=self.key_time,
                cameras=chunk, anchor=anchor, strength=how,
            )  # fmt: skip
            self.items.append(item)
            made |= dict.fromkeys(chunk, item.id)
        return made

    def _windows(
        self,
        name: str,
        number: int,
        cameras: Sequence[int],
        made: dict[int, str],
        key_cameras: tuple[int, ...] = (),
    ) -> None:
        options = self.options
        how = strength(options, "refine", number > 0)
        if options.order == "paper":
            how = how.scaled(annealed(number, options.passes))
        for shard, camera in enumerate(self.streams):
            if camera not in cameras:
                continue
            times = self.streams[camera]
            slots = window_slots(len(times), options.sequence_length, options.overlap_length)
            for place, slot in enumerate(slots):
                diffused = tuple(times[at] for at in slot.diffused)
                self.items.append(
                    Window(
                        id=f"{name}/camera{camera:02d}/window{place:03d}", stage=self.stage,
                        shard=shard, strength=how, camera=camera, times=diffused,
                        kept=tuple(times[at] for at in slot.kept),
                        reference=self._reference(camera, times[slot.reference], made, place),
                        anchor=self._anchor(camera, made, place),
                        key_cameras=key_cameras if options.use_depth else (),
                        from_render=self._from_render(number),
                    )
                )  # fmt: skip
            self._blend(name, camera, shard)

    def _blend(self, name: str, camera: int, shard: int) -> None:
        options, times = self.options, self.streams[camera]
        if options.time_reach == 0 or not options.use_flow or options.order == "frame_wise":
            return
        self.items.append(
            TimeBlend(
                id=f"{name}/camera{camera:02d}/blend", stage=self.stage, shard=shard,
                strength=Strength(0, 0), camera=camera, times=tuple(times),
                reach=options.time_reach,
            )
        )  # fmt: skip

    def _reference(self, camera: int, time: int, made: dict[int, str], place: int) -> int | None:
        if not self.options.use_flow or self.options.order == "frame_wise":
            return None
        # Without a key frame of its own, nothing of a camera is edited before its first window.
        return time if camera in made or place > 0 else None

    def _anchor(self, camera: int, made: dict[int, str], place: int) -> AnchorFrame | None:
        if not self.options.use_anchor or self.options.order == "frame_wise":
            return None
        if camera not in made:
            source = next(iter(made), None)
            return None if source is None else AnchorFrame((source, self.key_time), made[source])
        time = self.streams[camera][0]
        refreshed = self.options.refresh_anchor and place > 0
        return AnchorFrame((camera, time), None if refreshed else made[camera])

    def _from_render(self, number: int) -> bool:
        return number > 0 and self.options.later_passes_from == "render"


def _listed(values: Sequence[int]) -> str:
    return ",".join(str(value) for value in values)


def _span(times: Sequence[int]) -> str:
    return str(times[0]) if len(times) == 1 else f"{times[0]}-{times[-1]}"
