"""What `import nerfacc` finds without the package: weights, sums along rays and one occupancy grid.

Arguments and results are those of nerfacc 0.5; everything is plain torch over our own renderer, and
differentiable where nerfacc is. Proposal networks, importance sampling and grids of several levels
need the real package and a GPU.

Shapes: samples come either dense, ``[..., S]`` per ray, or flat, ``[n_samples]`` ordered by ray and
then by distance, with ``ray_indices`` and ``n_rays`` or with ``packed_info`` (first sample and
number of samples of each ray).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from threestudio.models.estimators import OccupancyGridEstimator
from threestudio.models.renderers import volume_rendering

__all__ = [
    "AbstractEstimator",
    "OccGridEstimator",
    "accumulate_along_rays",
    "pack_info",
    "ray_aabb_intersect",
    "render_transmittance_from_alpha",
    "render_transmittance_from_density",
    "render_visibility_from_alpha",
    "render_visibility_from_density",
    "render_weight_from_alpha",
    "render_weight_from_density",
]
ABSENT = (
    "PropNetEstimator",
    "RayIntervals",
    "RaySamples",
    "exclusive_prod",
    "exclusive_sum",
    "importance_sampling",
    "inclusive_prod",
    "inclusive_sum",
    "rendering",
    "searchsorted",
    "traverse_grids",
)
__version__ = "0.5.3+stand-in"

# The most that one sample may hide, so that its logarithm is finite.
_MOST_OPAQUE = 1.0 - 1e-12


def pack_info(
    ray_indices: Int[Tensor, "n_samples"], n_rays: int | None = None
) -> Int[Tensor, "n_rays 2"]:
    """First sample and number of samples of each ray."""
    counts = torch.bincount(ray_indices, minlength=_count(ray_indices, n_rays))
    return torch.stack([counts.cumsum(0) - counts, counts], dim=-1)


def render_transmittance_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """T_i = exp(-sum over nearer j of sigma_j length_j), and alpha_i = 1 - exp(-sigma_i length_i).

    Args:
        prefix_trans: what each sample's ray lets through before its first sample.

    Returns:
        transmittance and opacity of the samples, in the shape of ``sigmas``.
    """
    tau = sigmas * (t_ends - t_starts)
    trans = torch.exp(-_sum_before(tau, _rays_of(packed_info, ray_indices), n_rays))
    return _after(prefix_trans, trans), -torch.expm1(-tau)


def render_transmittance_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> Tensor:
    """T_i = product over nearer j of (1 - alpha_j)."""
    tau = -torch.log1p(-alphas.double().clamp(max=_MOST_OPAQUE))
    before = _sum_before(tau, _rays_of(packed_info, ray_indices), n_rays)
    return _after(prefix_trans, torch.exp(-before).to(alphas.dtype))


def render_weight_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compositing weights w_i = T_i alpha_i (NeRF, eq. 3), with T_i and alpha_i."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return trans * alphas, trans, alphas


def render_weight_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    prefix_trans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compositing weights w_i = T_i alpha_i, with T_i."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return trans * alphas, trans


@torch.no_grad()
def render_visibility_from_density(
    t_starts: Tensor,
    t_ends: Tensor,
    sigmas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Bool[Tensor, "..."]:
    """Which samples are neither hidden (T >= early_stop_eps) nor too thin (alpha >= alpha_thre)."""
    trans, alphas = render_transmittance_from_density(
        t_starts, t_ends, sigmas, packed_info, ray_indices, n_rays, prefix_trans
    )
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


@torch.no_grad()
def render_visibility_from_alpha(
    alphas: Tensor,
    packed_info: Tensor | None = None,
    ray_indices: Tensor | None = None,
    n_rays: int | None = None,
    early_stop_eps: float = 1e-4,
    alpha_thre: float = 0.0,
    prefix_trans: Tensor | None = None,
) -> Bool[Tensor, "..."]:
    """Likewise from opacities."""
    trans = render_transmittance_from_alpha(alphas, packed_info, ray_indices, n_rays, prefix_trans)
    return _visible(trans, alphas, early_stop_eps, alpha_thre)


def accumulate_along_rays(
    weights: Tensor,
    values: Tensor | None = None,
    ray_indices: Int[Tensor, "n_samples"] | None = None,
    n_rays: int | None = None,
) -> Float[Tensor, "*rays C"]:
    """Sum of w_i values_i over each ray; of w_i alone (one channel) without values."""
    if ray_indices is None:
        rows = weights[..., None] if values is None else weights[..., None] * values
        return rows.sum(dim=-2)
    n_rays = _count(ray_indices, n_rays)
    return volume_rendering.accumulate_along_rays(weights, values, ray_indices, n_rays)


def ray_aabb_intersect(
    rays_o: Float[Tensor, "n_rays 3"],
    rays_d: Float[Tensor, "n_rays 3"],
    aabbs: Float[Tensor, "n_boxes 6"],
    near_plane: float = -math.inf,
    far_plane: float = math.inf,
    miss_value: float = math.inf,
) -> tuple[Tensor, Tensor, Bool[Tensor, "n_rays n_boxes"]]:
    """Where each ray enters and leaves each box, and which it meets.

    Returns:
        t_mins, t_maxs ``[n_rays, n_boxes]``, ``miss_value`` where a ray misses; hits.
    """
    entered, left = [], []
    for box in aabbs:
        corners = box.view(2, 3)
        t_min, t_max = volume_rendering.intersect_box(
            rays_o, rays_d, corners, near_plane, far_plane
        )
        entered.append(t_min)
        left.append(t_max)
    t_mins, t_maxs = torch.stack(entered, dim=-1), torch.stack(left, dim=-1)
    hits = t_maxs > t_mins
    return t_mins.masked_fill(~hits, miss_value), t_maxs.masked_fill(~hits, miss_value), hits


class AbstractEstimator(nn.Module):
    """Base of what says where samples are worth taking."""

    @property
    def device(self) -> torch.device:
        """Where the estimator's buffers are."""
        return next(self.buffers()).device


class OccGridEstimator(OccupancyGridEstimator, AbstractEstimator):
    """An occupancy grid of one level, with nerfacc's names; see `OccupancyGridEstimator`.

    A fresh grid is full, so nothing is skipped before the first update.

    Args:
        roi_aabb: the box, (x, y, z) of its low corner, then of its high one.
        resolution: cells per axis.
        levels: 1.

    Raises:
        ValueError: several levels, or an axis with another number of cells.
    """

    def __init__(
        self,
        roi_aabb: Sequence[float] | Float[Tensor, "6"],
        resolution: int | Sequence[int] | Tensor = 128,
        levels: int = 1,
    ) -> None:
        sizes = torch.as_tensor(resolution).flatten().tolist()
        if levels != 1 or len(set(sizes)) > 1:
            raise ValueError(
                f"an OccGridEstimator of levels={levels} and resolution={sizes} needs the real "
                "package nerfacc and a GPU; without them there is one level of as many cells on "
                "each axis."
            )
        box = torch.as_tensor(roi_aabb, dtype=torch.float32).reshape(2, 3)
        super().__init__(box, int(sizes[0]))
        self.levels = 1
        self.cells_per_lvl = self.n_cells

    @torch.no_grad()
    def update_every_n_steps(
        self,
        step: int,
        occ_eval_fn: Callable[[Tensor], Tensor],
        occ_thre: float = 1e-2,
        ema_decay: float = 0.95,
        warmup_steps: int = 256,
        n: int = 16,
    ) -> None:
        """Refresh the grid at every ``n``-th step of the training.

        Args:
            occ_eval_fn: points ``[N, 3]`` to density times step length ``[N, 1]``.

        Raises:
            RuntimeError: while the estimator is in evaluation mode.
        """
        if not self.training:
            raise RuntimeError("the occupancy grid is updated in training only; call train().")
        if step % n == 0:
            self.update(
                lambda points, times: occ_eval_fn(points),
                step, warmup_steps, decay=ema_decay, threshold=occ_thre,
            )  # fmt: skip

    @torch.no_grad()
    def sampling(
        self,
        rays_o: Float[Tensor, "n_rays 3"],
        rays_d: Float[Tensor, "n_rays 3"],
        sigma_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        alpha_fn: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
        near_plane: float = 0.0,
        far_plane: float = 1e10,
        t_min: Float[Tensor, "n_rays"] | None = None,
        t_max: Float[Tensor, "n_rays"] | None = None,
        render_step_size: float = 1e-3,
        early_stop_eps: float = 1e-4,
        alpha_thre: float = 0.0,
        stratified: bool = False,
        cone_angle: float = 0.0,
    ) -> tuple[Int[Tensor, "n_samples"], Float[Tensor, "n_samples"], Float[Tensor, "n_samples"]]:
        """Samples at equal steps in occupied cells, less those that cannot be seen.

        Args:
            sigma_fn: (t_starts, t_ends, ray_indices) -> densities; or ``alpha_fn`` -> opacities.
            t_min, t_max: bounds of each ray.
            cone_angle: 0; steps that grow with distance are not offered.

        Returns:
            ray_indices, t_starts, t_ends.

        Random: with ``stratified``, the global generator, which is seeded at each step for foreign
        modules.
        """
        if cone_angle > 0.0:
            raise ValueError(
                f"cone_angle is {cone_angle}; without the real package nerfacc and a GPU steps "
                "are equal, so expected 0."
            )
        box = self.aabbs[0].view(2, 3)
        reach = float((box[1] - box[0]).norm())
        n_steps = math.ceil(reach / render_step_size) + 1
        jitter = torch.rand_like(rays_o[:, 0]) if stratified else None
        samples = volume_rendering.march_rays(
            rays_o, rays_d, box, render_step_size, n_steps, jitter, self.binaries[0],
            near_plane, far_plane,
        )  # fmt: skip
        samples = _within(samples, t_min, t_max)
        threshold = min(alpha_thre, float(self.mean_occupancy))
        tau = _asked_depth(samples, sigma_fn, alpha_fn)
        if tau is not None and (threshold > 0.0 or early_stop_eps > 0.0):
            density = tau / (samples.t_ends - samples.t_starts)
            keep = volume_rendering.visible_samples(
                density, samples, rays_o.shape[0], threshold, early_stop_eps
            )
            samples = samples.select(keep.nonzero()[:, 0])
        return samples.ray_indices, samples.t_starts, samples.t_ends


def _asked_depth(samples, sigma_fn: Callable | None, alpha_fn: Callable | None) -> Tensor | None:
    """Optical depth of each sample by the function that was given, if one was."""
    if (sigma_fn is None and alpha_fn is None) or samples.n_samples == 0:
        return None
    ends = samples.t_starts, samples.t_ends, samples.ray_indices
    if sigma_fn is not None:
        return sigma_fn(*ends).reshape(-1) * (samples.t_ends - samples.t_starts)
    alphas = alpha_fn(*ends).reshape(-1)
    return -torch.log1p(-alphas.double().clamp(max=_MOST_OPAQUE)).to(alphas.dtype)


def _within(samples, t_min: Tensor | None, t_max: Tensor | None):
    keep = torch.ones_like(samples.t_mids, dtype=torch.bool)
    if t_min is not None:
        keep &= samples.t_mids >= t_min[samples.ray_indices]
    if t_max is not None:
        keep &= samples.t_mids <= t_max[samples.ray_indices]
    return samples.select(keep.nonzero()[:, 0])


def _rays_of(packed_info: Tensor | None, ray_indices: Tensor | None) -> Tensor | None:
    """The ray of each flat sample; None for dense ones."""
    if ray_indices is None and packed_info is not None:
        rays = torch.arange(packed_info.shape[0], device=packed_info.device)
        return rays.repeat_interleave(packed_info[:, 1])
    return ray_indices


def _sum_before(values: Tensor, rays: Tensor | None, n_rays: int | None) -> Tensor:
    """Sum over the nearer samples of the same ray, in float64 so that long lists lose nothing."""
    total = values.double().cumsum(-1) - values.double()
    if rays is not None and rays.numel() > 0:
        first = pack_info(rays, n_rays)[:, 0]
        total = total - total.index_select(0, first.index_select(0, rays))
    return total.to(values.dtype)


def _after(prefix_trans: Tensor | None, trans: Tensor) -> Tensor:
    return trans if prefix_trans is None else trans * prefix_trans


def _visible(trans: Tensor, alphas: Tensor, early_stop_eps: float, alpha_thre: float) -> Tensor:
    visible = trans >= early_stop_eps
    return visible & (alphas >= alpha_thre) if alpha_thre > 0 else visible


def _count(ray_indices: Tensor, n_rays: int | None) -> int:
    if n_rays is not None:
        return n_rays
    return int(ray_indices.max()) + 1 if ray_indices.numel() else 0
