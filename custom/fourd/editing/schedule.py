"""When the items of a plan are edited: between which training steps, and by which process.

A schedule is a pure list of turns, as the plan is one of items: what training sees at a step is a
function of the step alone, so a run that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .options import EditConfig
from .plan import EditItem, EditPlan, FrameKey


@dataclass(frozen=True)
class Turn:
    """Items that are edited before the batch of one training step."""

    step: int
    shares: tuple[tuple[EditItem, ...], ...]
    """What each process edits, in order."""

    def items(self) -> tuple[EditItem, ...]:
        """Those of all processes, by process."""
        return tuple(item for share in self.shares for item in share)


def make_schedule(
    plan: EditPlan, options: EditConfig, max_steps: int, n_ranks: int = 1
) -> list[Turn]:
    """Spread a plan over a training.

    Args:
        plan: the items.
        options: see `options.edit_options`; here the gate and the pace.
        max_steps: of the training, before it is extended.
        n_ranks: processes that edit.
    """
    shares = list(deal(plan, options.items_per_turn, n_ranks))
    blocking = _n_blocking(plan, options, shares)
    later = len(shares) - blocking
    interval = options.turn_interval_steps
    if interval is None:
        interval = max(1, (max_steps - options.post_edit_steps) // max(1, later))
    steps = [0] * blocking + [place * interval for place in range(later)]
    return [Turn(step, share) for step, share in zip(steps, shares, strict=True)]


def deal(plan: EditPlan, per_turn: int, n_ranks: int) -> Iterator[tuple[tuple[EditItem, ...], ...]]:
    """Yield what each process edits in each turn; no turn holds items of two stages.

    The items of a camera's windows share a `shard`, so they stay on one process and in order.
    """
    for stage in plan.stages():
        queues = [
            [item for item in stage if item.shard % n_ranks == rank] for rank in range(n_ranks)
        ]
        for first in range(0, max(len(queue) for queue in queues), per_turn):
            yield tuple(tuple(queue[first : first + per_turn]) for queue in queues)


def steps_needed(schedule: Sequence[Turn], options: EditConfig, max_steps: int) -> int:
    """`max_steps`, or so many that `post_edit_steps`, or one, follow the last edit."""
    last = max((turn.step for turn in schedule), default=0)
    return max(max_steps, last + max(1, options.post_edit_steps))


def _n_blocking(plan: EditPlan, options: EditConfig, shares: Sequence[tuple]) -> int:
    """How many turns come before training: the key stages, and as many as the gate wants."""
    written: set[FrameKey] = set()
    count = 0
    for share in shares:
        items = [item for part in share for item in part]
        is_key = any(item.stage < plan.blocking_stages for item in items)
        if not is_key and len(written) >= options.min_edit_fraction * plan.n_frames:
            break
        written.update(frame for item in items for frame in item.writes())
        count += 1
    return count
