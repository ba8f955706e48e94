"""Training images of the embedded image model: scenes seen at several times from all around.

The cameras are those that `fourd-pair-datamodule` puts around a scene by default, at any azimuth
and at any scene time. Geometry is rendered once, as layers of coverage and shading; colours, words
and background are drawn anew each time a cell is used. Some scenes are rendered once more in
another material, so that words can be taught to win over an image. Held-out appearances and motions
never occur.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world.grammar import WorldScene, parse_caption
from custom.fourd.world.render import render_layers
from custom.fourd.world.vocabulary import MATERIALS

from .world_clips import draw_moving_scene
from .world_views import FOVY_RAD, draw

NUM_TIMES = NUM_AZIMUTHS = 4
"""Cells of a scene: each of its times by each of its azimuths."""
ELEVATION_DEG, DISTANCE = 15.0, 3.0
TWIN_EVERY = 5
"""The last of so many groups is the one before it in another material."""


@dataclass
class PairGroups:
    """Rendered groups: scenes whose colours are placeholders, their cells, and 8-bit layers."""

    scenes: list[WorldScene]
    frame_times: Float[Tensor, "g 4"]
    """Scene times in [0, 1), one in each quarter."""
    azimuths_deg: Float[Tensor, "g 4"]
    """One in each quarter of the turn."""
    layers: UInt8[Tensor, "g 4 4 2 k 64 64"]
    """Per time and azimuth: coverage, then shading, of each object, times 255."""


def twin_of(index: int, count: int) -> int | None:
    """The group that shows the same cells in another material, where there is one."""
    if index % TWIN_EVERY == TWIN_EVERY - 1:
        return index - 1
    if index % TWIN_EVERY == TWIN_EVERY - 2 and index + 1 < count:
        return index + 1
    return None


def in_other_material(scene: WorldScene, generator: torch.Generator) -> WorldScene:
    """The scene with one object made of another material."""
    objects = list(scene.objects)
    index = int(torch.randint(len(objects), (), generator=generator))
    others = [word for word in MATERIALS if word != objects[index].material]
    objects[index] = replace(objects[index], material=draw(generator, others))
    return replace(scene, objects=tuple(objects))


def render_pair_groups(
    count: int, num_objects: int, generator: torch.Generator, size_px: int = 64, report=None
) -> PairGroups:
    """Draw and render `count` groups."""
    parts = torch.rand((2, count, NUM_TIMES), generator=generator)
    times, azimuths = (torch.arange(NUM_TIMES) + parts) / NUM_TIMES
    azimuths = 360.0 * azimuths
    scenes: list[WorldScene] = []
    shape = (count, NUM_TIMES, NUM_AZIMUTHS, 2, num_objects, size_px, size_px)
    layers = torch.empty(shape, dtype=torch.uint8)
    fovy = torch.full((NUM_TIMES * NUM_AZIMUTHS,), FOVY_RAD)
    for index in range(count):
        if index % TWIN_EVERY == TWIN_EVERY - 1:
            scenes.append(in_other_material(scenes[-1], generator))
            times[index], azimuths[index] = times[index - 1], azimuths[index - 1]
        else:
            scenes.append(draw_moving_scene(generator, num_objects))
        turns = azimuths[index].repeat(NUM_TIMES)
        poses = camera_from_orbit(torch.full_like(turns, ELEVATION_DEG), turns, DISTANCE)
        moments = times[index].repeat_interleave(NUM_AZIMUTHS)
        both = render_layers(scenes[-1], poses, fovy, size_px, size_px, moments)
        cells = (torch.stack(both, dim=1) * 255).round().to(torch.uint8)
        layers[index] = cells.unflatten(0, (NUM_TIMES, NUM_AZIMUTHS))
        if report and index % 200 == 199:
            report(f"rendered {index + 1} of {count} groups of {num_objects}")
    return PairGroups(scenes, times, azimuths, layers)


def save_pair_groups(groups: PairGroups, path: Path) -> None:
    """Write groups as plain tensors and captions."""
    torch.save(
        {
            "captions": [scene.caption for scene in groups.scenes],
            "frame_times": groups.frame_times,
            "azimuths_deg": groups.azimuths_deg,
            "layers": groups.layers,
        },
        path,
    )


def load_pair_groups(path: Path) -> PairGroups:
    """Read what `save_pair_groups` wrote."""
    data = torch.load(path, weights_only=True, mmap=True)
    scenes = [parse_caption(caption) for caption in data["captions"]]
    return PairGroups(scenes, data["frame_times"], data["azimuths_deg"], data["layers"])
