"""Smoothness of a displacement field, seen through the renderer (4D-fy's deformation variants)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def deformation_loss(
    deformation: Float[Tensor, "frames h w 3"], num_frames: int | None = None
) -> Float[Tensor, ""]:
    """Squared total variation over time, rows and columns.

        3 (sum of squared forward differences in time, rows and columns), the mean of the channels

    Args:
        deformation: displacement rendered with the compositing weights, frames of a clip
            neighbours. The sum grows with the number of pixels, as the published weight of 100
            presumes.
        num_frames: frames per clip; None takes all as one. Several clips are averaged.

    Raises:
        ValueError: the frames are no whole clips.
    """
    num_frames = num_frames or len(deformation)
    if len(deformation) % num_frames:
        raise ValueError(
            f"deformation has {len(deformation)} frames; expected a multiple of num_frames "
            f"{num_frames}, the frames of each clip next to each other."
        )
    clips = deformation.unflatten(0, (-1, num_frames))
    differences = (clips.diff(dim=axis) for axis in (1, 2, 3))
    total = sum(difference.square().sum() for difference in differences)
    return 3.0 * total / (clips.shape[0] * clips.shape[-1])
