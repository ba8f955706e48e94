"""Runs the items of a schedule: between training steps, or beside them on a second device.

Both give the same buffer with the same seed, since an item's draws come from its own id, and since
items run in an order in which none misses what it reads. (Items that start from renders of the
field see, beside training, whatever the field is by then.)
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import threestudio
import torch
from torch import Tensor

from .buffer import EditBuffer
from .options import EditConfig
from .plan import EditItem
from .schedule import Turn
from .worker import EditResult, EditSources, EditWorker

POLL_SEC = 0.05


class Ranks:
    """A single process that edits; `ProcessRanks` are several."""

    rank, size = 0, 1

    def gather(self, found: list) -> list[list]:
        """Every process's list, by rank."""
        return [found]


class ProcessRanks(Ranks):
    """The processes of torch's default group."""

    def __init__(self) -> None:
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gather(self, found: list) -> list[list]:
        everyone: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(everyone, found)
        return everyone


class Observer(Protocol):
    """Who is told what is being edited."""

    def begin(self, item: EditItem, done: int, total: int) -> None:
        """An item begins."""
        ...

    def end(self, item: EditItem, result: EditResult | None, done: int, total: int) -> None:
        """An item is done; ``result`` is None where it was found on disk."""
        ...

    def should_stop(self) -> bool:
        """Whether to stop after this item."""
        ...


class StopEditing(Exception):
    """Somebody asked to stop before the edits that training waits for were done."""


class InterleavedExecutor:
    """Edits between training steps, as the schedule says.

    Args:
        schedule: the turns.
        worker: runs items.
        buffer: takes results.
        observer: is told.
        ranks: the processes that edit.
    """

    def __init__(
        self,
        schedule: Sequence[Turn],
        worker: EditWorker,
        buffer: EditBuffer,
        observer: Observer,
        ranks: Ranks | None = None,
    ) -> None:
        self.schedule, self.worker, self.buffer = list(schedule), worker, buffer
        self.observer, self.ranks = observer, ranks or Ranks()
        self.total = sum(len(turn.items()) for turn in self.schedule)
        self.done, self._next = 0, 0

    @property
    def is_done(self) -> bool:
        """Whether every item's result shows."""
        return self._next == len(self.schedule)

    def begin(self, step: int) -> None:
        """Show what training has seen before ``step``, and edit what it waits for.

        Raises:
            ValueError: a result that training has seen is gone.
            StopEditing: see `Observer.should_stop`.
        """
        while not self.is_done and self.schedule[self._next].step < step:
            turn = self.schedule[self._next]
            for item in turn.items():
                if not self.buffer.show(item.id, turn.step):
                    raise ValueError(
                        f"the result of {item.id} is missing from {self.buffer.folder}, but the "
                        f"checkpoint of step {step} was trained with it; expected the edits beside "
                        "the checkpoint. Resume in the folder of the run, or start a new edit."
                    )
                self.done += 1
            self._next += 1
        self.turn(step)

    def turn(self, step: int) -> None:
        """Edit what is due before the batch of a training step."""
        while not self.is_done and self.schedule[self._next].step <= step:
            if self.observer.should_stop():
                raise StopEditing
            self._run(self.schedule[self._next])
            self._next += 1

    def finish(self) -> None:
        """Nothing runs between turns."""

    def cancel(self) -> None:
        """Nothing runs between turns."""

    def _run(self, turn: Turn) -> None:
        # Results on disk are shown by all processes alike: they see the same folder.
        known = {item.id for item in turn.items() if self.buffer.stored(item.id) is not None}
        mine: list[tuple[str, tuple[int, ...], Any]] = []
        for item in turn.shares[self.ranks.rank]:
            if item.id in known:
                continue
            self.observer.begin(item, self.done + len(mine), self.total)
            result = self.worker.run(item)
            self.observer.end(item, result, self.done + len(mine) + 1, self.total)
            # Items of a camera read each other's results within a turn.
            self.buffer.commit(item.id, result.rows, result.images, turn.step)
            mine.append((item.id, result.rows, result.images.to(torch.float16).numpy()))
        own = {name for name, _, _ in mine}
        for found in self.ranks.gather(mine):
            for name, rows, images in found:
                if name not in own:
                    self.buffer.commit(name, rows, torch.from_numpy(images).float(), turn.step)
        # What the first process wrote is read by all.
        self.ranks.gather([])
        for item in turn.items():
            if item.id in known:
                self.buffer.show(item.id, turn.step)
                self.observer.end(item, None, self.done + 1, self.total)
            self.done += 1


class ThreadedExecutor:
    """Edits in a thread while training goes on; for an edit model on a device of its own.

    Faults of the thread are raised in the main loop. The field belongs to the main loop: renders
    that the thread wants are made there, between two training steps.

    Args:
        schedule: the turns; their steps are not used, but which come before training is.
        worker: runs items.
        buffer: takes results.
        observer: is told, in the main loop.
    """

    def __init__(
        self,
        schedule: Sequence[Turn],
        worker: EditWorker,
        buffer: EditBuffer,
        observer: Observer,
    ) -> None:
        self.worker, self.buffer, self.observer = worker, buffer, observer
        self.items = [item for turn in schedule for item in turn.items()]
        self.total, self.done = len(self.items), 0
        # Turns of the gate stand at step 0, as does the first one after it.
        n_first = sum(turn.step == 0 for turn in schedule)
        self._n_awaited = sum(len(turn.items()) for turn in schedule[:n_first])
        self._step = 0
        self._news: queue.Queue[tuple] = queue.Queue()
        self._stop, self._fault = threading.Event(), None
        self._render = worker.sources.render
        worker.sources.render = self._ask_to_render
        self._thread = threading.Thread(target=self._work, name="editing", daemon=True)

    @property
    def is_done(self) -> bool:
        """Whether every item's result shows."""
        return self.done == self.total

    def begin(self, step: int) -> None:
        """Show what is on disk, start editing, and wait for what training waits for."""
        self._step = step
        self._thread.start()
        while self.done < self._n_awaited:
            self._serve(POLL_SEC)
            if self.observer.should_stop():
                self.cancel()
                raise StopEditing

    def turn(self, step: int) -> None:
        """Tell what was edited, render what is wanted; never waits for an edit."""
        self._step = step
        self._serve(0.0)

    def finish(self) -> None:
        """Wait for the last item."""
        while not self.is_done and not self._stop.is_set():
            self._serve(POLL_SEC)
        self._thread.join()

    def cancel(self) -> None:
        """Stop after the item that is being edited."""
        self._stop.set()
        while self._thread.is_alive():
            self._serve(POLL_SEC, raises=False)

    def _work(self) -> None:
        try:
            for item in self.items:
                if self._stop.is_set():
                    return
                if self.buffer.show(item.id, self._step):
                    self._news.put(("end", item, None))
                    continue
                self._news.put(("begin", item))
                result = self.worker.run(item)
                self.buffer.commit(item.id, result.rows, result.images, self._step)
                self._news.put(("end", item, result))
        except BaseException as error:
            self._fault = error

    def _serve(self, wait_sec: float, raises: bool = True) -> None:
        """Handle the thread's news; wait for the first one at most so long."""
        block = wait_sec > 0
        while True:
            try:
                kind, *facts = self._news.get(block, wait_sec if block else None)
            except queue.Empty:
                break
            block = False
            if kind == "begin":
                self.observer.begin(facts[0], self.done, self.total)
            elif kind == "end":
                self.done += 1
                self.observer.end(facts[0], facts[1], self.done, self.total)
            else:
                rows, answer = facts
                answer.put(self._render(rows))
        if raises and self._fault is not None and self._news.empty():
            raise self._fault

    def _ask_to_render(self, rows: Sequence[int]) -> Tensor:
        answer: queue.Queue[Tensor] = queue.Queue()
        self._news.put(("render", rows, answer))
        while True:
            try:
                return answer.get(timeout=POLL_SEC)
            except queue.Empty:
                if self._stop.is_set():
                    raise StopEditing from None


def make_executor(
    options: EditConfig,
    schedule: Sequence[Turn],
    sources: EditSources,
    observer: Observer,
    ranks: Ranks | None = None,
) -> InterleavedExecutor | ThreadedExecutor:
    """Return the executor that the options name.

    Raises:
        ValueError: threaded, with several processes.
    """
    worker = EditWorker(sources, options)
    if options.executor == "interleaved":
        return InterleavedExecutor(schedule, worker, sources.buffer, observer, ranks)
    if ranks is not None and ranks.size > 1:
        raise ValueError(
            f"system.edit.executor is 'threaded' with {ranks.size} processes; expected one, whose "
            "edits run on a second device. Several processes each edit some cameras: set "
            "executor=interleaved."
        )
    threestudio.debug("edits run in a thread")
    return ThreadedExecutor(schedule, worker, sources.buffer, observer)
