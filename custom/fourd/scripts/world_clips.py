"""Training clips from the world: one camera, all times; geometry rendered once and reused.

As in `world_views`, colours, words and background are drawn anew each time a clip is used, and
held-out appearances never occur; nor do the held-out pairs of shape and motion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world.grammar import WorldObject, WorldScene, is_held_out_motion, parse_caption
from custom.fourd.world.render import render_layers
from custom.fourd.world.vocabulary import MOTIONS

from .world_views import FOVY_RAD, chance, draw, draw_cameras, draw_colour, draw_scene

NUM_FRAMES = 16
STILL_SHARE = 0.12
"""Of the objects: at rest, which the video prior must know as well."""


@dataclass
class WorldClips:
    """Rendered clips: scenes whose colours are placeholders, cameras, times, and 8-bit layers."""

    scenes: list[WorldScene]
    cameras: Float[Tensor, "g 3"]
    """Azimuth and elevation in degrees, distance; one camera serves all frames."""
    first_times: Float[Tensor, "g"]
    """Scene time of the first frame, in [0, 1/16); frame k is at first + k/16."""
    layers: UInt8[Tensor, "g 16 2 k 64 64"]
    """Per frame: coverage, then shading, of each object, times 255."""

    def frame_times(self, clip: int) -> Float[Tensor, "16"]:
        """Scene times of a clip's frames."""
        return self.first_times[clip] + torch.arange(NUM_FRAMES) / NUM_FRAMES

    def pose(self, clip: int) -> Float[Tensor, "4 4"]:
        """Camera-to-world matrix of a clip."""
        azimuth, elevation, distance = self.cameras[clip].unbind()
        return camera_from_orbit(elevation[None], azimuth[None], distance[None])[0]


def draw_moving_scene(generator: torch.Generator, num_objects: int) -> WorldScene:
    """A scene of the training split in which most objects move."""
    scene = draw_scene(generator, num_objects)
    return replace(scene, objects=tuple(_set_in_motion(o, generator) for o in scene.objects))


def spins(scene: WorldScene) -> bool:
    """Whether anything spins: the motion that is learned last, as it is seen in shading alone."""
    return any(item.motion == "spinning" for item in scene.objects)


@cache
def spinning_share(caption: str) -> float:
    """Share of the named objects that spin; none in an empty caption."""
    objects = parse_caption(caption).objects if caption else ()
    return sum(item.motion == "spinning" for item in objects) / max(len(objects), 1)


def _set_in_motion(item: WorldObject, generator: torch.Generator) -> WorldObject:
    if chance(generator, STILL_SHARE):
        return item
    allowed = [motion for motion in MOTIONS if not is_held_out_motion(item.shape, motion)]
    return replace(item, motion=draw(generator, allowed))


def recolour_clip(scene: WorldScene, generator: torch.Generator) -> WorldScene:
    """The same geometry and motion in other colours."""
    return replace(
        scene,
        objects=tuple(
            replace(item, colour=draw_colour(item.shape, item.material, generator))
            for item in scene.objects
        ),
    )


def render_clips(
    count: int, num_objects: int, generator: torch.Generator, size_px: int = 64, report=None
) -> WorldClips:
    """Draw and render `count` clips."""
    cameras = draw_cameras(count, generator)
    first_times = torch.rand((count,), generator=generator) / NUM_FRAMES
    scenes = [draw_moving_scene(generator, num_objects) for _ in range(count)]
    shape = (count, NUM_FRAMES, 2, num_objects, size_px, size_px)
    clips = WorldClips(scenes, cameras, first_times, torch.empty(shape, dtype=torch.uint8))
    fovy = torch.full((NUM_FRAMES,), FOVY_RAD)
    for index, scene in enumerate(scenes):
        poses = clips.pose(index).expand(NUM_FRAMES, 4, 4)
        times = clips.frame_times(index)
        both = torch.stack(render_layers(scene, poses, fovy, size_px, size_px, times), dim=1)
        clips.layers[index] = (both * 255).round().to(torch.uint8)
        if report and index % 500 == 499:
            report(f"rendered {index + 1} of {count} clips of {num_objects}")
    return clips


def save_clips(clips: WorldClips, path: Path) -> None:
    """Write clips as plain tensors and captions."""
    torch.save(
        {
            "captions": [scene.caption for scene in clips.scenes],
            "cameras": clips.cameras,
            "first_times": clips.first_times,
            "layers": clips.layers,
        },
        path,
    )


def load_clips(path: Path) -> WorldClips:
    """Read what `save_clips` wrote."""
    data = torch.load(path, weights_only=True, mmap=True)
    scenes = [parse_caption(caption) for caption in data["captions"]]
    return WorldClips(scenes, data["cameras"], data["first_times"], data["layers"])
