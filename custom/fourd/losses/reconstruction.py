"""How far rendered colours are from seen ones, and how restless a field is in space and time.

Legend: n rays or points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CHARBONNIER_EPS = 1e-3
COLOR_LOSSES = ("mse", "charbonnier")

Field = Callable[[Tensor, Tensor], Tensor]


def color_loss(
    rgb: Float[Tensor, "*n 3"], seen: Float[Tensor, "*n 3"], kind: str = "mse"
) -> Float[Tensor, ""]:
    """Mean distance of colours in [0, 1].

    Args:
        kind: "mse", the mean of d^2; or "charbonnier", the mean of sqrt(d^2 + eps^2) - eps with
            eps = 1e-3, which is nearly |d| and forgives single pixels.

    Raises:
        ValueError: another kind.
    """
    squared = (rgb - seen).square()
    if kind == "mse":
        return squared.mean()
    if kind == "charbonnier":
        return ((squared + CHARBONNIER_EPS**2).sqrt() - CHARBONNIER_EPS).mean()
    raise ValueError(f"color_loss is {kind!r}; expected one of {', '.join(COLOR_LOSSES)}.")


def space_variation_loss(
    field: Field,
    points: Float[Tensor, "n 3"],
    frame_times: Float[Tensor, "n"],
    offsets: Float[Tensor, "n 3"],
) -> Float[Tensor, ""]:
    """Mean |f(x + offset, t) - f(x, t)|: total variation in space, sampled.

    Args:
        field: takes points [n 3] and times [n], returns values [n c]; densities should come as
            opacities, for which a solid is as good as a denser one.
        points: in the units of the field. offsets: in the same units.
    """
    return (field(points + offsets, frame_times) - field(points, frame_times)).abs().mean()


def time_variation_loss(
    field: Field,
    points: Float[Tensor, "n 3"],
    frame_times: Float[Tensor, "n"],
    time_step: float,
) -> Float[Tensor, ""]:
    """Mean |f(x, t + step) - f(x, t)|: total variation in time, sampled.

    Times past 1 are compared with the time one step earlier instead.

    Args:
        field: as in `space_variation_loss`. time_step: in scene time, in (0, 1].
    """
    later = frame_times + time_step
    later = torch.where(later > 1.0, frame_times - time_step, later).clamp(0.0, 1.0)
    return (field(points, later) - field(points, frame_times)).abs().mean()


def surface_variation_loss(
    rgb: Float[Tensor, "n 3"], beside: Float[Tensor, "n 3"], weights: Float[Tensor, "n"]
) -> Float[Tensor, ""]:
    """Mean |difference| of the colours of two places near each other on a surface.

    Like total variation it lets colours jump at edges, which costs no more than to spread the
    change, and takes noise from even faces.

    Args:
        weights: of the pairs, in [0, 1]; 0 where there is no surface. All 0 gives 0.
    """
    differences = (rgb - beside).abs().mean(dim=-1)
    return (weights * differences).sum() / weights.sum().clamp_min(1.0)
