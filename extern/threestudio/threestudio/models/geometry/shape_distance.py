"""Distances of the shapes that a geometry may begin with."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def shape_distance(
    shape: str, params: Any, points: Float[Tensor, "*N 3"], key: str
) -> Float[Tensor, "*N 1"]:
    """Return the distance of world points to a shape around the origin, negative inside.

    "sphere" of radius r: |x| - r. "ellipsoid" of half-axes s: |x / s| - 1, zero on the surface but
    no Euclidean distance elsewhere.

    Args:
        shape: "sphere" or "ellipsoid".
        params: r, or the three numbers s, in world units.
        points: where to ask.
        key: name of the config key of ``shape``, for the messages; ``params`` is its ``_params``.

    Raises:
        ValueError: an unknown shape, or parameters that do not describe it.
    """
    if shape == "sphere":
        if not _positive(params):
            raise ValueError(
                f"{key}_params is {params!r}; expected a positive number, the sphere's radius."
            )
        return points.norm(dim=-1, keepdim=True) - float(params)
    if shape == "ellipsoid":
        sizes = list(params) if isinstance(params, Sequence) else []
        if len(sizes) != 3 or not all(_positive(size) for size in sizes):
            raise ValueError(
                f"{key}_params is {params!r}; expected three positive numbers, the ellipsoid's "
                "half-axes, such as [0.4, 0.4, 0.6]."
            )
        scaled = points / torch.tensor([float(s) for s in sizes]).to(points)
        return scaled.norm(dim=-1, keepdim=True) - 1.0
    if str(shape).startswith("mesh:"):
        raise ValueError(
            f"{key} is {shape!r}; expected sphere or ellipsoid, since distances to a mesh need "
            "pysdf, which this runtime does not use."
        )
    raise ValueError(f"{key} is {shape!r}; expected sphere or ellipsoid.")


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
