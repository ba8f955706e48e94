"""How long the lists of samples are, chosen from the counts of earlier passes.

A list whose length does not depend on data needs one that suffices and is not much too long. The
device counts what each pass wanted; the host reads that a step or more later and adapts, so that no
pass waits for the count of its own.
"""

from collections import deque
from dataclasses import dataclass, field

from jaxtyping import Int
from torch import Tensor

import threestudio
from threestudio.utils.device_copy import LateReading

# A list is made a quarter longer than the largest count, and grows as soon as a count fills 9/10.
SLACK = 1.25
FULL_SHARE = 0.9
# It shrinks when no count of so many passes would have asked for three quarters of it.
WINDOW = 64
SHRINK_SHARE = 0.75
SMALLEST_STEP = 64


@dataclass
class _Size:
    """What is known about the passes over one number of rays."""

    capacity: int
    readings: deque[LateReading] = field(default_factory=deque)
    largest: int = 0
    n_read: int = 0


class SampleBudget:
    """Chooses the length of a list, for each number of rays of its own.

    Args:
        limit: longest list, a number of samples; 0 sets none. Without a limit the first pass over
            a number of rays waits once for its count; with one it starts at the limit and never
            waits.
        key: the config key that sets the limit, for the warning when it is too small.

    Attributes:
        dropped: samples left out of all passes so far, on the device; None before the first pass.
    """

    def __init__(self, limit: int = 0, key: str = "sample_budget") -> None:
        self.limit, self.key = limit, key
        self.dropped: Int[Tensor, ""] | None = None
        self._sizes: dict[int, _Size] = {}
        self._has_warned = False

    def capacity(self, n_rays: int, wanted: Int[Tensor, ""], at_most: int) -> int:
        """Return the length of this pass's list, at least 1, and note what the pass wants.

        Args:
            n_rays: rays of the pass.
            wanted: samples that the pass has, on the device.
            at_most: samples that it can have.
        """
        bound = max(1, min(at_most, self.limit) if self.limit else at_most)
        size = self._sizes.get(n_rays)
        if size is None:
            first = bound if self.limit else _with_slack(int(wanted))
            size = self._sizes[n_rays] = _Size(first)
        self._read(size)
        chosen = min(size.capacity, bound)
        surplus = (wanted - chosen).clamp(min=0)
        self.dropped = surplus if self.dropped is None else self.dropped + surplus
        size.readings.append(LateReading(wanted))
        return chosen

    def _read(self, size: _Size) -> None:
        """Adapt to the counts that have arrived."""
        while size.readings and size.readings[0].has_arrived:
            count = size.readings.popleft().value
            assert isinstance(count, int)
            size.largest, size.n_read = max(size.largest, count), size.n_read + 1
            if self.limit and count > self.limit:
                self._warn(count)
            if count > FULL_SHARE * size.capacity:
                size.capacity = _with_slack(count)
            elif size.n_read >= WINDOW:
                fitting = _with_slack(size.largest)
                if fitting < SHRINK_SHARE * size.capacity:
                    size.capacity = fitting
                size.largest = size.n_read = 0

    def _warn(self, count: int) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        threestudio.warn(
            f"{self.key} is {self.limit}, but a pass had {count} samples; some are left out and "
            "the others count for more, so images are coarser. Raise it where memory allows."
        )


def _with_slack(count: int) -> int:
    """A quarter more than a count, rounded up to an eighth of a power of two: few lengths occur."""
    length = int(count * SLACK) + 1
    step = max(SMALLEST_STEP, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step
