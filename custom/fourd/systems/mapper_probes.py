"""Probes of a test of time and view control: the cell that asks for nothing, and turned signs.

Legend: n probes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from custom.fourd.data.pair_places import pair_places
from custom.fourd.data.pair_sampling import KINDS, PairChoice
from custom.fourd.metrics.control_accuracy import reversal
from custom.fourd.metrics.image_quality import dilated_union, psnr

from .mapper_truth import SceneTruth

LEAST_FRAMES = 2
_WHOLE_TURN = 360.0


@dataclass(frozen=True)
class SignProbe:
    """A source cell, and the two cells on both sides of it along one axis."""

    source: tuple[int, int]
    """time and camera"""
    forward: tuple[int, int]
    backward: tuple[int, int]


def time_probes(truth: SceneTruth, camera_ids: Sequence[int], count: int) -> list[SignProbe]:
    """Times i - d, i, i + d by each camera, where the truth differs most between both sides."""
    n_times = len(truth.source.frame_times)
    found = []
    for place in range(count):
        camera = camera_ids[place * len(camera_ids) // count]
        features = truth.times(camera).features
        moves = [
            (i, d)
            for d in range(LEAST_FRAMES, n_times // 2 + 1)
            for i in range(d, n_times - d)
        ]  # fmt: skip
        ranked = sorted(moves, key=lambda m: _difference(features, m[0] + m[1], m[0] - m[1]))
        if ranked:
            # Another of the best for every probe by the same camera.
            i, d = ranked[-1 - min(place // len(camera_ids), len(ranked) - 1)]
            found.append(SignProbe((i, camera), (i + d, camera), (i - d, camera)))
    return found


def view_probes(
    truth: SceneTruth, time_ids: Sequence[int], count: int, least_deg: float
) -> list[SignProbe]:
    """Azimuths a - d, a, a + d at each time, where the truth differs most between both sides."""
    level = truth.level_cameras(0)
    azimuth = truth.source.cameras.azimuth[level]
    order = azimuth.argsort().tolist()
    n_views, found = len(order), []
    moves = [
        (a, d)
        for d in range(1, (n_views + 1) // 2)
        for a in range(n_views)
        if d * _WHOLE_TURN / n_views >= least_deg - 1e-3
    ]  # fmt: skip
    if not moves:
        return []
    for place in range(count):
        time_id = time_ids[place * len(time_ids) // count]
        features = truth.views(time_id, level[0]).features[order]

        def gap(move: tuple[int, int], features: Tensor = features) -> float:
            a, d = move
            return _difference(features, (a + d) % n_views, (a - d) % n_views)

        a, d = max(moves, key=gap)
        ids = [level[order[k % n_views]] for k in (a, a + d, a - d)]
        found.append(SignProbe(*((time_id, camera) for camera in ids)))
    return found


def _difference(features: Tensor, first: int, second: int) -> float:
    return float((features[first] - features[second]).norm())


def probe_batch(
    truth: SceneTruth, scene: int, moves: Sequence[tuple[tuple[int, int], tuple[int, int]]]
) -> dict[str, Any]:
    """A batch of the pair source for (source, target) cells of one scene, without jitter."""
    rows = [
        (0, KINDS.index("single"), source[0], target[0], source[1], target[1])
        for source, target in moves
    ]
    choice = PairChoice.of_rows(rows)
    places = pair_places([truth.source], choice)
    cond_rgb, cond_alpha = truth.images([source for source, _ in moves])
    target_rgb, target_alpha = truth.images([target for _, target in moves])
    return {
        **places,
        "cond_rgb": cond_rgb,
        "cond_alpha": cond_alpha,
        "target_rgb": target_rgb,
        "target_alpha": target_alpha,
        "caption": [truth.source.caption] * len(moves),
        "scene_index": torch.full((len(moves),), scene),
    }


Generate = Callable[[dict[str, Any]], Tensor]


def identity_figures(
    truths: Sequence[SceneTruth], cells: Sequence[Sequence[tuple[int, int]]], generate: Generate
) -> dict[str, Any] | None:
    """How near images that ask for no change are to their sources; None without a cell.

    Args:
        truths: of the scenes. cells: of each scene, by (time, camera).
        generate: images of a batch.
    """
    whole, inside = [], []
    for place, (truth, chosen) in enumerate(zip(truths, cells, strict=True)):
        if not chosen:
            continue
        batch = probe_batch(truth, place, [(cell, cell) for cell in chosen])
        images = generate(batch).cpu()
        mask = dilated_union(batch["target_alpha"], batch["cond_alpha"])
        whole += psnr(images, batch["cond_rgb"]).tolist()
        inside += psnr(images, batch["cond_rgb"], mask).tolist()
    if not whole:
        return None
    count = len(whole)
    return {"psnr": sum(whole) / count, "psnr_masked": sum(inside) / count, "cells": count}


def reversal_figures(
    truths: Sequence[SceneTruth], probes: Sequence[Sequence[SignProbe]], generate: Generate
) -> dict[str, Any] | None:
    """What turning the sign of a control does, over all scenes; None where no truth differs."""
    parts: list[list[Tensor]] = [[], [], [], []]
    for place, (truth, chosen) in enumerate(zip(truths, probes, strict=True)):
        if not chosen:
            continue
        moves = [(probe.source, probe.forward) for probe in chosen]
        moves += [(probe.source, probe.backward) for probe in chosen]
        batch = probe_batch(truth, place, moves)
        made = truth.features(generate(batch)).cpu()
        true = truth.features(batch["target_rgb"]).cpu()
        for part, rows in zip(parts, (*made.chunk(2), *true.chunk(2)), strict=True):
            part.append(rows)
    if not parts[0]:
        return None
    found = reversal(*(torch.cat(part) for part in parts))
    if found is None:
        return None
    probes_in_all = sum(len(chosen) for chosen in probes)
    return {"correlation": found.correlation, "share": found.share, "probes": probes_in_all}
