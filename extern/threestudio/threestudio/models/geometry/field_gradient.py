"""The slope of a scalar field, from which geometries take their normals.

Shapes: ``*N`` any number of leading dimensions of points. Points are in world units.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

NORMAL_TYPES = ("finite_difference", "finite_difference_laplacian", "pred", "analytic")


def check_normal_type(normal_type: str | None, known: tuple[str, ...] = NORMAL_TYPES) -> None:
    """Raise a ValueError unless ``normal_type`` is one of the known ways to a normal, or None."""
    if normal_type is not None and normal_type not in known:
        raise ValueError(
            f"normal_type is {normal_type!r}; expected one of {', '.join(known)} or null."
        )


def finite_difference(
    field: Callable[[Float[Tensor, "*N k 3"]], Float[Tensor, "*N k 1"]],
    points: Float[Tensor, "*N 3"],
    values: Float[Tensor, "*N 1"],
    eps: float,
    is_central: bool,
    radius: float | None = None,
) -> Float[Tensor, "*N 3"]:
    """Return the slope of a field from its values a step away along each axis.

    Args:
        field: the field at other points.
        points: where the slope is wanted.
        values: the field there, for the one-sided difference.
        eps: step.
        is_central: take the difference of both sides, at twice the evaluations.
        radius: keep the neighbours within [-radius, radius] on each axis, if given.
    """
    offsets = torch.eye(3, dtype=points.dtype, device=points.device) * eps
    if is_central:
        offsets = torch.cat([offsets, -offsets])
    neighbours = points[..., None, :] + offsets
    if radius is not None:
        neighbours = neighbours.clamp(-radius, radius)
    around = field(neighbours)[..., 0]
    if is_central:
        return 0.5 * (around[..., :3] - around[..., 3:]) / eps
    return (around - values) / eps


@contextmanager
def differentiable(
    points: Float[Tensor, "*N 3"], is_needed: bool
) -> Iterator[Float[Tensor, "*N 3"]]:
    """Give points by which a field can be differentiated inside, though evaluation keeps no graph.

    Args:
        points: given back as they are unless needed otherwise.
        is_needed: whether a derivative will be taken.
    """
    if not is_needed:
        yield points
        return
    with torch.enable_grad():
        yield points if points.requires_grad else points.detach().requires_grad_(True)


def analytic_gradient(
    values: Float[Tensor, "*N 1"], points: Float[Tensor, "*N 3"], keeps_graph: bool
) -> Float[Tensor, "*N 3"]:
    """Return d values / d points; the slope has a gradient itself with ``keeps_graph``."""
    return torch.autograd.grad(
        values,
        points,
        grad_outputs=torch.ones_like(values),
        create_graph=keeps_graph,
        retain_graph=True,
    )[0]
