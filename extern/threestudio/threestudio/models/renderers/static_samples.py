"""Samples of rays in lists of fixed length, so that no shape depends on data and nothing waits.

A list of C places receives the n samples that are there. Of n < C some are repeated without length:
a repeat lies where its sample does, on the same ray, and adds exactly zero optical depth, so every
sum along rays is that of the n. Of n > C the places take samples at even distances in the list,
ordered by ray and distance, and each counts for n / C times its length: all rays are sampled more
coarsely, by the same factor, and none loses its far end. Both are one rule: place j holds sample
floor(j n / C).

Shapes: ``n_rays`` rays of ``S`` candidates; ``C`` places. All counts are tensors on the device.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from threestudio.models.renderers.sample_budget import SampleBudget
from threestudio.models.renderers.volume_rendering import RaySamples, RayWalk

# Candidates per pass of the bookkeeping, some tens of bytes each.
PASS_CANDIDATES = 2**23


class Places:
    """Which of ``wanted`` samples a list of ``capacity`` places holds, and where.

    Args:
        wanted: number of samples, an integer on the device.
        capacity: length of the list, at least 1.
    """

    def __init__(self, wanted: Int[Tensor, ""], capacity: int) -> None:
        self.capacity = capacity
        self.wanted = wanted
        self._some = wanted.clamp(min=1)
        self._kept = self._some.clamp(max=capacity)

    @property
    def stretch(self) -> Float[Tensor, ""]:
        """By how much the kept samples are longer: 1 where all are kept."""
        return self._some.float() / self._kept.float()

    def of_samples(self, ranks: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """Entry of each sample among the kept ones, ``capacity`` where it is left out."""
        entry = torch.div(ranks * self._kept + self._some - 1, self._some, rounding_mode="floor")
        back = torch.div(entry * self._some, self._kept, rounding_mode="floor")
        return torch.where(back == ranks, entry, self.capacity)

    def entries(self) -> tuple[Int[Tensor, "C"], Bool[Tensor, "C"]]:
        """The entry that each place takes, ascending, and whether it is the first to take it."""
        places = torch.arange(self.capacity, device=self.wanted.device)
        entry = torch.div(places * self._kept, self.capacity, rounding_mode="floor")
        before = torch.div((places - 1) * self._kept, self.capacity, rounding_mode="floor")
        return entry, (entry != before) & (self.wanted > 0)


@dataclass
class _Candidates:
    """All candidates of a walk, some rays at a time."""

    walk: RayWalk
    n_rays: int
    n_steps: int
    chunk: int

    def __post_init__(self) -> None:
        like = self.walk.t_first
        self._steps = torch.arange(self.n_steps, device=like.device, dtype=like.dtype)
        self.parts = [slice(i, i + self.chunk) for i in range(0, self.n_rays, self.chunk)]
        # One pass is remembered; several are looked up a second time rather than held.
        self._only = self._alive(self.parts[0]) if len(self.parts) == 1 else None

    def _alive(self, part: slice) -> Bool[Tensor, "n S"]:
        return self.walk.candidates(part, self._steps)[1]

    def alive(self, part: slice) -> Bool[Tensor, "n S"]:
        """Which candidates of these rays are samples."""
        return self._alive(part) if self._only is None else self._only

    def numbers(self, part: slice) -> Int[Tensor, "n S"]:
        """The number of each candidate among all: ray times steps plus step."""
        first, last = part.start * self.n_steps, min(part.stop, self.n_rays) * self.n_steps
        return torch.arange(first, last, device=self._steps.device).view(-1, self.n_steps)


@torch.no_grad()
def march_rays_static(
    rays_o: Float[Tensor, "n_rays 3"],
    rays_d: Float[Tensor, "n_rays 3"],
    bbox: Float[Tensor, "2 3"],
    step_size: float,
    n_steps: int,
    budget: SampleBudget,
    jitter: Float[Tensor, "n_rays"] | None = None,
    occupied: Bool[Tensor, "R R R"] | None = None,
    near_plane: float = 0.0,
    far_plane: float = 1e10,
    ray_chunk_size: int = 0,
) -> RaySamples:
    """The samples of `march_rays` in a list whose length the budget chooses beforehand.

    Arguments as there, but for ``budget``. Every ray is walked for ``n_steps``, for which of them
    meet anything is known on the device alone.

    Returns:
        As many samples as the list has places; see the module's text for those that are repeated or
        left out. Without any sample all places lie at the first ray's origin. Not differentiable.
    """
    n_rays = rays_o.shape[0]
    if n_rays == 0:
        return RaySamples(rays_o.new_zeros(0).long(), rays_o.new_zeros(0), rays_o.new_zeros(0))
    walk = RayWalk.start(rays_o, rays_d, bbox, step_size, jitter, occupied, near_plane, far_plane)
    chunk = ray_chunk_size if ray_chunk_size > 0 else max(1, PASS_CANDIDATES // n_steps)
    candidates = _Candidates(walk.with_harmless_misses(), n_rays, n_steps, chunk)
    counts = torch.cat([candidates.alive(part).sum(dim=1) for part in candidates.parts])
    ends = counts.cumsum(0)
    places = Places(ends[-1], budget.capacity(n_rays, ends[-1], n_rays * n_steps))
    found = _collect(candidates, ends - counts, places)
    entry, is_first = places.entries()
    numbers = found.index_select(0, entry)
    rows = torch.div(numbers, n_steps, rounding_mode="floor")
    steps = walk.k_first.index_select(0, rows) + (numbers - rows * n_steps)
    t_mids = steps * step_size + walk.t_first.index_select(0, rows)
    t_mids = torch.where(places.wanted > 0, t_mids, 0.0)
    half = is_first * places.stretch.to(t_mids) * (step_size / 2)
    return RaySamples(rows, t_mids - half, t_mids + half)


def _collect(
    candidates: _Candidates, first_ranks: Int[Tensor, "n_rays"], places: Places
) -> Int[Tensor, "C1"]:
    """Number of the candidate of each entry; the last element receives what is left out."""
    found = first_ranks.new_zeros(places.capacity + 1)
    for part in candidates.parts:
        alive = candidates.alive(part)
        ranks = alive.cumsum(dim=1).add_(first_ranks[part, None] - 1)
        entries = torch.where(alive, places.of_samples(ranks), places.capacity)
        found.scatter_(0, entries.view(-1), candidates.numbers(part).reshape(-1))
    return found


@torch.no_grad()
def select_static(
    samples: RaySamples, keep: Bool[Tensor, "n_samples"], n_rays: int, budget: SampleBudget
) -> RaySamples:
    """The kept samples, less repeats, in a list whose length the budget chooses beforehand.

    Args:
        samples: a list of fixed length, which may hold repeats.
        keep: which of them to keep.
        n_rays: rays of the pass.
        budget: chooses the length.
    """
    if samples.n_samples == 0:
        return samples
    keep = keep & ~samples.is_padding
    ends = keep.cumsum(0)
    places = Places(ends[-1], budget.capacity(n_rays, ends[-1], samples.n_samples))
    found = ends.new_zeros(places.capacity + 1)
    entries = torch.where(keep, places.of_samples(ends - 1), places.capacity)
    found.scatter_(0, entries, torch.arange(samples.n_samples, device=found.device))
    entry, is_first = places.entries()
    chosen = samples.select(found.index_select(0, entry))
    t_mids, lengths = chosen.t_mids, chosen.t_ends - chosen.t_starts
    half = lengths * is_first * places.stretch.to(lengths) / 2
    return RaySamples(chosen.ray_indices, t_mids - half, t_mids + half)
