"""Which pairs a training step sees, as a pure function of (seed, step, item).

Each quantity (scene, kind, times, cameras) is drawn by a quantile in [0, 1): pair k of the N that
make a step, over all processes, takes one from the part [p_k, p_k + 1) / N, where p is an order of
the step that all processes share. So a step is spread evenly over scenes, kinds and distances, and
the number of processes changes nothing.

Legend: n pairs here, N pairs in the step, t times and c cameras of a scene.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from threestudio.data.camera_sampling import ItemSpan
from threestudio.utils.rng import generator, rand_items
from torch import Tensor

KINDS = ("time", "view", "both", "identity", "single")
"""What differs in a pair; `pair_kind` of a batch is the place in this list. "single" is a picture
paired with itself, from scenes that have no more than one where there are any."""
_MOVES = {"time": (True, False), "view": (False, True), "both": (True, True)}


@dataclass(frozen=True)
class PairChoice:
    """Pairs by the places of their frames: frame i of camera a is shown, j of b is to be made."""

    scene: Int[Tensor, "n"]
    kind: Int[Tensor, "n"]
    """place in `KINDS`"""
    frame_i: Int[Tensor, "n"]
    frame_j: Int[Tensor, "n"]
    camera_a: Int[Tensor, "n"]
    camera_b: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.scene)

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]]) -> PairChoice:
        """Return the choice whose rows are (scene, kind, i, j, a, b)."""
        return cls(*torch.tensor(rows, dtype=torch.long).reshape(-1, 6).unbind(dim=1))


class OrderedPairs:
    """All ordered pairs of different places, nearest first, addressed by a quantile.

    Args:
        groups: number of pairs at each distance, nearest distance first.
        even: give every distance the same share; otherwise every pair has the same.
    """

    def __init__(self, groups: Sequence[int], even: bool) -> None:
        self.groups = list(groups)
        weights = torch.tensor([1.0 if even else float(n) for n in self.groups]).double()
        self._ends = weights.cumsum(0) / weights.sum().clamp_min(1.0)

    def __len__(self) -> int:
        return sum(self.groups)

    def locate(self, quantile: float) -> tuple[int, int]:
        """Return (distance's place, pair's place within it) of a quantile in [0, 1)."""
        group = int(torch.searchsorted(self._ends, quantile, right=True))
        group = min(group, len(self.groups) - 1)
        start = float(self._ends[group - 1]) if group else 0.0
        share = (quantile - start) / (float(self._ends[group]) - start)
        return group, _place(share, self.groups[group])


class TimePairs(OrderedPairs):
    """Ordered pairs among ``n`` times by how many lie between; takes O(n) memory."""

    def __init__(self, n: int, even: bool = False) -> None:
        super().__init__([2 * (n - gap) for gap in range(1, n)], even)
        self.n = n

    def at(self, quantile: float) -> tuple[int, int]:
        """Return the places of a pair."""
        group, member = self.locate(quantile)
        gap = group + 1
        start = member % (self.n - gap)
        return (start, start + gap) if member < self.n - gap else (start + gap, start)


class ViewPairs(OrderedPairs):
    """Ordered pairs among cameras by how far apart they are; takes O(c^2) memory.

    Args:
        gaps_deg: distances; those that agree to a thousandth of a degree count as one.
        even: see `OrderedPairs`.
    """

    def __init__(self, gaps_deg: Float[Tensor, "c c"], even: bool = False) -> None:
        first, second = torch.nonzero(~torch.eye(len(gaps_deg)).bool()).unbind(dim=1)
        rounded = (gaps_deg[first, second] * 1000).round()
        order = torch.argsort(rounded, stable=True)
        counts = torch.unique_consecutive(rounded[order], return_counts=True)[1]
        super().__init__(counts.tolist(), even)
        self._pairs = torch.stack([first[order], second[order]], dim=-1)
        self._starts = [0, *counts.cumsum(0).tolist()]

    def at(self, quantile: float) -> tuple[int, int]:
        """Return the places of a pair."""
        group, member = self.locate(quantile)
        first, second = self._pairs[self._starts[group] + member].tolist()
        return first, second


@dataclass(frozen=True)
class TrainCells:
    """The cells of a scene that training may see: every one of its times by every camera."""

    times: list[int]
    cameras: list[int]
    time_pairs: TimePairs
    view_pairs: ViewPairs

    def shares(self, mix: Mapping[str, float]) -> Float[Tensor, "4"]:
        """Return the share of each kind but "single": those the scene has, in the mix's ratio.

        Raises:
            ValueError: the mix has none of them.
        """
        has_times, has_views = len(self.times) > 1, len(self.cameras) > 1
        able = (has_times, has_views, has_times and has_views, True)
        weights = torch.tensor([float(mix[kind]) for kind in KINDS[:4]]).double()
        weights = weights * torch.tensor(able)
        if weights.sum() <= 0:
            raise ValueError(
                f"a scene has {len(self.times)} training times and {len(self.cameras)} training "
                f"cameras, and data.mix is {dict(mix)}; expected a kind that such a scene can "
                "show, such as time for a video. Change data.mix, or leave the scene out."
            )
        return weights / weights.sum()

    @property
    def is_single(self) -> bool:
        """Whether the scene is one picture."""
        return len(self.times) == 1 and len(self.cameras) == 1


class PairSampler:
    """Draws the pairs of training steps.

    Args:
        scenes: the cells of each scene.
        mix: weight of "time", "view", "both" and "identity".
        single_share: share of the pairs, in [0, 1], that are "single".
    """

    def __init__(
        self, scenes: Sequence[TrainCells], mix: Mapping[str, float], single_share: float = 0.0
    ) -> None:
        self.scenes = list(scenes)
        moving = [place for place, cells in enumerate(scenes) if not cells.is_single]
        still = [place for place, cells in enumerate(scenes) if cells.is_single]
        self._moving, self._still = moving, still or moving
        self._ends = {place: self.scenes[place].shares(mix).cumsum(0) for place in moving}
        self.single_share = single_share if moving else 1.0

    def draw(self, span: ItemSpan) -> PairChoice:
        """Draw the pairs of ``span``; random from the roles "pair-scene", "pair-kind",
        "pair-time" and "pair-view", and their orders "pair-...-order"."""
        quantiles = [step_quantiles(span, f"pair-{name}") for name in ("scene", "kind")]
        quantiles += [step_quantiles(span, f"pair-{name}") for name in ("time", "view")]
        return PairChoice.of_rows([self._pair(*row) for row in zip(*quantiles, strict=True)])

    def _pair(self, of_scene: float, of_kind: float, of_time: float, of_view: float) -> list[int]:
        is_single = of_kind < self.single_share
        pool = self._still if is_single else self._moving
        scene = pool[_place(of_scene, len(pool))]
        cells, kind = self.scenes[scene], "single"
        if not is_single:
            rest = (of_kind - self.single_share) / (1.0 - self.single_share)
            ends = self._ends[scene]
            # The last end is 1 up to rounding, and kinds without a share end where they begin.
            kind = KINDS[int(torch.searchsorted(ends[:-1], rest * float(ends[-1]), right=True))]
        moves_time, moves_view = _MOVES.get(kind, (False, False))
        i = j = _place(of_time, len(cells.times))
        a = b = _place(of_view, len(cells.cameras))
        if moves_time:
            i, j = cells.time_pairs.at(of_time)
        if moves_view:
            a, b = cells.view_pairs.at(of_view)
        frames = cells.times[i], cells.times[j]
        return [scene, KINDS.index(kind), *frames, cells.cameras[a], cells.cameras[b]]


def step_quantiles(span: ItemSpan, role: str) -> list[float]:
    """Draw one number in [0, 1) for each pair of ``span``, evenly spread over the whole step."""
    order = torch.randperm(span.total, generator=generator(f"{role}-order", span.step))
    within = rand_items((span.count,), role, span.step, span.first).double()
    places = order[span.first : span.first + span.count].double()
    return ((places + within) / span.total).tolist()


def _place(quantile: float, count: int) -> int:
    return min(math.floor(quantile * count), count - 1)
