"""Does a scene move as the truth does? Curves over time, compared in shape and in size.

Legend: v views (fixed cameras), t times over the clip, h x w pixels, n values of a curve. Clips are
renders over one constant background, [v t h w c] in [0, 1]; the truth's clips show the same cameras
at the same times. A curve has a value (or n) per view and time; both curves lose their mean over
time before they are compared, so that a wrong place, size or colour that does not change counts
for nothing here; PSNR answers for those.

Every motion word of the world shows in one curve (`CURVE_OF_MOTION`): where an object moves, in the
silhouette's centroid; where it grows or shrinks, in the silhouette's area; where it spins, in how
the image changes, since the silhouette of a sphere says nothing. No curve needs to know which
pixel belongs to which object. Nothing is random; nothing here is meant to be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .image_quality import psnr

CHANGE_CELLS = 16
"""Rows and columns of means that `image_change` sees; blurred edges matter little at this size."""
LEAST_AMPLITUDE_RATIO = 0.01
"""A scene that moves less than this share of the truth is at rest; its correlation is 0."""
LEAST_MOVEMENT = 1e-6
"""A truth whose curve departs less than this from its mean (root mean square) is at rest."""


@dataclass(frozen=True)
class CurveAgreement:
    """How a curve follows the truth's."""

    correlation: float
    """Pearson's, in [-1, 1], over all views and times together: 1 right, 0 at rest or unrelated,
    negative where the scene moves against the truth. NaN where the truth is at rest."""
    amplitude_ratio: float
    """Root mean square of the departure from the mean over time, over the truth's: 1 right, 0 at
    rest. NaN where the truth is at rest."""


def centroid_path(alpha: Float[Tensor, "v t h w 1"]) -> Float[Tensor, "v t 2"]:
    """Mean pixel position weighted by alpha: x right, y down, in heights of the image.

    The image's centre is (0, 0); that is also the value of an empty image.
    """
    height, width = alpha.shape[2:4]
    x = (torch.arange(width, dtype=alpha.dtype) + 0.5 - width / 2) / height
    y = (torch.arange(height, dtype=alpha.dtype) + 0.5 - height / 2) / height
    weight = alpha[..., 0]
    mass = weight.sum(dim=(2, 3)).clamp_min(1e-6)
    moments = ((weight.sum(dim=2) * x.to(alpha)).sum(-1), (weight.sum(dim=3) * y.to(alpha)).sum(-1))
    return torch.stack([moment / mass for moment in moments], dim=-1)


def area_curve(alpha: Float[Tensor, "v t h w 1"]) -> Float[Tensor, "v t 1"]:
    """Share of the image that the silhouette covers, in [0, 1]."""
    return alpha.mean(dim=(2, 3))


def image_change(
    rgb: Float[Tensor, "v t h w c"], cells: int = CHANGE_CELLS
) -> Float[Tensor, "v t n"]:
    """Mean colours of a regular grid of cells; n = cells * cells * c.

    With its mean over time taken off, this is what changes in the image. Seen from all sides, a
    spin and its reverse are almost uncorrelated in it (below 0.2 for every shape of the world), and
    so are a spin and one at another speed.
    """
    flat = rgb.flatten(0, 1).movedim(-1, 1)
    return functional.adaptive_avg_pool2d(flat, cells).flatten(1).unflatten(0, rgb.shape[:2])


def compare_curves(curve: Float[Tensor, "v t n"], truth: Float[Tensor, "v t n"]) -> CurveAgreement:
    """Correlation with the truth's curve, and the ratio of amplitudes.

    All views count together, each by how much the truth moves in it: a view along the direction of
    a motion, in which next to nothing moves, neither helps nor harms.

    Raises:
        ValueError: the curves differ in shape or have fewer than two times.
    """
    if curve.shape != truth.shape or curve.shape[1] < 2:
        raise ValueError(
            f"curves have shapes {tuple(curve.shape)} and {tuple(truth.shape)}; expected the same "
            "(views, times, values) with at least 2 times. Render both at the same times."
        )
    ours, theirs = (_departure(values) for values in (curve, truth))
    true_norm = float(theirs.norm())
    if true_norm / math.sqrt(max(theirs.numel(), 1)) < LEAST_MOVEMENT:
        return CurveAgreement(math.nan, math.nan)
    ratio = float(ours.norm()) / true_norm
    if ratio < LEAST_AMPLITUDE_RATIO:
        return CurveAgreement(0.0, ratio)
    correlation = float((ours * theirs).sum()) / (ratio * true_norm**2)
    return CurveAgreement(max(-1.0, min(1.0, correlation)), ratio)


def _departure(curve: Tensor) -> Tensor:
    curve = curve.double()
    return curve - curve.mean(dim=1, keepdim=True)


Curve = Callable[[Tensor, Tensor], Tensor]
CURVES: dict[str, Curve] = {
    "centroid": lambda rgb, alpha: centroid_path(alpha),
    "area": lambda rgb, alpha: area_curve(alpha),
    "change": lambda rgb, alpha: image_change(rgb),
}
CURVE_OF_MOTION = {
    "bouncing": "centroid",
    "sliding": "centroid",
    "orbiting": "centroid",
    "growing": "area",
    "shrinking": "area",
    "spinning": "change",
}
"""Which curve shows a motion word."""


def compare_motions(
    motions: Sequence[str],
    rgb: Float[Tensor, "v t h w 3"],
    alpha: Float[Tensor, "v t h w 1"],
    truth_rgb: Float[Tensor, "v t h w 3"],
    truth_alpha: Float[Tensor, "v t h w 1"],
) -> dict[str, CurveAgreement]:
    """How each motion of a scene agrees with the truth, by its word.

    Two objects share one silhouette, so that the curve of a word also holds what the other object
    does to it; the truth's curve does too.
    """
    found = {}
    for motion in motions:
        curve = CURVES[CURVE_OF_MOTION[motion]]
        found[motion] = compare_curves(curve(rgb, alpha), curve(truth_rgb, truth_alpha))
    return found


def best_static_psnr(truth: Float[Tensor, "v t h w c"]) -> Float[Tensor, "v t"]:
    """PSNR in dB of the best picture that does not move: each view's mean over the truth's times.

    No other constant picture has a smaller squared error over the clip. What a moving scene must
    beat; the ceiling where the truth is at rest.
    """
    still = truth.mean(dim=1, keepdim=True).expand_as(truth)
    return clip_psnr(still, truth)


def clip_psnr(
    clips: Float[Tensor, "v t h w c"], truth: Float[Tensor, "v t h w c"]
) -> Float[Tensor, "v t"]:
    """PSNR in dB of every image of every clip."""
    return psnr(clips.flatten(0, 1), truth.flatten(0, 1)).view(clips.shape[:2])
