"""Scheduled scalars: numbers that a config may write as a piecewise linear function of the step."""

import math
from collections.abc import Sequence
from typing import Any

from omegaconf import ListConfig

Schedule = int | float | Sequence[int | float]


def is_schedule(value: Any) -> bool:
    """Tell whether ``value`` is written as a schedule (a list) rather than as one number."""
    return isinstance(value, (list, tuple, ListConfig))


def schedule_points(value: Any) -> tuple[list[int | float], list[float]]:
    """Split a schedule into its markers and its values, both of the same length.

    Accepted forms: ``[v0, v1, s1]`` (from step 0), ``[s0, v0, v1, s1]``, and
    ``[s0, v0, v1, s1, v2, s2, ...]``, which goes through (s0, v0), (s1, v1), (s2, v2), ...

    Raises:
        ValueError: if the list has another length, holds no numbers, or its markers descend.
    """
    items = list(value)
    if any(isinstance(item, bool) or not isinstance(item, (int, float)) for item in items):
        raise ValueError(f"schedule {items} holds something that is not a number.")
    if len(items) == 3:
        items = [0, *items]
    if len(items) < 4 or len(items) % 2:
        raise ValueError(
            f"schedule {items} has {len(items)} items; expected [v0, v1, s1], [s0, v0, v1, s1] "
            "or [s0, v0, v1, s1, v2, s2, ...]."
        )
    markers = [items[0], *items[3::2]]
    values = [items[1], items[2], *items[4::2]]
    if any(later < earlier for earlier, later in zip(markers, markers[1:])):
        raise ValueError(f"schedule {items} has descending markers {markers}; sort them.")
    return markers, [float(v) for v in values]


def C(value: Any, epoch: int, global_step: int, interpolation: str = "linear") -> float:
    """Return the value of a scheduled scalar at a step.

    A number is its own value. A schedule is constant before its first and after its last marker.
    A segment is measured in ``global_step`` if its end marker is an int, in ``epoch`` if it is a
    float; where two markers are equal the value jumps.

    Args:
        value: a number or a schedule, see `schedule_points`.
        epoch: current epoch.
        global_step: current global step.
        interpolation: "linear", or "exp" for linear in the logarithm (values must be positive).

    Raises:
        ValueError: if the schedule or ``interpolation`` is malformed.
    """
    if not is_schedule(value):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"scheduled value is {value!r}; expected a number or a list.")
        return value
    if interpolation not in ("linear", "exp"):
        raise ValueError(f"interpolation is {interpolation!r}; expected 'linear' or 'exp'.")
    markers, values = schedule_points(value)
    for start, end, before, after in zip(markers, markers[1:], values, values[1:]):
        current = global_step if isinstance(end, int) else epoch
        if current < end:
            fraction = max(0.0, (current - start) / (end - start))
            return _interpolate(before, after, fraction, interpolation)
    return values[-1]


def C_max(value: Any) -> float:
    """Return the largest value that a scheduled scalar ever takes."""
    return max(schedule_points(value)[1]) if is_schedule(value) else value


def _interpolate(before: float, after: float, fraction: float, interpolation: str) -> float:
    if interpolation == "linear":
        return before + (after - before) * fraction
    if before <= 0 or after <= 0:
        raise ValueError(
            f"interpolation 'exp' between {before} and {after}; both values must be positive."
        )
    return math.exp(math.log(before) + (math.log(after) - math.log(before)) * fraction)
