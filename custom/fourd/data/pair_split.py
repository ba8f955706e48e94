"""Which cells of a scene are trained on, and which unseen ones are scored.

A scene's times and cameras are split separately, by their places: training sees its times by its
cameras, so a cell is unseen where its time or its camera is held out. Nothing here is random but
which of too many pairs are scored, and that depends on no seed of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from threestudio.utils.rng import generator
from torch import Tensor

from .pair_cells import CellSource, OrbitCameras, view_gaps_deg
from .pair_sampling import KINDS, PairChoice, TimePairs, TrainCells, ViewPairs

PROTOCOLS = KINDS[:3]
"""Fixed view and varying time, varying view and fixed time, both varying."""
_EVAL_SEED = 0
_ROUNDING = 1e-5


@dataclass(frozen=True)
class SplitOptions:
    """How a scene is split, and how far apart scored pairs are."""

    train_every_time: int = 2
    """train on every so many-th time from the first; 1 trains on all"""
    hold_out_azimuth_every: int = 4
    """of so many neighbouring azimuths hold the middle one out; 0 holds none out"""
    min_time_gap: float = 0.25
    """least |time_j - time_i| of a scored pair whose time varies"""
    min_angle_deg: float = 45.0
    """least angle between the cameras of a scored pair whose view varies"""
    even_distances: bool = False
    """give every distance in time and view the same share of the training pairs"""


@dataclass(frozen=True)
class CellSplit:
    """Places of a scene's times and cameras."""

    train_times: list[int]
    held_out_times: list[int]
    train_cameras: list[int]
    held_out_cameras: list[int]

    def train_cells(self, cameras: OrbitCameras, even: bool) -> TrainCells:
        """Return what training draws pairs from."""
        gaps = view_gaps_deg(cameras)[self.train_cameras][:, self.train_cameras]
        return TrainCells(
            self.train_times,
            self.train_cameras,
            TimePairs(len(self.train_times), even),
            ViewPairs(gaps, even),
        )


def split_cells(source: CellSource, options: SplitOptions) -> CellSplit:
    """Split a scene's times and cameras.

    Azimuths are numbered as they grow from 0 degrees; of `hold_out_azimuth_every` neighbours the
    middle one is held out, at every elevation. An axis with a single place is trained on.
    """
    n_times = len(source.frame_times)
    every = options.train_every_time
    train_times = list(range(0, n_times, every))
    azimuths = [round(float(angle) % 360.0, 3) % 360.0 for angle in source.cameras.azimuth]
    order = {angle: place for place, angle in enumerate(sorted(set(azimuths)))}
    every = options.hold_out_azimuth_every
    held = {angle for angle, place in order.items() if every and place % every == every // 2}
    held = held if len(held) < len(order) else set()
    cameras = range(len(azimuths))
    return CellSplit(
        train_times=train_times,
        held_out_times=[k for k in range(n_times) if k not in set(train_times)],
        train_cameras=[k for k in cameras if azimuths[k] not in held],
        held_out_cameras=[k for k in cameras if azimuths[k] in held],
    )


def scored_pairs(
    source: CellSource, split: CellSplit, options: SplitOptions, scene: int, protocol: str, n: int
) -> PairChoice:
    """Return pairs of a protocol: a trained cell is shown, an unseen one is to be made.

    Where the time varies the target's time is held out, where the view varies its camera is, and
    each that varies does so by at least the options' gap. Pairs are ordered by place.

    Args:
        scene: the scene's place among the run's. protocol: one of `PROTOCOLS`.
        n: at most so many, spread evenly over the distances; 0 takes all.
    """
    times, views = _time_moves(source, split, options), _view_moves(source, split, options)
    if protocol == "time":
        views = torch.tensor(split.train_cameras).reshape(-1, 1).expand(-1, 2)
    elif protocol == "view":
        times = torch.tensor(split.train_times).reshape(-1, 1).expand(-1, 2)
    total = len(times) * len(views)
    if n == 0 or total <= n:
        places = torch.arange(total)
        places = torch.stack([places // max(1, len(views)), places % max(1, len(views))], dim=-1)
    else:
        stream = generator(f"pair-eval-{protocol}", 0, scene, seed=_EVAL_SEED)
        spread = torch.stack([torch.randperm(n, generator=stream), torch.arange(n)], dim=-1)
        within = torch.rand((n, 2), generator=stream, dtype=torch.float64)
        counts = torch.tensor([len(times), len(views)])
        # Two equal rows are one pair, so there may be a few less than n.
        places = ((spread + within) / n * counts).long().minimum(counts - 1)
    moves = torch.cat([times[places[:, 0]], views[places[:, 1]]], dim=-1)
    head = torch.tensor([scene, KINDS.index(protocol)]).expand(len(moves), 2)
    return PairChoice.of_rows(torch.cat([head, moves], dim=-1).unique(dim=0).tolist())


def _time_moves(source: CellSource, split: CellSplit, options: SplitOptions) -> Tensor:
    """Places (i, j) with i trained, j held out and far enough, nearest first, [m 2]."""
    first, second = torch.tensor(split.train_times), torch.tensor(split.held_out_times)
    times = source.frame_times
    gaps = (times[second.long()][None] - times[first][:, None]).abs()
    return _far_enough(first, second.long(), gaps, options.min_time_gap)


def _view_moves(source: CellSource, split: CellSplit, options: SplitOptions) -> Tensor:
    """Places (a, b) with a trained, b held out and far enough, nearest first, [m 2]."""
    first, second = torch.tensor(split.train_cameras), torch.tensor(split.held_out_cameras)
    gaps = view_gaps_deg(source.cameras)[first][:, second.long()]
    return _far_enough(first, second.long(), gaps, options.min_angle_deg)


def _far_enough(first: Tensor, second: Tensor, gaps: Tensor, least: float) -> Tensor:
    rows, columns = torch.nonzero(gaps >= least * (1 - _ROUNDING)).unbind(dim=1)
    order = torch.argsort(gaps[rows, columns], stable=True)
    return torch.stack([first[rows[order]], second[columns[order]]], dim=-1)


def union(choices: list[PairChoice]) -> PairChoice:
    """Return several choices as one, in order."""
    columns = zip(*(vars(choice).values() for choice in choices), strict=True)
    return PairChoice(*(torch.cat(column) for column in columns))
