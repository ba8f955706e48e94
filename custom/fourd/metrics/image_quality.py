"""How close images are to the truth: PSNR, SSIM, and overlap of silhouettes.

Images are in [0, 1], channels last.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

PSNR_CEILING_DB = 100.0
"""Reported for images that agree to the last bit or nearly so."""


def psnr(
    images: Float[Tensor, "b h w c"],
    truth: Float[Tensor, "b h w c"],
    mask: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, "b"]:
    """Peak signal-to-noise ratio of each image in dB, -10 log10 of the mean squared error.

    Args:
        mask: pixels that count; an image without any gets the ceiling.
    """
    error = (images - truth).square().mean(dim=-1)
    if mask is None:
        mean = error.flatten(1).mean(dim=1)
    else:
        kept = mask.flatten(1).to(error)
        mean = (error.flatten(1) * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
    return -10 * torch.log10(mean.clamp_min(10 ** (-PSNR_CEILING_DB / 10)))


def ssim(
    images: Float[Tensor, "b h w c"],
    truth: Float[Tensor, "b h w c"],
    mask: Bool[Tensor, "b h w"] | None = None,
) -> Float[Tensor, "b"]:
    """Structural similarity (Wang et al. 2004) of each image: Gaussian window 11, sigma 1.5.

    Args:
        mask: windows centred on these pixels count; an image without any gets 1.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    planes = images.movedim(-1, 1), truth.movedim(-1, 1)
    if mask is None:
        return structural_similarity_index_measure(*planes, data_range=1.0, reduction="none")
    _, windows = structural_similarity_index_measure(
        *planes, data_range=1.0, reduction="none", return_full_image=True
    )
    kept = mask.to(windows)
    count = kept.sum(dim=(1, 2))
    total = (windows.mean(dim=1) * kept).sum(dim=(1, 2))
    return torch.where(count > 0, total / count.clamp_min(1), 1.0)


def alpha_iou(
    alpha: Float[Tensor, "b h w 1"], truth: Float[Tensor, "b h w 1"], threshold: float = 0.5
) -> Float[Tensor, "b"]:
    """Intersection over union of the silhouettes; 1 where both are empty."""
    ours, theirs = (alpha > threshold).flatten(1), (truth > threshold).flatten(1)
    union = (ours | theirs).sum(dim=1)
    overlap = (ours & theirs).sum(dim=1)
    return torch.where(union > 0, overlap / union.clamp_min(1), 1.0).to(alpha.dtype)


def dilated_union(
    alpha: Float[Tensor, "b h w 1"], truth: Float[Tensor, "b h w 1"], radius_px: int = 2
) -> Bool[Tensor, "b h w"]:
    """Pixels within `radius_px` (a square) of either silhouette: where the object is or belongs."""
    either = torch.maximum(alpha, truth).movedim(-1, 1)
    size = 2 * radius_px + 1
    return functional.max_pool2d(either, size, stride=1, padding=radius_px)[:, 0] > 0.02
