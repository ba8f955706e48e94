"""Image regularisers of the contract."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["tv_loss"]


def tv_loss(x: Float[Tensor, "B C H W"]) -> Float[Tensor, ""]:
    """Squared total variation: 2 (sum dh^2 / (C (H-1) W) + sum dw^2 / (C H (W-1))) / B.

    A dimension of size one has no differences and contributes nothing.
    """
    batch_size, channels, height, width = x.shape
    total = x.new_zeros(())
    if height > 1:
        total = total + torch.diff(x, dim=2).square().sum() / (channels * (height - 1) * width)
    if width > 1:
        total = total + torch.diff(x, dim=3).square().sum() / (channels * height * (width - 1))
    return 2 * total / batch_size
