"""Does an image show the time and the view that were asked for? The truth's nearest neighbour says.

A generated image is compared with the true images of all times (its camera fixed), or of all
azimuths (its time fixed): the nearest one is the time, or the azimuth, that it shows. Moments that
no image can tell apart (the two halves of a bounce, the sides of a cylinder) count as one: the
nearest one's twin that lies closest to what was asked for is taken.

Legend: n images of h x w pixels, c candidates (times or azimuths), f features. Nothing is random;
nothing here is meant to be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

SQUARES = 16
"""Rows and columns of means that images are compared by."""
PIXEL_SPACE = f"mean colours of {SQUARES} x {SQUARES} squares"
FULL_TURN_DEG = 360.0
LOOK_ALIKE_RMS = 1.0 / 255.0
"""True images that differ by less, root mean square, are one and the same to any observer."""
_LEAST = 1e-6


def pixel_features(rgb: Float[Tensor, "n h w 3"], squares: int = SQUARES) -> Float[Tensor, "n f"]:
    """Mean colours of a regular grid of squares; f = squares * squares * 3."""
    return functional.adaptive_avg_pool2d(rgb.permute(0, 3, 1, 2), squares).flatten(1)


@dataclass(frozen=True)
class Candidates:
    """True images to look among, by what is needed of them."""

    features: Float[Tensor, "c f"]
    look_alike: Bool[Tensor, "c c"]
    gaps: Float[Tensor, "c c"]
    """how far apart any two are: frames, or degrees"""

    @classmethod
    def of(
        cls,
        rgb: Float[Tensor, "c h w 3"],
        features: Float[Tensor, "c f"],
        gaps: Float[Tensor, "c c"],
    ) -> Candidates:
        """Candidates from their images.

        Raises:
            ValueError: numbers of images, features and gaps differ.
        """
        if not len(rgb) == len(features) == len(gaps):
            raise ValueError(
                f"there are {len(rgb)} images, {len(features)} features and {len(gaps)} gaps; "
                "expected one of each for every candidate."
            )
        flat = rgb.flatten(1)
        rms = torch.cdist(flat.double(), flat.double()) / math.sqrt(flat.shape[1])
        return cls(features, rms < LOOK_ALIKE_RMS, gaps)

    def find(self, features: Float[Tensor, "f"], requested: int) -> tuple[int, float]:
        """What an image shows, and how far that is from what was asked for.

        Args:
            features: of the image.
            requested: the candidate that was asked for.

        Returns:
            The place of the candidate, and its gap to the requested one.
        """
        nearest = int((self.features - features).square().sum(dim=1).argmin())
        from_requested = self.gaps[requested].masked_fill(~self.look_alike[nearest], math.inf)
        # The nearest one looks like itself, whatever rounding says.
        from_requested[nearest] = self.gaps[requested, nearest]
        place = int(from_requested.argmin())
        return place, float(self.gaps[requested, place])


def frame_gaps(frame_times: Float[Tensor, "c"], loops: bool = False) -> Float[Tensor, "c c"]:
    """Frames between any two times, in units of the mean distance of neighbours.

    Args:
        frame_times: in [0, 1], growing.
        loops: time 1 is time 0 again, so that the short way may lead over the end.
    """
    apart = (frame_times[:, None] - frame_times[None]).abs()
    count = len(frame_times)
    spacing = (frame_times[-1] - frame_times[0]) / max(1, count - 1)
    if loops:
        apart = torch.minimum(apart, 1.0 - apart)
    return apart / spacing if float(spacing) > 0 else apart


def azimuth_gaps_deg(azimuths_deg: Float[Tensor, "c"]) -> Float[Tensor, "c c"]:
    """Degrees between any two azimuths, the short way round."""
    apart = (azimuths_deg[:, None] - azimuths_deg[None]).abs() % FULL_TURN_DEG
    return torch.minimum(apart, FULL_TURN_DEG - apart)


def followed(
    requested: Sequence[float], recovered: Sequence[float], period: float | None = None
) -> float | None:
    """Pearson's correlation of recovered with requested values, in [-1, 1]; None if one is fixed.

    Args:
        requested: what was asked for. recovered: what the images show.
        period: where values wrap; they are then compared as points of a circle.
    """
    ours, theirs = (_centred(values, period) for values in (recovered, requested))
    scale = float(ours.norm() * theirs.norm())
    return float((ours * theirs).sum()) / scale if scale > _LEAST else None


def _centred(values: Sequence[float], period: float | None) -> Tensor:
    points = torch.tensor(list(values), dtype=torch.float64)
    if period is None:
        points = points[:, None]
    else:
        angle = points * (2 * math.pi / period)
        points = torch.stack((angle.cos(), angle.sin()), dim=-1)
    return points - points.mean(dim=0)


@dataclass(frozen=True)
class Reversal:
    """What happens when the sign of a control is turned round."""

    correlation: float
    """Of the difference between both images with the true one, in [-1, 1]: 1 reverses as the truth
    does, 0 does not react, negative moves the wrong way."""
    share: float
    """Of probes whose two images are each nearer to their own truth than to the other's."""


def reversal(
    forward: Float[Tensor, "n f"],
    backward: Float[Tensor, "n f"],
    true_forward: Float[Tensor, "n f"],
    true_backward: Float[Tensor, "n f"],
) -> Reversal | None:
    """Compare images with a control and with its reverse; None where the truth does not differ.

    Args:
        forward, backward: features of generated images. true_forward, true_backward: of the truth.
    """
    ours, theirs = forward - backward, true_forward - true_backward
    scale = float(theirs.norm())
    if scale < _LEAST:
        return None
    own = float(ours.norm())
    correlation = float((ours * theirs).sum()) / (own * scale) if own > _LEAST else 0.0
    right = (forward - true_forward).norm(dim=1) < (forward - true_backward).norm(dim=1)
    right &= (backward - true_backward).norm(dim=1) < (backward - true_forward).norm(dim=1)
    return Reversal(correlation, float(right.double().mean()))
