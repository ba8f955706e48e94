"""Samples of rays at the quantiles of a density, as one flat list.

Shapes: ``n_rays`` rays, of which ``n_hits`` have anything before them.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from threestudio.models.importance_sampling import ImportanceEstimator
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples, intersect_box
from threestudio.utils.ops import chunk_batch

PointDensityFn = Callable[[Tensor, Tensor | None], Tensor]
ESTIMATORS = ("occgrid", "importance", "proposal")
# Beyond it a plane means "anywhere", and no number of samples would fill the way.
FARTHEST_PLANE = 1e6


def check_sampling(cfg: Any, geometry: Any) -> None:
    """Refuse a renderer's config whose rays cannot be sampled.

    Raises:
        ValueError: another estimator, no samples, or rays without an end in an unbounded scene.
    """
    if cfg.estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator is {cfg.estimator!r}; expected one of {', '.join(ESTIMATORS)}."
        )
    keys = ["num_samples_per_ray"]
    if cfg.estimator != "occgrid":
        keys.append(f"num_samples_per_ray_{cfg.estimator}")
    for key in keys:
        if cfg[key] < 1:
            raise ValueError(f"{key} is {cfg[key]}; expected at least 1.")
    if cfg.estimator == "occgrid" or not getattr(geometry, "unbounded", False):
        return
    if not cfg.near_plane < cfg.far_plane <= FARTHEST_PLANE:
        raise ValueError(
            f"near_plane is {cfg.near_plane:g} and far_plane is {cfg.far_plane:g}; expected "
            f"near_plane < far_plane <= {FARTHEST_PLANE:g}, since the geometry is unbounded and "
            f"estimator {cfg.estimator!r} spreads its samples from plane to plane. "
            "Set system.renderer.far_plane."
        )


@torch.no_grad()
def sample_quantiles(
    rays: RayBatch,
    bbox: Float[Tensor, "2 3"] | None,
    estimator: ImportanceEstimator,
    density: PointDensityFn,
    n_coarse: int,
    n_samples: int,
    near_plane: float,
    far_plane: float,
    jitter: Float[Tensor, "n_rays"] | None = None,
    requires_grad: bool = False,
    chunk_size: int = 0,
    with_misses: bool = False,
) -> RaySamples:
    """Ask a density along every ray and give the samples that an estimator makes of it.

    Args:
        rays: flat rays.
        bbox: a ray counts only inside; None takes all from plane to plane.
        estimator: chooses the samples.
        density: (world points ``[n, 3]``, scene times ``[n]`` or None) -> ``[n]``.
        n_coarse: places per ray where the density is asked.
        n_samples: samples per ray to choose.
        near_plane, far_plane: ends of the rays, world units.
        jitter: moves the samples of each ray, in [0, 1).
        requires_grad: keep the graph of the density, for the estimator to learn by.
        chunk_size: points per call of the density; 0 asks all at once.
        with_misses: give rays that see nothing as many samples, without length: then no shape
            depends on data.

    Not differentiable: where the samples lie.
    """
    if bbox is None:
        t_enter = torch.full_like(rays.origins[:, 0], near_plane)
        t_exit = torch.full_like(t_enter, far_plane)
    else:
        t_enter, t_exit = intersect_box(rays.origins, rays.directions, bbox, near_plane, far_plane)
    if with_misses:
        hits = torch.arange(t_enter.shape[0], device=t_enter.device)
    else:
        hits = (t_exit > t_enter).nonzero()[:, 0]
    if hits.numel() == 0:
        return RaySamples(hits, t_enter.new_zeros(0), t_enter.new_zeros(0))

    def along_rays(t_starts: Tensor, t_ends: Tensor) -> Float[Tensor, "n_hits S"]:
        asked = _flat(hits, t_starts, t_ends)
        points, times = rays.points(asked), rays.times(asked)
        return chunk_batch(density, chunk_size, points, times).view_as(t_starts)

    t_starts, t_ends = estimator.sampling(
        [along_rays],
        [n_coarse],
        n_samples,
        hits.numel(),
        t_enter.index_select(0, hits),
        t_exit.index_select(0, hits),
        stratified=jitter is not None,
        requires_grad=requires_grad,
        jitter=None if jitter is None else jitter.index_select(0, hits),
    )
    return _flat(hits, t_starts, t_ends)


def _flat(hits: Tensor, t_starts: Tensor, t_ends: Tensor) -> RaySamples:
    indices = hits[:, None].expand_as(t_starts)
    return RaySamples(indices.reshape(-1), t_starts.reshape(-1), t_ends.reshape(-1))
