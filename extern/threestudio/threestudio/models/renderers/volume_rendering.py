"""Volume rendering of samples that lie where something is: marching, weights, sums along rays.

Shapes: ``n_rays`` rays; ``n_samples`` samples of all rays in one flat list, ordered by ray and
then by distance; ``S`` candidates per ray. Distances are in world units along unit directions.

Empty space adds exactly zero optical depth, so leaving a sample out where the occupancy is right
changes nothing. That is why only the bookkeeping is dense (per candidate: one number), while fields
are asked at the survivors alone.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Past this optical depth a sample lets less than the smallest float32 through; the bound keeps one
# absurd density from drowning the others in the running sum, and an infinite one from becoming NaN.
MAX_OPTICAL_DEPTH = 100.0


@dataclass
class RaySamples:
    """Samples of all rays, ordered by ray and then by distance.

    ray_indices ``[n_samples]``; t_starts and t_ends ``[n_samples]``, the interval of each.
    """

    ray_indices: Int[Tensor, "n_samples"]
    t_starts: Float[Tensor, "n_samples"]
    t_ends: Float[Tensor, "n_samples"]

    @property
    def n_samples(self) -> int:
        return self.ray_indices.shape[0]

    @property
    def t_mids(self) -> Float[Tensor, "n_samples"]:
        """The middle of each interval: where the field is asked."""
        return (self.t_starts + self.t_ends) * 0.5

    def select(self, keep: Tensor) -> "RaySamples":
        """The samples that a mask or an ordered list of indices names."""
        return RaySamples(self.ray_indices[keep], self.t_starts[keep], self.t_ends[keep])


def intersect_box(
    rays_o: Float[Tensor, "n_rays 3"],
    rays_d: Float[Tensor, "n_rays 3"],
    bbox: Float[Tensor, "2 3"],
    near_plane: float = 0.0,
    far_plane: float = 1e10,
) -> tuple[Float[Tensor, "n_rays"], Float[Tensor, "n_rays"]]:
    """Slab test: where each ray enters and leaves a box.

    Returns:
        t_enter, t_exit: distances clipped to [near_plane, far_plane]; t_exit <= t_enter where the
        ray misses. Rays that are not finite miss.
    """
    tiny = torch.finfo(rays_d.dtype).tiny
    direction = torch.where(rays_d.abs() < tiny, torch.full_like(rays_d, tiny), rays_d)
    # An origin on a slab's plane divides zero by a tiny number, never zero by zero.
    first, second = (bbox[0] - rays_o) / direction, (bbox[1] - rays_o) / direction
    t_enter = torch.minimum(first, second).amax(dim=-1).clamp(min=near_plane)
    t_exit = torch.maximum(first, second).amin(dim=-1).clamp(max=far_plane)
    missed = ~(t_exit > t_enter) | ~torch.isfinite(t_enter + t_exit)
    return t_enter.masked_fill(missed, 0.0), t_exit.masked_fill(missed, 0.0)


def march_rays(
    rays_o: Float[Tensor, "n_rays 3"],
    rays_d: Float[Tensor, "n_rays 3"],
    bbox: Float[Tensor, "2 3"],
    step_size: float,
    n_steps: int,
    jitter: Float[Tensor, "n_rays"] | None = None,
    occupied: Bool[Tensor, "n_padded"] | None = None,
    n_axis: int = 0,
    near_plane: float = 0.0,
    far_plane: float = 1e10,
    ray_chunk_size: int = 0,
) -> RaySamples:
    """Sample rays inside a box at equal steps, and keep the samples in occupied cells.

    Sample k of a ray has its middle at t_enter + (k + u) step_size; u is the ray's jitter, or 1/2.
    Middles beyond the exit are dropped. Not differentiable.

    Args:
        n_steps: candidates per ray; n_steps * step_size should reach across the box.
        jitter: u of every ray, in [0, 1).
        occupied: `OccupancyGridEstimator.padded_binaries`; None keeps every cell.
        n_axis: cells per axis of ``occupied``.
        ray_chunk_size: rays per pass; 0 keeps a pass at some 2^18 candidates on a CPU, which stay
            in its cache, and 2^24 on a GPU.
    """
    n_rays = rays_o.shape[0]
    if ray_chunk_size <= 0:
        ray_chunk_size = max(1, 2 ** (24 if rays_o.is_cuda else 18) // n_steps)
    t_enter, t_exit = intersect_box(rays_o, rays_d, bbox, near_plane, far_plane)
    offset = 0.5 if jitter is None else jitter
    t_first = t_enter + offset * step_size
    cells_o, cells_d = None, None
    if occupied is not None:
        # In units of padded cells, where cell 0 is the border; rays that miss stay in the middle.
        scale = n_axis / (bbox[1] - bbox[0])
        hit = (t_exit > t_enter)[:, None]
        cells_o = torch.where(hit, (rays_o - bbox[0]) * scale + 1.0, n_axis / 2)
        cells_d = torch.where(hit, rays_d * scale, 0.0)
    steps = torch.arange(n_steps, device=rays_o.device, dtype=rays_o.dtype) * step_size
    indices, middles = [], []
    for start in range(0, n_rays, ray_chunk_size):
        part = slice(start, start + ray_chunk_size)
        t_mids = t_first[part, None] + steps
        alive = t_mids < t_exit[part, None]
        if occupied is not None:
            # Past the exit the cell index would leave the grid; those samples are dropped anyway.
            inside = torch.minimum(t_mids, t_exit[part, None])
            alive &= _lookup(inside, cells_o[part], cells_d[part], occupied, n_axis + 2)
        found = alive.view(-1).nonzero()[:, 0]
        indices.append(torch.div(found, n_steps, rounding_mode="floor") + start)
        middles.append(t_mids.view(-1)[found])
    ray_indices = torch.cat(indices) if indices else rays_o.new_zeros(0, dtype=torch.long)
    t_mids = torch.cat(middles) if middles else rays_o.new_zeros(0)
    return RaySamples(ray_indices, t_mids - step_size / 2, t_mids + step_size / 2)


def _lookup(
    t_mids: Float[Tensor, "n S"],
    cells_o: Float[Tensor, "n 3"],
    cells_d: Float[Tensor, "n 3"],
    occupied: Bool[Tensor, "n_padded"],
    n_axis: int,
) -> Bool[Tensor, "n S"]:
    """Occupancy at points of rays, one axis at a time: no tensor of positions is ever made."""
    index = None
    for axis in range(3):
        position = torch.addcmul(cells_o[:, axis, None], t_mids, cells_d[:, axis, None])
        cell = position.int()  # truncation is floor here: positions are positive
        index = cell if index is None else torch.add(cell, index, alpha=n_axis)
    return occupied.index_select(0, index.view(-1)).view_as(t_mids)


class _RenderWeights(Function):
    """w_i = T_i (1 - exp(-tau_i)), T_i = exp(-sum of tau before i on the same ray).

    The sums run over the flat list in float64, from which each ray's start is subtracted: no
    padding to (n_rays, S) and no loss of digits. The gradient is
    dL/dtau_i = g_i T_i e^(-tau_i) - sum over later j of the ray of g_j w_j.
    """

    @staticmethod
    def forward(ctx: Any, tau: Tensor, ray_indices: Tensor) -> Tensor:
        first, last = _ray_ends(ray_indices)
        total = tau.double().cumsum(0)
        before = (total - tau) - (total - tau)[first]
        trans = torch.exp(-before).to(tau.dtype)
        weights = trans * -torch.expm1(-tau)
        ctx.save_for_backward(trans * torch.exp(-tau), weights, last)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trans_after, weights, last = ctx.saved_tensors
        total = (grad * weights).double().cumsum(0)
        later = (total[last] - total).to(grad.dtype)
        return grad * trans_after - later, None


def _ray_ends(ray_indices: Int[Tensor, "n_samples"]) -> tuple[Tensor, Tensor]:
    """Position in the list of the first and last sample of each sample's ray."""
    n_samples = ray_indices.shape[0]
    position = torch.arange(n_samples, device=ray_indices.device)
    starts = torch.ones(n_samples, dtype=torch.bool, device=ray_indices.device)
    starts[1:] = ray_indices[1:] != ray_indices[:-1]
    ends = starts.roll(-1)
    first = torch.where(starts, position, 0).cummax(0).values
    last = torch.where(ends, position, n_samples).flip(0).cummin(0).values.flip(0)
    return first, last


def render_weights(
    densities: Float[Tensor, "n_samples"],
    t_intervals: Float[Tensor, "n_samples"],
    ray_indices: Int[Tensor, "n_samples"],
) -> Float[Tensor, "n_samples"]:
    """Compositing weights w_i = T_i (1 - exp(-density_i length_i)) (NeRF, eq. 3).

    Args:
        densities: non-negative, per world unit.
        t_intervals: lengths of the samples.
        ray_indices: ray of each sample; samples of one ray stand together, nearest first.

    Differentiable once, with respect to densities and intervals. Optical depths above 100 count as
    100.
    """
    tau = (densities * t_intervals).clamp(max=MAX_OPTICAL_DEPTH)
    return _RenderWeights.apply(tau, ray_indices)


def accumulate_along_rays(
    weights: Float[Tensor, "n_samples"],
    values: Float[Tensor, "n_samples C"] | None,
    ray_indices: Int[Tensor, "n_samples"],
    n_rays: int,
) -> Float[Tensor, "n_rays C"]:
    """Sum of w_i values_i over each ray; of w_i alone (one channel) without values."""
    rows = weights[:, None] if values is None else weights[:, None] * values
    return rows.new_zeros(n_rays, rows.shape[1]).index_add(0, ray_indices, rows)


@torch.no_grad()
def visible_samples(
    densities: Float[Tensor, "n_samples"],
    samples: RaySamples,
    alpha_threshold: Float[Tensor, ""] | float,
    early_stop_eps: float = 1e-4,
) -> Bool[Tensor, "n_samples"]:
    """Which samples are opaque enough and not hidden: alpha >= threshold and T >= early_stop_eps.

    T is what is left behind all the nearer samples, thin ones included. Not differentiable.
    """
    tau = (densities * (samples.t_ends - samples.t_starts)).clamp(max=MAX_OPTICAL_DEPTH)
    first, _ = _ray_ends(samples.ray_indices)
    total = tau.double().cumsum(0) - tau
    trans = torch.exp(total[first] - total)
    return (-torch.expm1(-tau) >= alpha_threshold) & (trans >= early_stop_eps)
