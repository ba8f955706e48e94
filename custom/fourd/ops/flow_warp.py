"""Warps along optical flow: sampling, which samples can be trusted, and compositing.

Legend: b images of h x w pixels with c channels, last; flow [b 2 h w] in pixels, x right first, y
down. A pixel position is (column, row) with the centre of the first pixel at (0.5, 0.5), as in
`camera.py`. Backward flow belongs to the image that is made and says where its content is in the
image that is read: made(x) = read(x + flow(x)).

Everything is floating point: colours pass through no 8-bit cast. Nothing is random. Samples are
differentiable in the images and, for their position, in the flow; masks are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .camera import pixel_centres

MODES = ("bilinear", "bicubic", "nearest")
BORDER_SLACK_PX = 1e-3
"""How far past the outermost pixel centres a position still counts as inside: rounding only."""


@dataclass(frozen=True)
class FlowCheck:
    """When a flow and the one back again agree: |f + g| against their own lengths, in pixels.

    With ``squared``: |f + g|^2 < alpha_1 (|f|^2 + |g|^2) + alpha_2, the usual test (Sundaram et
    al. 2010); without: |f + g| < alpha_1 (|f| + |g|) + alpha_2.

    Raises:
        ValueError: a coefficient is negative.
    """

    alpha_1: float = 0.01
    """share of the motion that may disagree"""
    alpha_2: float = 0.5
    """disagreement that is always allowed, in pixels (squared where ``squared``)"""
    squared: bool = True
    """whether lengths are squared"""

    def __post_init__(self) -> None:
        for name in ("alpha_1", "alpha_2"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"{name} is {value}; expected 0 or more: larger accepts more pixels."
                )


RELEASE_CHECK = FlowCheck(0.5, 0.5, squared=False)
"""Instruct 4D-to-4D's own test, which lets half of the motion disagree."""
CHECKS = {"strict": FlowCheck(), "release": RELEASE_CHECK}


@dataclass
class FlowWarp:
    """An image carried along a flow."""

    warped: Float[Tensor, "b h w c"]
    """the reference as it would look at the target, in [0, 1]; meaningless where not valid"""
    is_valid: Bool[Tensor, "b h w"]
    """where the reference shows the target's content"""
    composite: Float[Tensor, "b h w c"]
    """warped where valid, the target's current content elsewhere"""


def sample_at(
    images: Float[Tensor, "b h w c"],
    pixels: Float[Tensor, "b h2 w2 2"],
    mode: str = "bilinear",
) -> Float[Tensor, "b h2 w2 c"]:
    """Return images at pixel positions; outside, the border's values go on.

    Args:
        images: any values.
        pixels: (column, row), the first pixel's centre at (0.5, 0.5).
        mode: "bilinear", "bicubic" (a = -0.75, as OpenCV's; overshoots at edges) or "nearest".

    Raises:
        ValueError: ``mode`` is unknown.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}.")
    size = pixels.new_tensor([images.shape[2], images.shape[1]])
    # With align_corners=False, -1 and 1 are the outer edges of the outermost pixels: 0 and W here.
    grid = 2 * pixels / size - 1
    found = functional.grid_sample(
        images.movedim(-1, 1), grid.to(images), mode, padding_mode="border", align_corners=False
    )
    return found.movedim(1, -1)


def is_inside(pixels: Float[Tensor, "*batch 2"], height: int, width: int) -> Bool[Tensor, "*batch"]:
    """Whether positions lie within the outermost pixel centres, so that nothing is extrapolated.

    This is stricter than "within the image" by half a pixel. NaN is outside.
    """
    low = 0.5 - BORDER_SLACK_PX
    x, y = pixels[..., 0], pixels[..., 1]
    return (x >= low) & (x <= width - low) & (y >= low) & (y <= height - low)


def flow_positions(flow: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b h w 2"]:
    """Return where each pixel's flow points: its own centre plus the flow."""
    return pixel_centres(flow.shape[-2], flow.shape[-1], flow) + flow.movedim(1, -1)


def backward_warp(
    images: Float[Tensor, "b h w c"], flow: Float[Tensor, "b 2 h w"], mode: str = "bicubic"
) -> tuple[Float[Tensor, "b h w c"], Bool[Tensor, "b h w"]]:
    """Return ``images`` sampled along a backward flow, and where the sample is inside.

    Args:
        images: what is read.
        flow: of the image that is made, towards ``images``, in pixels.
        mode: see `sample_at`.

    Raises:
        ValueError: the shapes do not fit, or ``mode`` is unknown.
    """
    _check_shapes(images, flow, "flow")
    pixels = flow_positions(flow)
    inside = is_inside(pixels, images.shape[1], images.shape[2])
    return sample_at(images, pixels, mode), inside


def round_trip_error(
    flow: Float[Tensor, "b 2 h w"], flow_back: Float[Tensor, "b 2 h w"]
) -> tuple[Float[Tensor, "b 2 h w"], Float[Tensor, "b 2 h w"]]:
    """Follow a flow and the one back again.

    Args:
        flow: of these pixels, towards another image.
        flow_back: of that image's pixels, towards this one.

    Returns:
        error: flow + returned, zero where both are exact and the content is seen in both.
        returned: ``flow_back`` where ``flow`` points, bilinear.
    """
    if flow.shape != flow_back.shape:
        raise ValueError(
            f"flow has shape {tuple(flow.shape)} and flow_back {tuple(flow_back.shape)}; expected "
            "the same (images, x and y, height, width)."
        )
    returned = sample_at(flow_back.movedim(1, -1), flow_positions(flow)).movedim(-1, 1)
    return flow + returned, returned


def valid_flow(
    flow: Float[Tensor, "b 2 h w"],
    flow_back: Float[Tensor, "b 2 h w"],
    check: FlowCheck | None = None,
) -> Bool[Tensor, "b h w"]:
    """Where a flow leads inside the other image and the flow from there leads back.

    Args:
        flow: of these pixels, towards another image.
        flow_back: of that image's pixels, towards this one.
        check: how closely; None is the usual squared test.
    """
    check = check or FlowCheck()
    error, returned = round_trip_error(flow, flow_back)
    power = 2 if check.squared else 1
    lengths = [field.norm(dim=1) ** power for field in (error, flow, returned)]
    agrees = lengths[0] < check.alpha_1 * (lengths[1] + lengths[2]) + check.alpha_2
    return agrees & is_inside(flow_positions(flow), *flow.shape[-2:])


def composite(
    warped: Float[Tensor, "b h w c"],
    current: Float[Tensor, "b h w c"],
    is_valid: Bool[Tensor, "b h w"],
    ratio: float = 1.0,
) -> Float[Tensor, "b h w c"]:
    """Return ``warped`` where it is valid and ``current`` elsewhere.

    Args:
        ratio: share of ``warped`` where it is valid, in [0, 1]; the rest is ``current``.

    Raises:
        ValueError: ``ratio`` is outside of [0, 1].
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio is {ratio}; expected the share of the warped image, 0 to 1.")
    # At 0 and 1 no arithmetic touches the colours: what is kept is kept to the last bit.
    mixed = warped if ratio == 1 else torch.lerp(current, warped, ratio)
    return torch.where(is_valid.unsqueeze(-1), mixed, current)


def warp_by_flow(
    reference: Float[Tensor, "b h w c"],
    current: Float[Tensor, "b h w c"],
    flow: Float[Tensor, "b 2 h w"],
    flow_back: Float[Tensor, "b 2 h w"],
    check: FlowCheck | None = None,
    mode: str = "bicubic",
    ratio: float = 1.0,
) -> FlowWarp:
    """Carry the look of a reference image over to other images of the same content.

    Args:
        reference: images that are read, such as edited ones, in [0, 1].
        current: what the targets hold now, in [0, 1]; kept where the flow is not valid.
        flow: of the targets' pixels, towards the reference.
        flow_back: of the reference's pixels, towards the targets.
        check: when the two flows agree; None is the usual squared test.
        mode: see `sample_at`.
        ratio: see `composite`.

    Raises:
        ValueError: see `backward_warp` and `composite`.
    """
    _check_shapes(current, flow, "flow")
    warped, _ = backward_warp(reference, flow, mode)
    warped = warped.clamp(0, 1)
    is_valid = valid_flow(flow, flow_back, check)
    return FlowWarp(warped, is_valid, composite(warped, current, is_valid, ratio))


def average_along_flow(
    images: Float[Tensor, "n h w c"],
    originals: Float[Tensor, "n h w c"],
    flows: Callable[[int, int], tuple[Float[Tensor, "2 h w"], Float[Tensor, "2 h w"]]],
    reach: int,
    agreement: float,
    check: FlowCheck | None = None,
) -> tuple[Float[Tensor, "n h w c"], Bool[Tensor, "n h w"]]:
    """Average consecutive images along the motion of the originals that they were made from.

    Each becomes the mean of itself and of its neighbours carried over to it, where the two flows
    agree and the carried original looks like the one that is there. The second test finds wrong
    flow where little texture tells, or where light changes, which the first one misses.

    Args:
        images: such as edited frames of one camera by time, in [0, 1].
        originals: the same frames before, in [0, 1].
        flows: (of, towards), positions in ``images`` -> the flow and the one back, in pixels.
        reach: neighbours that count on both sides.
        agreement: largest difference of the originals' colours, in any channel.
        check: when the two flows agree.

    Returns:
        The means, and where any neighbour took part.
    """
    found, is_joined = [], []
    for place in range(len(images)):
        total, count = images[place].clone(), torch.ones_like(images[place, ..., :1])
        for other in range(max(0, place - reach), min(len(images), place + reach + 1)):
            if other == place:
                continue
            flow, flow_back = (part[None] for part in flows(place, other))
            here = originals[place][None]
            edit = warp_by_flow(images[other][None], here, flow, flow_back, check)
            seen, _ = backward_warp(originals[other][None], flow, "bilinear")
            is_same = (seen - here).abs().amax(dim=-1) <= agreement
            counts = (edit.is_valid & is_same)[0].unsqueeze(-1)
            total += torch.where(counts, edit.warped[0], 0.0)
            count += counts
        found.append(total / count)
        is_joined.append(count[..., 0] > 1)
    return torch.stack(found), torch.stack(is_joined)


def _check_shapes(images: Tensor, flow: Tensor, name: str) -> None:
    expected = (images.shape[0], 2, *images.shape[1:3])
    if flow.ndim != 4 or tuple(flow.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(flow.shape)}; expected {expected} (images, x and y, height, "
            f"width) for images of shape {tuple(images.shape)} (images, height, width, channels)."
        )
