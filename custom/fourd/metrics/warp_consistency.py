"""Do images of one scene agree where they show the same surface? Differences along a known motion.

Legend: b pairs of images of h x w pixels with c channels, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Iterable

from jaxtyping import Bool, Float
from torch import Tensor

from custom.fourd.ops.flow_warp import flow_positions, sample_at


def warped_difference(
    images: Float[Tensor, "b h w c"],
    others: Float[Tensor, "b h w c"],
    flow: Float[Tensor, "b 2 h w"],
    is_visible: Bool[Tensor, "b h w"],
) -> Float[Tensor, "b"]:
    """Mean |others(x + flow(x)) - images(x)| over what both show, in colour units; NaN if nothing.

    The truth's own value is not zero: sampling blurs, and light changes as things move.

    Args:
        flow: of the pixels of ``images`` towards ``others``, in pixels.
        is_visible: where the content is seen in both.
    """
    there = sample_at(others, flow_positions(flow))
    difference = (there - images).abs().mean(dim=-1)
    kept = is_visible.to(difference)
    return (difference * kept).sum(dim=(1, 2)) / kept.sum(dim=(1, 2))


def mean_of(values: Iterable[float]) -> float | None:
    """Mean of the numbers that are not NaN; None without any."""
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else None
