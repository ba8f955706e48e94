"""Which words describe a view: side, front, back or overhead, by the camera's angles."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ViewCondition = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DirectionConfig:
    """A direction that prompts can name."""

    name: str
    """ "side", "front", "back" or "overhead"."""
    prompt: Callable[[str], str]
    """Turns a prompt into that of this direction."""
    negative_prompt: Callable[[str], str]
    """The same for the negative prompt."""
    condition: ViewCondition
    """(elevation, azimuth, camera_distances) -> whether a view belongs to it."""


def shift_azimuth_deg(azimuth: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Wrap azimuths in degrees to [-180, 180)."""
    return (azimuth + 180.0) % 360.0 - 180.0


def view_directions(
    front_threshold: float,
    back_threshold: float,
    overhead_threshold: float,
    name_view_first: bool = False,
) -> list[DirectionConfig]:
    """Return the contract's four directions in its order; where several hold, the later one wins.

    Args:
        front_threshold: a view is from the front where |azimuth| is below, degrees; 0 is front.
        back_threshold: from the back where |azimuth| exceeds 180 minus this, degrees.
        overhead_threshold: overhead where the elevation exceeds this, degrees.
        name_view_first: "side view of a cube" rather than "a cube, side view".
    """

    def worded(suffix: str, prefix: str) -> Callable[[str], str]:
        if name_view_first:
            return lambda prompt: f"{prefix} view of {prompt}"
        return lambda prompt: f"{prompt}, {suffix} view"

    def is_side(elevation: Tensor, azimuth: Tensor, distances: Tensor) -> Tensor:
        return torch.ones_like(elevation, dtype=torch.bool)

    def is_front(elevation: Tensor, azimuth: Tensor, distances: Tensor) -> Tensor:
        return shift_azimuth_deg(azimuth).abs() < front_threshold

    def is_back(elevation: Tensor, azimuth: Tensor, distances: Tensor) -> Tensor:
        return shift_azimuth_deg(azimuth).abs() > 180.0 - back_threshold

    def is_overhead(elevation: Tensor, azimuth: Tensor, distances: Tensor) -> Tensor:
        return elevation > overhead_threshold

    def unchanged(prompt: str) -> str:
        return prompt

    return [
        DirectionConfig("side", worded("side", "side"), unchanged, is_side),
        DirectionConfig("front", worded("front", "front"), unchanged, is_front),
        DirectionConfig("back", worded("back", "backside"), unchanged, is_back),
        DirectionConfig("overhead", worded("overhead", "overhead"), unchanged, is_overhead),
    ]


def direction_indices(
    directions: list[DirectionConfig],
    elevation: Float[Tensor, "B"],
    azimuth: Float[Tensor, "B"],
    camera_distances: Float[Tensor, "B"],
) -> Int[Tensor, "B"]:
    """Return for each view the index of the last direction whose condition holds.

    Args:
        elevation: degrees above the horizon.
        azimuth: degrees, any number of turns; 0 is the front.
        camera_distances: distances to the origin, world units.
    """
    indices = torch.zeros_like(elevation, dtype=torch.long)
    for index, direction in enumerate(directions):
        holds = direction.condition(elevation, azimuth, camera_distances)
        indices = torch.where(holds, torch.full_like(indices, index), indices)
    return indices
