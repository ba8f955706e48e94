"""Where there is something along a ray: an occupancy grid kept by moving maximum.

`ImportanceEstimator` is given here too, where extensions look for it.

Shapes: ``R`` cells per axis, ``n_cells`` = R^3.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import max_pool3d

from threestudio.models.importance_sampling import ImportanceEstimator
from threestudio.utils.device_copy import upload
from threestudio.utils.rng import generator

__all__ = ["ImportanceEstimator", "OccupancyGridEstimator"]

OccupancyFn = Callable[[Tensor, Tensor | None], Tensor]


class OccupancyGridEstimator(nn.Module):
    """Cells of a box that may hold something, over a set of scene times.

    ``occs`` holds a decaying maximum of density times step length, ``binaries`` which cells exceed
    the threshold min(mean, ``threshold``). Names and shapes are those of nerfacc's estimator with
    one level, so upstream checkpoints load. A fresh grid is full: nothing is skipped before the
    first update. Closed cells, ``occs`` -1, never hold anything.
    """

    def __init__(self, bbox: Float[Tensor, "2 3"], resolution: int = 32) -> None:
        super().__init__()
        if resolution < 1:
            raise ValueError(f"occupancy_resolution is {resolution}; expected at least 1.")
        self.n_axis = int(resolution)
        self.n_cells = self.n_axis**3
        self.register_buffer("resolution", torch.tensor([resolution] * 3, dtype=torch.int32))
        self.register_buffer("aabbs", bbox.reshape(1, 6).clone())
        self.register_buffer("occs", torch.zeros(self.n_cells))
        self.register_buffer("binaries", torch.ones([1] + [resolution] * 3, dtype=torch.bool))

    @torch.no_grad()
    def close(self, cells: Bool[Tensor, "n_cells"]) -> None:
        """Declare cells empty for good; checkpoints carry it."""
        self.occs.masked_fill_(cells, -1.0)
        self.binaries.logical_and_((self.occs >= 0).view_as(self.binaries))

    @property
    def cell_centres(self) -> Float[Tensor, "n_cells 3"]:
        """In the world, in the order of ``occs``."""
        cells = torch.arange(self.n_cells, device=self.occs.device)
        return self._cell_corner(cells) + 0.5 * self._cell_size()

    @torch.no_grad()
    def update(
        self,
        occupancy_fn: OccupancyFn,
        step: int,
        warmup_steps: int = 256,
        n_times: int = 1,
        decay: float = 0.95,
        threshold: float = 0.01,
        chunk_size: int = 0,
        margin: int = 0,
    ) -> None:
        """Refresh the cells: all of them in the warm-up, then a quarter at random and a quarter of
        the occupied ones.

        Each cell is asked at one random point, the same for all times; with ``n_times`` > 1 at that
        many stratified random times, of which the largest value counts. Nothing here depends on
        what was rendered before.

        Args:
            occupancy_fn: (points ``[n, 3]`` in the world, times ``[n]`` or None) -> density times
                step length ``[n, 1]``.
            step: training step; names the random stream.
            warmup_steps: steps in which all cells are asked.
            n_times: scene times per cell; 1 asks for no particular time (None).
            decay: factor on the old value of the asked cells.
            threshold: upper bound of the threshold.
            chunk_size: points per call; 0 asks all at once.
            margin: so many cells around one that holds something count as well. Where nothing is
                sampled nothing can grow: what changes its shape needs room.

        Random: role "occupancy" of the step, shared by all ranks.
        """
        device = self.occs.device
        stream = generator("occupancy", step)
        cells = self._choose_cells(step < warmup_steps, stream)
        jitter = torch.rand((cells.numel(), 3), generator=stream)
        jitter = upload(jitter, device)
        points = self._cell_corner(cells) + jitter * self._cell_size()
        values = None
        for index in range(n_times):
            times = None
            if n_times > 1:
                phase = upload(torch.rand(cells.numel(), generator=stream), device)
                times = (index + phase) / n_times
            now = _in_chunks(occupancy_fn, points, times, chunk_size)
            values = now if values is None else torch.maximum(values, now)
        is_closed = self.occs < 0
        decayed = self.occs.scatter(0, cells, self.occs[cells] * decay)
        # A cell may be asked twice; the larger answer wins, whatever the order.
        found = decayed.scatter_reduce(0, cells, values.to(decayed), "amax")
        self.occs.copy_(found.masked_fill(is_closed, -1.0))
        limit = self.mean_occupancy.clamp(max=threshold)
        holds = (self.occs > limit).view_as(self.binaries)
        if margin > 0:
            around = max_pool3d(holds[None].float(), 2 * margin + 1, 1, margin)[0] > 0
            holds = around & (self.occs >= 0).view_as(self.binaries)
        self.binaries.copy_(holds)

    def _choose_cells(self, everything: bool, stream: torch.Generator) -> Tensor:
        device = self.occs.device
        if everything or self.n_cells < 4:
            return torch.arange(self.n_cells, device=device)
        quarter = self.n_cells // 4
        uniform = torch.randint(self.n_cells, (quarter,), generator=stream)
        # Occupied cells first, in random order: no data-dependent size, hence no wait for a GPU.
        order = upload(torch.rand(self.n_cells, generator=stream), device) + self.binaries.view(-1)
        return torch.cat([upload(uniform, device), order.topk(quarter).indices])

    def _cell_size(self) -> Float[Tensor, "3"]:
        return (self.aabbs[0, 3:] - self.aabbs[0, :3]) / self.n_axis

    def _cell_corner(self, cells: Tensor) -> Float[Tensor, "n_cells 3"]:
        n = self.n_axis
        index = torch.stack([cells // (n * n), cells // n % n, cells % n], dim=-1)
        return self.aabbs[0, :3] + index * self._cell_size()

    @property
    def mean_occupancy(self) -> Float[Tensor, ""]:
        """Mean of ``occs`` over open cells: nerfacc's upper bound of the alpha threshold."""
        share_open = (self.occs >= 0).to(self.occs).mean()
        return self.occs.clamp(min=0.0).mean() / share_open.clamp(min=1e-6)


def _in_chunks(
    occupancy_fn: OccupancyFn, points: Tensor, times: Tensor | None, chunk_size: int
) -> Float[Tensor, "n_points"]:
    size = chunk_size if chunk_size > 0 else max(1, points.shape[0])
    pieces = []
    for start in range(0, points.shape[0], size):
        part = slice(start, start + size)
        pieces.append(occupancy_fn(points[part], None if times is None else times[part]).view(-1))
    return torch.cat(pieces)
