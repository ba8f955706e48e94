"""What a random camera configuration must satisfy, said in sentences before any work starts."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real
from typing import Any

LIGHT_STRATEGIES = ("dreamfusion", "magic3d")


def plain_list(value: Any) -> list:
    """Return a number as a list of one, and any sequence (an OmegaConf list too) as a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return list(value)
    return [value]


def expand_schedule(cfg: Any, where: str = "data") -> tuple[list[int], list[int], list[int]]:
    """Return (heights, widths, batch sizes) of equal length, a single value serving all.

    Raises:
        ValueError: if a value is no positive integer, or two lists differ in length.
    """
    columns = {key: plain_list(getattr(cfg, key)) for key in ("height", "width", "batch_size")}
    for key, values in columns.items():
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"{where}.{key} has the value {value!r}; expected a positive integer, or a "
                    f"list of them with one entry per resolution."
                )
    lengths = {key: len(values) for key, values in columns.items()}
    longest = max(lengths.values())
    if any(length not in (1, longest) for length in lengths.values()):
        listed = ", ".join(f"{where}.{key} has {length}" for key, length in lengths.items())
        raise ValueError(
            f"The resolution schedule is uneven: {listed} entries. "
            f"Give each of them {longest} entries, or one number that serves all."
        )
    heights, widths, batch_sizes = (
        values if len(values) == longest else values * longest for values in columns.values()
    )
    return heights, widths, batch_sizes


def validate_camera_config(cfg: Any, where: str = "data") -> None:
    """Check every key of `random-camera-datamodule`.

    Args:
        cfg: the parsed configuration.
        where: path of the configuration in the user's file, used in the sentences.

    Raises:
        ValueError: naming the key, its value, what was expected and how to repair it.
    """
    _validate_schedule(cfg, where)
    validate_range(cfg.elevation_range, f"{where}.elevation_range", -90, 90, "degrees")
    validate_range(cfg.azimuth_range, f"{where}.azimuth_range", unit="degrees")
    validate_range(cfg.camera_distance_range, f"{where}.camera_distance_range", 0, open_low=True)
    validate_range(
        cfg.fovy_range, f"{where}.fovy_range", 0, 180, "degrees", open_low=True, open_high=True
    )
    validate_range(cfg.light_distance_range, f"{where}.light_distance_range", 0)
    for key in ("camera_perturb", "center_perturb", "up_perturb", "light_position_perturb"):
        validate_number(getattr(cfg, key), f"{where}.{key}", 0)
    for key in ("eval_height", "eval_width", "eval_batch_size", "n_val_views", "n_test_views"):
        validate_count(getattr(cfg, key), f"{where}.{key}", 1)
    validate_count(cfg.progressive_until, f"{where}.progressive_until", 0)
    validate_number(cfg.eval_elevation_deg, f"{where}.eval_elevation_deg", -90, 90)
    validate_number(cfg.eval_camera_distance, f"{where}.eval_camera_distance", 0, open_low=True)
    validate_number(
        cfg.eval_fovy_deg, f"{where}.eval_fovy_deg", 0, 180, open_low=True, open_high=True
    )
    if cfg.light_sample_strategy not in LIGHT_STRATEGIES:
        raise ValueError(
            f"{where}.light_sample_strategy is {cfg.light_sample_strategy!r}; expected one of "
            f"{', '.join(LIGHT_STRATEGIES)}."
        )


def _validate_schedule(cfg: Any, where: str) -> None:
    heights, _, _ = expand_schedule(cfg, where)
    milestones = plain_list(cfg.resolution_milestones)
    for milestone in milestones:
        validate_count(milestone, f"{where}.resolution_milestones", 1)
    if any(first >= second for first, second in pairwise(milestones)):
        raise ValueError(
            f"{where}.resolution_milestones is {milestones}; expected steps that grow, "
            f"such as [5000, 10000]."
        )
    if len(heights) > 1 and len(milestones) != len(heights) - 1:
        raise ValueError(
            f"{where}.resolution_milestones has {len(milestones)} entries ({milestones}) for "
            f"{len(heights)} resolutions; expected {len(heights) - 1}, the step at which each "
            f"next resolution begins."
        )


def validate_range(
    value: Any,
    name: str,
    low: float = float("-inf"),
    high: float = float("inf"),
    unit: str = "",
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Check that ``value`` is a pair [from, to] that is not reversed and lies in the bounds."""
    pair = plain_list(value)
    if len(pair) != 2:
        raise ValueError(
            f"{name} is {pair!r}; expected two numbers, the lower and the upper bound."
        )
    for number in pair:
        validate_number(number, name, low, high, unit, open_low, open_high)
    if pair[0] > pair[1]:
        raise ValueError(
            f"{name} is {pair}, which is reversed; write the lower bound first: {pair[::-1]}."
        )


def validate_number(
    value: Any,
    name: str,
    low: float = float("-inf"),
    high: float = float("inf"),
    unit: str = "",
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    """Check that ``value`` is a finite number in the bounds; an open bound is excluded."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    inside = number and (low < value if open_low else low <= value)
    inside = inside and (value < high if open_high else value <= high)
    if not inside or value in (float("inf"), float("-inf")):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        suffix = f" {unit}" if unit else ""
        raise ValueError(
            f"{name} has the value {value!r}; expected a number in {interval}{suffix}."
        )


def validate_count(value: Any, name: str, minimum: int) -> None:
    """Check that ``value`` is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(
            f"{name} has the value {value!r}; expected an integer of at least {minimum}."
        )
