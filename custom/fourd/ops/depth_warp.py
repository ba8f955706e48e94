"""Warps between cameras by depth: what one camera sees, fetched from the images of others.

Legend: n views of h x w pixels, k of them keys (images that are read), c channels. Cameras as in
`camera.py`; ``depth`` is the Euclidean distance along the unit ray in world units, 0 where it is
not known (background, missing lidar). All views show one moment, or only what stands still.

Nothing is random. Colours are differentiable in the images; masks and positions are not meant to be
differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from .camera import camera_rays, points_from_depth, project_points
from .flow_warp import composite, is_inside, sample_at

MIN_Z_DEPTH = 1e-6
"""Points must be farther than this in front of a camera's plane, in world units."""


@dataclass(frozen=True)
class DepthCheck:
    """When a key view sees the same surface point as the target, by depth.

    Thresholds are shares of the distance, so that near and far content is treated alike; one
    absolute threshold, as published, makes the far background rarely valid.

    Raises:
        ValueError: a threshold is negative, or all are zero.
    """

    relative: float = 0.02
    """largest |depth of the key view - distance of the point|, as a share of that distance"""
    edge: float = 0.1
    """largest range of depth among the four pixels of a bilinear sample, as a share of the
    distance: a sample across a silhouette mixes two surfaces. 0 switches the test off"""
    border_px: int = 1
    """pixels as close as this to a silhouette (a range of depth as above, or unknown depth) are
    neither read nor made: their colour is a mixture. 0 covers more and is less exact"""
    absolute: float = 0.0
    """added to ``relative`` times the distance, in world units; the release's only threshold"""

    def __post_init__(self) -> None:
        for name in ("relative", "edge", "absolute"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(f"{name} is {value}; expected 0 or more.")
        if isinstance(self.border_px, bool) or self.border_px not in range(100):
            raise ValueError(
                f"border_px is {self.border_px}; expected a whole number from 0 to 99."
            )
        if self.relative == 0 and self.absolute == 0:
            raise ValueError(
                "relative and absolute are both 0, so no depth could ever agree; expected one "
                "above 0."
            )


@dataclass
class Reprojection:
    """Where the pixels of a target view are in key views."""

    pixels: Float[Tensor, "k h w 2"]
    """(column, row) in each key view; meaningless where not valid"""
    is_valid: Bool[Tensor, "k h w"]
    """in front of the key's camera, inside its image, and not hidden by another surface"""


@dataclass
class DepthWarp:
    """What key views show of a target view, averaged."""

    image: Float[Tensor, "h w c"]
    """zero where not covered"""
    is_covered: Bool[Tensor, "h w"]
    """where at least one key view sees the target's surface"""
    coverage: Float[Tensor, "k"]
    """share of the target that each key view sees, in [0, 1]: also its weight in the average"""


class DepthWarper:
    """The geometry of a set of views, laid out once on the device of the depth.

    Args:
        depth: of every view; finite, 0 where it is not known.
        c2w: camera poses.
        intrinsics: pinhole matrices in pixels.
        check: when a sample is accepted; None is `DepthCheck()`.

    Raises:
        ValueError: shapes do not fit, or depth is negative or not finite.
    """

    def __init__(
        self,
        depth: Float[Tensor, "n h w"],
        c2w: Float[Tensor, "n 4 4"],
        intrinsics: Float[Tensor, "n 3 3"],
        check: DepthCheck | None = None,
    ) -> None:
        _check_views(depth, c2w, intrinsics)
        self.check = check or DepthCheck()
        self.depth = _off_silhouettes(depth, self.check)
        self.c2w, self.intrinsics = c2w.to(depth), intrinsics.to(depth)
        self._nearest, self._farthest = _neighbourhood(depth)

    def __len__(self) -> int:
        return len(self.depth)

    def reproject(self, target: int, keys: Sequence[int]) -> Reprojection:
        """Return where the surface that a view sees is in other views.

        Args:
            target: a view.
            keys: views to look into; the target itself may be one.

        Raises:
            ValueError: a view does not exist, or no key is given.
        """
        keys = self._views(keys)
        (target,) = self._views([target])
        _, height, width = self.depth.shape
        points = self._points(target).view(1, -1, 3).expand(len(keys), -1, 3)
        c2w = self.c2w[keys]
        pixels, z_depth = project_points(points, c2w, self.intrinsics[keys])
        distance = (points - c2w[:, None, :3, 3]).norm(dim=-1).view(-1, height, width)
        pixels = pixels.view(-1, height, width, 2)
        is_valid = self.depth[target] > 0
        is_valid = is_valid & (z_depth.view_as(distance) > MIN_Z_DEPTH)
        is_valid = is_valid & is_inside(pixels, height, width)
        # What lies behind a camera projects anywhere, to infinity too.
        pixels = torch.where(is_valid.unsqueeze(-1), pixels, 0.5)
        return Reprojection(pixels, is_valid & self._is_seen(keys, pixels, distance))

    def warp(
        self,
        images: Float[Tensor, "n h w c"],
        target: int,
        keys: Sequence[int],
        mode: str = "bilinear",
    ) -> DepthWarp:
        """Fetch a view's content from key views: sum_j M_j w_j I_j / sum_j M_j w_j.

        M_j is where key j is valid, and w_j the share of the target that it covers. The result
        does not depend on the order of ``keys``, to the last bit.

        Args:
            images: of all views, though only those of ``keys`` are read.
            target: the view that is made.
            keys: views that are read; the target may be one.
            mode: see `flow_warp.sample_at`.

        Raises:
            ValueError: see `reproject`, or the images do not fit the depth.
        """
        if images.ndim != 4 or images.shape[:3] != self.depth.shape:
            raise ValueError(
                f"images has shape {tuple(images.shape)}; expected {(*self.depth.shape, 3)} "
                "(views, height, width, channels), one per view of the warper."
            )
        # Sums of floats depend on their order in the last bit, so there is only one order.
        order = sorted(self._views(keys))
        found = self.reproject(target, order)
        colours = sample_at(images[order], found.pixels, mode)
        coverage = found.is_valid.to(colours).mean(dim=(1, 2))
        weights = found.is_valid.to(colours) * coverage[:, None, None]
        total = weights.sum(dim=0)
        image = (weights.unsqueeze(-1) * colours).sum(dim=0) / total.clamp_min(1e-12).unsqueeze(-1)
        place = [order.index(key) for key in self._views(keys)]
        return DepthWarp(image, total > 0, coverage[place])

    def propagate(
        self,
        images: Float[Tensor, "n h w c"],
        targets: Sequence[int],
        keys: Sequence[int],
        ratio: float = 1.0,
    ) -> tuple[Float[Tensor, "m h w c"], Bool[Tensor, "m h w"]]:
        """Bring several views up to date from key views, all from the images as they are given.

        No target sees the result of another, so their order does not matter (the release updates
        in place, one after the other).

        Args:
            images: of all views, in [0, 1].
            targets: views that are made; they may be keys too.
            keys: views that are read.
            ratio: share of the warp where a view is covered, in [0, 1].

        Returns:
            the targets' new images, and where each was covered.
        """
        warps = [self.warp(images, target, keys) for target in targets]
        covered = torch.stack([warp.is_covered for warp in warps])
        made = torch.stack([warp.image for warp in warps])
        return composite(made, images[self._views(targets)], covered, ratio), covered

    def _points(self, view: int) -> Float[Tensor, "h w 3"]:
        """World points of a view's pixels."""
        _, height, width = self.depth.shape
        rays = camera_rays(self.c2w[view], self.intrinsics[view], height, width)
        return points_from_depth(*rays, self.depth[view].unsqueeze(-1))

    def _is_seen(self, keys: list[int], pixels: Tensor, distance: Tensor) -> Bool[Tensor, "k h w"]:
        """Whether the depth that keys know at ``pixels`` is that of points at ``distance``."""
        check = self.check
        tolerance = check.relative * distance + check.absolute
        known = sample_at(self.depth[keys].unsqueeze(-1), pixels)[..., 0]
        seen = (known - distance).abs() <= tolerance
        # The top left pixel of a sample's four names the square.
        corner = pixels - 0.5
        nearest, farthest = (
            sample_at(table[keys].unsqueeze(-1), corner.floor() + 0.5, "nearest")[..., 0]
            for table in (self._nearest, self._farthest)
        )
        if check.edge > 0:
            seen = seen & (farthest - nearest <= check.edge * distance)
        return seen & (nearest > 0)

    def _views(self, views: Sequence[int]) -> list[int]:
        views = [int(view) for view in views]
        if not views:
            raise ValueError("no view is given; expected at least one key view.")
        for view in views:
            if not 0 <= view < len(self):
                raise ValueError(f"view {view} is none; expected 0 to {len(self) - 1}.")
        if len(set(views)) < len(views):
            raise ValueError(f"views {views} name one twice; expected each once.")
        return views


def _off_silhouettes(depth: Tensor, check: DepthCheck) -> Tensor:
    """Depth that is 0, as where it is unknown, near silhouettes too."""
    if check.border_px == 0:
        return depth
    size = {"kernel_size": 2 * check.border_px + 1, "stride": 1, "padding": check.border_px}
    farthest = functional.max_pool2d(depth.unsqueeze(1), **size)[:, 0]
    nearest = -functional.max_pool2d(-depth.unsqueeze(1), **size)[:, 0]
    is_near = nearest == 0
    if check.edge > 0:
        is_near = is_near | (farthest - nearest > check.edge * farthest)
    return depth.masked_fill(is_near, 0.0)


def _neighbourhood(depth: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest depth of each pixel, its right, lower and lower right neighbour."""
    padded = functional.pad(depth.unsqueeze(1), (0, 1, 0, 1), mode="replicate")
    farthest = functional.max_pool2d(padded, 2, stride=1)
    nearest = -functional.max_pool2d(-padded, 2, stride=1)
    return nearest[:, 0], farthest[:, 0]


def _check_views(depth: Tensor, c2w: Tensor, intrinsics: Tensor) -> None:
    n = len(depth)
    if depth.ndim != 3 or c2w.shape != (n, 4, 4) or intrinsics.shape != (n, 3, 3):
        raise ValueError(
            f"depth, c2w and intrinsics have shapes {tuple(depth.shape)}, {tuple(c2w.shape)} and "
            f"{tuple(intrinsics.shape)}; expected (n, h, w), (n, 4, 4) and (n, 3, 3)."
        )
    wrong = ~(torch.isfinite(depth) & (depth >= 0))
    if bool(wrong.any()):
        view, row, column = torch.nonzero(wrong)[0].tolist()
        raise ValueError(
            f"depth of view {view} is {float(depth[view, row, column])} at row {row}, column "
            f"{column}; expected finite distances along rays, and 0 where it is not known."
        )
