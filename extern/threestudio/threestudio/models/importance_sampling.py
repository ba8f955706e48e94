"""Samples along rays at the quantiles of a density that was asked coarsely before.

Shapes: ``n_rays`` rays; ``S`` intervals of a ray lie between S + 1 edges, ascending. Edges are
shares of the way from the near to the far end in [0, 1], distances are in world units.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threestudio.models.renderers.volume_rendering import MAX_OPTICAL_DEPTH

DensityFn = Callable[[Tensor, Tensor], Tensor]
Spacing = Literal["uniform", "lindisp"]
# Edges, as shares of the way, and the weights between them.
Level = tuple[Tensor, Tensor]

# Share of the samples that is spread evenly: what the density missed may still be found.
EVEN_SHARE = 0.01
# The levels of a ray share one random number, moved on by the golden ratio from level to level.
GOLDEN_RATIO = 0.6180339887498949


def interval_weights(
    sigmas: Float[Tensor, "n_rays S"],
    t_starts: Float[Tensor, "n_rays S"],
    t_ends: Float[Tensor, "n_rays S"],
) -> Float[Tensor, "n_rays S"]:
    """Compositing weights w_i = T_i (1 - exp(-sigma_i length_i)) of dense rays; differentiable."""
    tau = (sigmas * (t_ends - t_starts)).clamp(max=MAX_OPTICAL_DEPTH)
    before = tau.cumsum(dim=-1) - tau
    return torch.exp(-before) * -torch.expm1(-tau)


@torch.no_grad()
def spread(weights: Float[Tensor, "n_rays S"]) -> Float[Tensor, "n_rays S"]:
    """Widen a histogram by half a neighbour on both sides (Mip-NeRF, eq. 18).

    What lies across the edge of an interval is seen at its middle or not; its neighbours get
    samples too. Not differentiable.
    """
    padded = torch.nn.functional.pad(weights, (1, 1))
    larger = torch.maximum(padded[:, :-1], padded[:, 1:])
    return (larger[:, :-1] + larger[:, 1:]) / 2


@torch.no_grad()
def quantile_edges(
    edges: Float[Tensor, "n_rays S1"],
    weights: Float[Tensor, "n_rays S"],
    quantiles: Float[Tensor, "n_rays n_new"],
) -> Float[Tensor, "n_rays n_new"]:
    """Invert the piecewise linear distribution that weights of intervals make (NeRF, section 5.2).

    Args:
        edges: of the intervals.
        weights: of the intervals, not negative; `EVEN_SHARE` is spread over all of them.
        quantiles: ascending, in [0, 1].

    Returns:
        Positions, ascending: between the first and the last edge. Not differentiable.
    """
    n_intervals = weights.shape[-1]
    density = weights + EVEN_SHARE / n_intervals
    total = density.cumsum(dim=-1)
    total = total / total[:, -1:]
    cdf = torch.cat([torch.zeros_like(total[:, :1]), total], dim=-1)
    upper = torch.searchsorted(cdf, quantiles.contiguous(), right=True).clamp(1, n_intervals)
    low, high = cdf.gather(-1, upper - 1), cdf.gather(-1, upper)
    share = ((quantiles - low) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
    return torch.lerp(edges.gather(-1, upper - 1), edges.gather(-1, upper), share)


def interlevel_loss(
    edges: Float[Tensor, "n_rays S1"],
    weights: Float[Tensor, "n_rays S"],
    proposal_edges: Float[Tensor, "n_rays P1"],
    proposal_weights: Float[Tensor, "n_rays P"],
) -> Float[Tensor, ""]:
    """Penalise weight that the proposal does not bound (Mip-NeRF 360, eq. 12 and 13).

    The bound of an interval is the weight of all proposal intervals that overlap it; the loss is
    the sum of max(0, w - bound)^2 / w over a ray's intervals, averaged over rays.

    Args:
        edges, weights: of the samples that were rendered; constants.
        proposal_edges: in the same units as ``edges``.
        proposal_weights: differentiable.
    """
    edges, weights = edges.detach(), weights.detach()
    proposal_edges = proposal_edges.contiguous()
    total = proposal_weights.cumsum(dim=-1)
    total = torch.cat([torch.zeros_like(total[:, :1]), total], dim=-1)
    last = proposal_edges.shape[-1] - 1
    first_edge = torch.searchsorted(proposal_edges, edges[:, :-1].contiguous(), right=True) - 1
    last_edge = torch.searchsorted(proposal_edges, edges[:, 1:].contiguous())
    bound = total.gather(-1, last_edge.clamp(0, last)) - total.gather(-1, first_edge.clamp(0, last))
    excess = (weights - bound).clamp(min=0.0)
    return (excess.square() / (weights + torch.finfo(weights.dtype).eps)).sum(dim=-1).mean()


class ImportanceEstimator(nn.Module):
    """Hierarchical sampling (NeRF, section 5.2): the edges asked first and those added after."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the samples are made if no tensor among the arguments tells."""
        return self._dummy.device

    def sampling(
        self,
        prop_sigma_fns: Sequence[DensityFn],
        prop_samples: Sequence[int],
        num_samples: int,
        n_rays: int,
        near_plane: float | Float[Tensor, "n_rays"],
        far_plane: float | Float[Tensor, "n_rays"],
        sampling_type: Spacing = "uniform",
        stratified: bool = False,
        requires_grad: bool = False,
        jitter: Float[Tensor, "n_rays"] | None = None,
    ) -> tuple[Float[Tensor, "n_rays S"], Float[Tensor, "n_rays S"]]:
        """Choose the intervals of every ray.

        Args:
            prop_sigma_fns: densities, coarsest first: (t_starts, t_ends) ``[n_rays, n]`` -> density
                ``[n_rays, n]`` per world unit.
            prop_samples: intervals at which each is asked.
            num_samples: edges added at the quantiles of the last level.
            near_plane, far_plane: ends of the rays, world units.
            sampling_type: "uniform" spaces the first level evenly in distance, "lindisp" in its
                inverse.
            stratified: move the edges by ``jitter``.
            requires_grad: keep a graph through the densities.
            jitter: in [0, 1), one per ray; None draws from the global generator, which is seeded
                for foreign callers at each step.

        Returns:
            t_starts and t_ends: last level and new edges together, ``prop_samples[-1] +
            num_samples`` intervals. Not differentiable.
        """
        span = self._span(n_rays, near_plane, far_plane, sampling_type)
        if stratified and jitter is None:
            jitter = torch.rand(n_rays, device=span.near.device)
        jitter = jitter if stratified else None
        levels = propose(prop_sigma_fns, prop_samples, span, jitter, requires_grad)
        edges = self._choose(levels, num_samples, jitter, requires_grad)
        distances = span.distances(edges)
        return distances[:, :-1], distances[:, 1:]

    def _choose(
        self, levels: list[Level], count: int, jitter: Tensor | None, requires_grad: bool
    ) -> Float[Tensor, "n_rays S1"]:
        edges, weights = levels[-1]
        wanted = _quantiles(edges, count, jitter, len(levels))
        fine = quantile_edges(edges, spread(weights), wanted)
        return torch.cat([edges, fine], dim=-1).sort(dim=-1).values

    def _span(
        self, n_rays: int, near: float | Tensor, far: float | Tensor, spacing: Spacing
    ) -> "RaySpan":
        if spacing not in ("uniform", "lindisp"):
            raise ValueError(f"sampling_type is {spacing!r}; expected 'uniform' or 'lindisp'.")
        device = next((end.device for end in (near, far) if isinstance(end, Tensor)), self.device)
        ends = (torch.as_tensor(end, dtype=torch.float32, device=device) for end in (near, far))
        return RaySpan(*(end.expand(n_rays) for end in ends), spacing)


class ProposalEstimator(ImportanceEstimator):
    """Samples at the quantiles of a network that learns where the weights are (Mip-NeRF 360).

    `sampling` gives ``num_samples`` intervals around the quantiles, and none elsewhere. With
    ``requires_grad`` it keeps what `loss` needs.

    Attributes:
        anneal: power of the weights before their quantiles are taken; 0 makes even samples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.anneal = 1.0
        self._levels: list[Level] = []
        self._edges: Tensor | None = None

    def _choose(
        self, levels: list[Level], count: int, jitter: Tensor | None, requires_grad: bool
    ) -> Float[Tensor, "n_rays S1"]:
        edges, weights = levels[-1]
        weights = spread(weights) ** self.anneal
        chosen = _intervals(edges, weights, count, jitter, len(levels))
        self._levels, self._edges = (levels, chosen) if requires_grad else ([], None)
        return chosen

    def loss(self, weights: Float[Tensor, "n_samples"]) -> Float[Tensor, ""] | None:
        """`interlevel_loss` of the last samples, summed over levels; forgets them.

        Args:
            weights: of those samples, ray after ray.

        Returns:
            None if no graph was asked for.
        """
        levels, self._levels = self._levels, []
        if not levels:
            return None
        weights = weights.reshape(self._edges.shape[0], -1)
        return sum(interlevel_loss(self._edges, weights, *level) for level in levels)


class RaySpan:
    """Where rays begin and end, and how shares of the way become distances."""

    def __init__(
        self, near: Float[Tensor, "n_rays"], far: Float[Tensor, "n_rays"], spacing: Spacing
    ) -> None:
        self.near, self.far, self.spacing = near, far, spacing

    def distances(self, edges: Float[Tensor, "n_rays S1"]) -> Float[Tensor, "n_rays S1"]:
        """World units of shares of the way."""
        near, far = self.near[:, None], self.far[:, None]
        if self.spacing == "uniform":
            return near + edges * (far - near)
        return 1.0 / (edges / far + (1.0 - edges) / near.clamp(min=1e-6))


def propose(
    level_fns: Sequence[DensityFn],
    level_samples: Sequence[int],
    span: RaySpan,
    jitter: Float[Tensor, "n_rays"] | None,
    requires_grad: bool = False,
) -> list[Level]:
    """Edges and weights of every level: even intervals first, then quantiles of the level before.

    Only the weights are differentiable, where ``requires_grad``.
    """
    if not level_fns or len(level_fns) != len(level_samples) or min(level_samples) < 1:
        raise ValueError(
            f"prop_sigma_fns has {len(level_fns)} densities and prop_samples is "
            f"{list(level_samples)}; expected a positive number for each, and at least one."
        )
    # The first level takes even samples: those of one interval that reaches over the whole way.
    edges = torch.arange(2, device=span.near.device, dtype=span.near.dtype)
    edges = edges.expand(span.near.shape[0], -1)
    weights = torch.ones_like(edges[:, :1])
    levels = []
    for number, (density, n_intervals) in enumerate(zip(level_fns, level_samples)):
        edges = _intervals(edges, spread(weights), n_intervals, jitter, number)
        distances = span.distances(edges)
        starts, ends = distances[:, :-1], distances[:, 1:]
        with torch.set_grad_enabled(requires_grad):
            sigmas = density(starts, ends)
            if sigmas.shape != starts.shape:
                raise ValueError(
                    f"a density of prop_sigma_fns has shape {tuple(sigmas.shape)}; expected "
                    f"{tuple(starts.shape)}, one number per interval."
                )
            weights = interval_weights(sigmas, starts, ends)
        levels.append((edges, weights))
    return levels


def _intervals(
    edges: Float[Tensor, "n_rays S1"],
    weights: Float[Tensor, "n_rays S"],
    count: int,
    jitter: Tensor | None,
    level: int,
) -> Float[Tensor, "n_rays n_edges"]:
    """Edges of intervals around quantiles: half-way between them, mirrored at both ends.

    So the outermost intervals do not reach over the empty space before and behind. Those of level
    0, which nothing is known about, reach to the ends.
    """
    middles = quantile_edges(edges, weights, _quantiles(edges, count, jitter, level))
    if count == 1:
        return edges[:, [0, -1]]
    inner = (middles[:, 1:] + middles[:, :-1]) / 2
    if level == 0:
        return torch.cat([edges[:, :1], inner, edges[:, -1:]], dim=-1)
    first = 2 * middles[:, :1] - inner[:, :1]
    last = 2 * middles[:, -1:] - inner[:, -1:]
    return torch.cat(
        [torch.maximum(first, edges[:, :1]), inner, torch.minimum(last, edges[:, -1:])], dim=-1
    )


def _quantiles(
    like: Float[Tensor, "n_rays _"], count: int, jitter: Tensor | None, level: int
) -> Float[Tensor, "n_rays count"]:
    """(k + u) / n, with u the jitter, moved on from level to level, or 1/2."""
    steps = torch.arange(count, device=like.device, dtype=like.dtype)
    if jitter is None:
        return ((steps + 0.5) / count).expand(like.shape[0], -1)
    return (steps + ((jitter + level * GOLDEN_RATIO) % 1.0)[:, None]) / count
