"""Regularisers of volume rendering that the systems of the contract share."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from threestudio.utils.ops import binary_cross_entropy


def sparsity_loss(opacity: Float[Tensor, "*batch 1"]) -> Float[Tensor, ""]:
    """Mean of sqrt(O^2 + 0.01): pulls accumulated opacity to zero."""
    return (opacity.square() + 0.01).sqrt().mean()


def opaque_loss(opacity: Float[Tensor, "*batch 1"]) -> Float[Tensor, ""]:
    """Binary entropy of the opacity, clamped to [1e-3, 1 - 1e-3]: pulls it to 0 or 1."""
    clamped = opacity.clamp(1e-3, 1 - 1e-3)
    return binary_cross_entropy(clamped, clamped)


def z_variance_loss(
    z_variance: Float[Tensor, "*batch 1"], opacity: Float[Tensor, "*batch 1"]
) -> Float[Tensor, ""]:
    """Mean depth variance of the rays that hit something (O > 0.5); 0 where none does."""
    kept = (opacity > 0.5).to(z_variance)
    return (z_variance * kept).sum() / kept.sum().clamp_min(1)


def orientation_loss(
    weights: Float[Tensor, "n 1"],
    normals: Float[Tensor, "n 3"],
    t_dirs: Float[Tensor, "n 3"],
    opacity: Float[Tensor, "*batch 1"],
) -> Float[Tensor, ""]:
    """Sum of w max(0, n . d)^2 over samples per ray with O > 0 (Ref-NeRF); weights are constant.

    Normals that face away from the camera where the surface is seen are penalised.
    """
    facing_away = (normals * t_dirs).sum(dim=-1, keepdim=True).clamp_min(0)
    return (weights.detach() * facing_away.square()).sum() / (opacity > 0).sum().clamp_min(1)


def eikonal_loss(
    sdf_grad: Float[Tensor, "n 3"], is_padding: Bool[Tensor, "n 1"] | None = None
) -> Float[Tensor, ""]:
    """Mean of (|grad| - 1)^2: the gradient of a signed distance has length one.

    Args:
        sdf_grad: at the samples.
        is_padding: samples that only fill a list and do not count.
    """
    errors = (sdf_grad.norm(dim=-1) - 1.0).square()
    if is_padding is None:
        return errors.mean()
    counts = ~is_padding[:, 0]
    return torch.where(counts, errors, 0.0).sum() / counts.sum().clamp_min(1)
