"""Volume rendering of samples that lie where something is: marching, weights, sums along rays.

Shapes: ``n_rays`` rays; ``n_samples`` samples of all rays in one flat list, ordered by ray and
then by distance; ``S`` candidates per ray. Distances are in world units along unit directions.

Empty space adds exactly zero optical depth, so leaving a sample out where the occupancy is right
changes nothing. That is why only the bookkeeping is dense (per candidate: one number), while fields
are asked at the survivors alone.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
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

    @property
    def is_padding(self) -> Bool[Tensor, "n_samples"]:
        """Which samples have no length, and so no weight: they only fill a list."""
        return ~(self.t_ends > self.t_starts)

    def select(self, keep: Tensor) -> "RaySamples":
        """The samples that an ascending list of indices names."""
        parts = (self.ray_indices, self.t_starts, self.t_ends)
        return RaySamples(*(part.index_select(0, keep) for part in parts))


@dataclass
class RayBatch:
    """Flat rays that know which image they belong to: ray i is pixel i % image_size of its image.

    ``first_ray`` counts the rays before this slice of a larger batch.
    """

    origins: Float[Tensor, "n_rays 3"]
    directions: Float[Tensor, "n_rays 3"]
    image_size: int
    frame_times: Float[Tensor, "B"] | None
    first_ray: int = 0

    def split(self, size: int) -> "list[RayBatch]":
        """Slices of at most ``size`` rays."""
        return [
            RayBatch(
                self.origins[start : start + size],
                self.directions[start : start + size],
                self.image_size,
                self.frame_times,
                start,
            )
            for start in range(0, self.origins.shape[0], size)
        ]

    def points(self, samples: RaySamples) -> Float[Tensor, "n_samples 3"]:
        """World positions of the samples' middles."""
        origins = self.origins.index_select(0, samples.ray_indices)
        directions = self.directions.index_select(0, samples.ray_indices)
        return torch.addcmul(origins, samples.t_mids[:, None], directions)

    def images(self, samples: RaySamples) -> Int[Tensor, "n_samples"]:
        """Index of each sample's image."""
        rays = samples.ray_indices + self.first_ray
        return torch.div(rays, self.image_size, rounding_mode="floor")

    def times(self, samples: RaySamples) -> Float[Tensor, "n_samples"] | None:
        """Scene time of each sample, None without times."""
        return None if self.frame_times is None else self.frame_times[self.images(samples)]


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
    occupied: Bool[Tensor, "R R R"] | None = None,
    near_plane: float = 0.0,
    far_plane: float = 1e10,
    ray_chunk_size: int = 0,
) -> RaySamples:
    """Sample rays inside a box at equal steps, and keep the samples in occupied cells.

    Sample k of a ray has its middle at t_enter + (k + u) step_size; u is the ray's jitter, or 1/2.
    Middles beyond the exit are dropped. Where the samples lie does not depend on ``occupied``,
    which only decides which of them are kept; nor on the chunks. Not differentiable.

    Args:
        n_steps: candidates per ray; n_steps * step_size should reach across the box.
        jitter: u of every ray, in [0, 1).
        occupied: cells of the box, x first; None keeps every sample.
        ray_chunk_size: rays per pass; 0 keeps a pass at some 2^18 candidates on a CPU, which stay
            in its cache, and 2^24 on a GPU.
    """
    walk = RayWalk.start(rays_o, rays_d, bbox, step_size, jitter, occupied, near_plane, far_plane)
    # These two waits for the device shrink all that follows to the rays and steps that can matter.
    hits = walk.meets_something().nonzero()[:, 0]
    if hits.numel() == 0:
        return RaySamples(hits, rays_o.new_zeros(0), rays_o.new_zeros(0))
    walk = walk.select(hits)
    longest = ((walk.t_exit - walk.t_first) / step_size - walk.k_first).amax().item()
    n_candidates = min(n_steps, int(longest) + 1)
    if ray_chunk_size <= 0:
        ray_chunk_size = max(1, 2 ** (24 if rays_o.is_cuda else 18) // n_candidates)
    steps = torch.arange(n_candidates, device=rays_o.device, dtype=rays_o.dtype)
    indices, middles = [], []
    for start in range(0, hits.numel(), ray_chunk_size):
        part = slice(start, start + ray_chunk_size)
        t_mids, alive = walk.candidates(part, steps)
        found = alive.view(-1).nonzero()[:, 0]
        rows = torch.div(found, n_candidates, rounding_mode="floor")
        indices.append(hits[part].index_select(0, rows))
        middles.append(t_mids.view(-1).index_select(0, found))
    t_mids = torch.cat(middles)
    return RaySamples(torch.cat(indices), t_mids - step_size / 2, t_mids + step_size / 2)


@dataclass
class RayWalk:
    """Rays cut into steps inside a box: candidate k of a ray lies k steps behind its first middle.

    t_first: the first middle of each ray; k_first: the first candidate worth a look; t_exit: from
    where on nothing is. All ``[n_rays]``. ``padded`` is the grid with its border repeated once, so
    that an index that rounding puts one cell off is still valid; None takes every candidate.
    """

    origins: Float[Tensor, "n_rays 3"]
    directions: Float[Tensor, "n_rays 3"]
    t_first: Float[Tensor, "n_rays"]
    k_first: Float[Tensor, "n_rays"]
    t_exit: Float[Tensor, "n_rays"]
    step_size: float
    low: Float[Tensor, "3"]
    cells_per_unit: Float[Tensor, "3"] | None
    padded: Bool[Tensor, "P P P"] | None

    @classmethod
    def start(
        cls,
        rays_o: Float[Tensor, "n_rays 3"],
        rays_d: Float[Tensor, "n_rays 3"],
        bbox: Float[Tensor, "2 3"],
        step_size: float,
        jitter: Float[Tensor, "n_rays"] | None,
        occupied: Bool[Tensor, "R R R"] | None,
        near_plane: float,
        far_plane: float,
    ) -> "RayWalk":
        """Begin where the rays enter the box; arguments as of `march_rays`."""
        t_enter, t_exit = intersect_box(rays_o, rays_d, bbox, near_plane, far_plane)
        t_first = t_enter + (0.5 if jitter is None else jitter) * step_size
        k_first = torch.zeros_like(t_first)
        if occupied is None:
            return cls(rays_o, rays_d, t_first, k_first, t_exit, step_size, bbox[0], None, None)
        # Only the part of a ray inside the box of the occupied cells is worth a look. A margin of
        # two steps keeps rounding from ever deciding.
        tight = _occupied_box(occupied, bbox)
        t_near, t_far = intersect_box(rays_o, rays_d, tight, near_plane, far_plane)
        k_first = torch.floor((t_near - t_first) / step_size - 1.0).clamp(min=0.0)
        t_far = torch.where(t_far > t_near, t_far + 2 * step_size, 0.0)
        t_exit = torch.minimum(t_exit, t_far)
        scale = occupied.shape[0] / (bbox[1] - bbox[0])
        padded = _pad_grid(occupied)
        return cls(rays_o, rays_d, t_first, k_first, t_exit, step_size, bbox[0], scale, padded)

    def meets_something(self) -> Bool[Tensor, "n_rays"]:
        """Which rays have a candidate at all."""
        return self.t_first + self.k_first * self.step_size < self.t_exit

    def select(self, rows: Int[Tensor, "n_rows"]) -> "RayWalk":
        """The rays that an ascending list of indices names."""
        names = ("origins", "directions", "t_first", "k_first", "t_exit")
        return replace(self, **{name: getattr(self, name).index_select(0, rows) for name in names})

    def with_harmless_misses(self) -> "RayWalk":
        """The same, but rays that meet nothing look at one cell only: they may leave the grid."""
        meets = self.meets_something()[:, None]
        return replace(
            self,
            origins=torch.where(meets, self.origins, self.low),
            directions=torch.where(meets, self.directions, 0.0),
        )

    def candidates(
        self, part: slice, steps: Float[Tensor, "S"]
    ) -> tuple[Float[Tensor, "n S"], Bool[Tensor, "n S"]]:
        """Middles of the candidates ``k_first + steps`` of some rays, and which are kept.

        Every ray must meet something, or be harmless.
        """
        t_mids = (self.k_first[part, None] + steps).mul_(self.step_size)
        t_mids.add_(self.t_first[part, None])
        alive = t_mids < self.t_exit[part, None]
        if self.padded is not None and self.cells_per_unit is not None:
            # In units of cells of the padded grid, where cell 0 is the border. Past the exit the
            # cell would leave the grid; those samples are dropped anyway.
            cells_o = (self.origins[part] - self.low) * self.cells_per_unit + 1.0
            cells_d = self.directions[part] * self.cells_per_unit
            inside = torch.minimum(t_mids, self.t_exit[part, None])
            alive &= _lookup(inside, cells_o, cells_d, self.padded)
        return t_mids, alive


def _occupied_box(occupied: Bool[Tensor, "R R R"], bbox: Float[Tensor, "2 3"]) -> Tensor:
    """The smallest box of whole cells that holds every occupied one; inverted when none is."""
    n_axis = occupied.shape[0]
    cells = torch.arange(n_axis, device=occupied.device)
    low, high = [], []
    for axis in range(3):
        filled = occupied.movedim(axis, 0).reshape(n_axis, -1).any(dim=1)
        low.append(torch.where(filled, cells, n_axis).amin())
        high.append(torch.where(filled, cells + 1, 0).amax())
    corners = torch.stack([torch.stack(low), torch.stack(high)]).to(bbox) / n_axis
    return bbox[0] + corners * (bbox[1] - bbox[0])


def _pad_grid(occupied: Bool[Tensor, "R R R"]) -> Bool[Tensor, "P P P"]:
    grid = F.pad(occupied[None, None].float(), (1,) * 6, mode="replicate")
    return grid[0, 0].bool()


def _lookup(
    t_mids: Float[Tensor, "n S"],
    cells_o: Float[Tensor, "n 3"],
    cells_d: Float[Tensor, "n 3"],
    grid: Bool[Tensor, "P P P"],
) -> Bool[Tensor, "n S"]:
    """Occupancy at points of rays, one axis at a time: no tensor of positions is ever made."""
    index = None
    for axis in range(3):
        # A product and a sum rather than addcmul, which does not vectorise over two broadcasts.
        position = (t_mids * cells_d[:, axis, None]).add_(cells_o[:, axis, None])
        cell = position.int()  # truncation is floor here: positions are positive
        index = cell if index is None else cell.add_(index, alpha=grid.shape[0])
    return grid.view(-1).index_select(0, index.view(-1)).view_as(t_mids)


class _RenderWeights(Function):
    """w_i = T_i (1 - exp(-tau_i)), T_i = exp(-sum of tau before i on the same ray).

    The sums run over the flat list in float64, from which each ray's start is subtracted: no
    padding to (n_rays, S) and no loss of digits. The gradient is
    dL/dtau_i = g_i T_i e^(-tau_i) - sum over later j of the ray of g_j w_j.
    """

    @staticmethod
    def forward(ctx: Any, tau: Tensor, ray_indices: Tensor, n_rays: int) -> Tensor:
        first, last = _ray_ends(ray_indices, n_rays)
        total = tau.double().cumsum(0)
        before = total - tau
        before -= before.index_select(0, first)
        trans = before.neg_().exp_().to(tau.dtype)
        trans_after = trans * torch.exp(-tau)
        weights = trans * -torch.expm1(-tau)
        ctx.save_for_backward(trans_after, weights, last)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        trans_after, weights, last = ctx.saved_tensors
        total = (grad * weights).double().cumsum(0)
        later = (total.index_select(0, last) - total).to(grad.dtype)
        return grad * trans_after - later, None, None


def _ray_ends(ray_indices: Int[Tensor, "n_samples"], n_rays: int) -> tuple[Tensor, Tensor]:
    """Position in the list of the first and last sample of each sample's ray."""
    ones = torch.ones_like(ray_indices)
    counts = ray_indices.new_zeros(n_rays).index_add_(0, ray_indices, ones)
    ends = counts.cumsum(0)
    first = (ends - counts).index_select(0, ray_indices)
    return first, (ends - 1).index_select(0, ray_indices)


def render_weights(
    densities: Float[Tensor, "n_samples"],
    t_intervals: Float[Tensor, "n_samples"],
    ray_indices: Int[Tensor, "n_samples"],
    n_rays: int,
) -> Float[Tensor, "n_samples"]:
    """Compositing weights w_i = T_i (1 - exp(-density_i length_i)) (NeRF, eq. 3).

    Args:
        densities: non-negative, per world unit.
        t_intervals: lengths of the samples.
        ray_indices: ray of each sample, ascending; samples of one ray nearest first.
        n_rays: number of rays.

    Differentiable once, with respect to densities and intervals. Optical depths above 100 count as
    100.
    """
    tau = (densities * t_intervals).clamp(max=MAX_OPTICAL_DEPTH)
    return _RenderWeights.apply(tau, ray_indices, n_rays)


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
    n_rays: int,
    alpha_threshold: Float[Tensor, ""] | float,
    early_stop_eps: float = 1e-4,
) -> Bool[Tensor, "n_samples"]:
    """Which samples are opaque enough and not hidden: alpha >= threshold and T >= early_stop_eps.

    T is what is left behind all the nearer samples, thin ones included. Not differentiable.
    """
    tau = (densities * (samples.t_ends - samples.t_starts)).clamp(max=MAX_OPTICAL_DEPTH)
    first, _ = _ray_ends(samples.ray_indices, n_rays)
    before = tau.double().cumsum(0) - tau
    trans = torch.exp(before.index_select(0, first) - before)
    return (-torch.expm1(-tau) >= alpha_threshold) & (trans >= early_stop_eps)
