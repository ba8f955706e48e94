"""Training data from the world: groups of views whose geometry is rendered once and reused.

Shapes, sizes, materials, layout and cameras of a group are drawn and rendered once, as coverage
and shading layers; colours, words and background are drawn anew each time a group is used.
Appearances of the held-out split never occur.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world import vocabulary as world
from custom.fourd.world.grammar import (
    WorldObject,
    WorldScene,
    is_held_out_appearance,
    is_held_out_motion,
)
from custom.fourd.world.render import render_layers

FOVY_RAD = math.radians(40)
ELEVATION_DEG, DISTANCE = (0.0, 32.0), (2.8, 3.2)
NUM_VIEWS = 4
GREY_BACKGROUND_SHARE = 0.2
MOTION_WORD_SHARE = 0.15
SYNONYM_SHARE = 0.15
PLAIN_SHARE = 0.7


@dataclass
class ViewGroups:
    """Rendered groups: scenes without colour, cameras, and 8-bit layers."""

    scenes: list[WorldScene]
    cameras: Float[Tensor, "g 3"]
    """First azimuth and elevation in degrees, distance."""
    layers: UInt8[Tensor, "g 4 2 k 64 64"]
    """Per view: coverage, then shading, of each object, times 255."""


def draw(generator: torch.Generator, choices):
    """One of `choices`, uniformly."""
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def chance(generator: torch.Generator, share: float) -> bool:
    """True with probability `share`."""
    return bool(torch.rand((), generator=generator) < share)


def draw_colour(shape: str, material: str, generator: torch.Generator) -> str:
    """A colour that is not held out for this shape and material."""
    allowed = [c for c in world.COLOURS if not is_held_out_appearance(shape, c, material)]
    return draw(generator, allowed)


def draw_cameras(count: int, generator: torch.Generator) -> Float[Tensor, "count 3"]:
    """Azimuth and elevation in degrees and distance, each uniform in its range."""
    low = torch.tensor([0.0, ELEVATION_DEG[0], DISTANCE[0]])
    high = torch.tensor([360.0, ELEVATION_DEG[1], DISTANCE[1]])
    return low + torch.rand((count, 3), generator=generator) * (high - low)


def draw_scene(generator: torch.Generator, num_objects: int) -> WorldScene:
    """A scene of the training split; its colours are placeholders until `recolour`."""
    objects = []
    for _ in range(num_objects):
        plain = chance(generator, PLAIN_SHARE)
        material = "plain" if plain else draw(generator, world.MATERIALS[1:])
        shape = draw(generator, world.SHAPES)
        colour = draw_colour(shape, material, generator)
        size = draw(generator, tuple(world.SIZES))
        objects.append(WorldObject(shape, colour, size, material))
    return WorldScene(tuple(objects), draw(generator, world.RELATIONS))


def recolour(scene: WorldScene, generator: torch.Generator) -> WorldScene:
    """The same geometry in other colours, sometimes with a motion word (at rest it looks alike)."""
    objects = []
    for item in scene.objects:
        colour = draw_colour(item.shape, item.material, generator)
        motion = None
        if chance(generator, MOTION_WORD_SHARE):
            motion = draw(
                generator, [m for m in world.MOTIONS if not is_held_out_motion(item.shape, m)]
            )
        objects.append(replace(item, colour=colour, motion=motion))
    return replace(scene, objects=tuple(objects))


def say(scene: WorldScene, generator: torch.Generator) -> str:
    """A caption of the scene, in one of the ways that the grammar allows."""
    text = scene.caption
    if scene.relation == "next to" and chance(generator, 0.5):
        text = text.replace(" next to ", " and ")
    for item in scene.objects:
        if item.size == "medium" and chance(generator, 0.2):
            text = text.replace(item.phrase(), item.phrase().replace("a ", "a medium ", 1), 1)
    if chance(generator, SYNONYM_SHARE):
        for synonym, word in {**world.SHAPE_SYNONYMS, "on": "on top of"}.items():
            if chance(generator, 0.5):
                text = text.replace(f" {word}", f" {synonym}")
    if chance(generator, SYNONYM_SHARE):
        for material, noun in (("wooden", "wood"), ("metal", "metal")):
            for item in scene.objects:
                if item.material == material:
                    plain = replace(item, material="plain", motion=None).phrase()
                    stated = f"{plain} made of {noun}"
                    text = text.replace(replace(item, motion=None).phrase(), stated)
    return text


def view_suffix(azimuth_deg: float, front_deg: float = 45.0, back_deg: float = 45.0) -> str:
    """The view words of threestudio's prompt processor for this azimuth."""
    azimuth = (azimuth_deg + 180) % 360 - 180
    if abs(azimuth) < front_deg:
        return "front view"
    return "back view" if abs(azimuth) > 180 - back_deg else "side view"


def group_cameras(
    cameras: Float[Tensor, "g 3"],
) -> tuple[Float[Tensor, "g 4 4 4"], Float[Tensor, "g 4"]]:
    """Poses and azimuths in degrees of the groups' views, 90 degrees apart."""
    azimuths = cameras[:, :1] + torch.arange(NUM_VIEWS) * (360.0 / NUM_VIEWS)
    elevations = cameras[:, 1:2].expand_as(azimuths)
    distances = cameras[:, 2:].expand_as(azimuths)
    return camera_from_orbit(elevations, azimuths, distances), azimuths


def render_groups(
    count: int, num_objects: int, generator: torch.Generator, size_px: int = 64, report=None
) -> ViewGroups:
    """Draw and render `count` groups."""
    cameras = draw_cameras(count, generator)
    scenes = [draw_scene(generator, num_objects) for _ in range(count)]
    layers = torch.empty(count, NUM_VIEWS, 2, num_objects, size_px, size_px, dtype=torch.uint8)
    poses, _ = group_cameras(cameras)
    fovy, still = torch.full((NUM_VIEWS,), FOVY_RAD), torch.zeros(NUM_VIEWS)
    for index, scene in enumerate(scenes):
        both = torch.stack(
            render_layers(scene, poses[index], fovy, size_px, size_px, still), dim=1
        )
        layers[index] = (both * 255).round().to(torch.uint8)
        if report and index % 500 == 499:
            report(f"rendered {index + 1} of {count} groups of {num_objects}")
    return ViewGroups(scenes, cameras, layers)


def colour_views(
    layers: UInt8[Tensor, "b 2 k h w"], scenes: list[WorldScene], backgrounds: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 h w"]:
    """Images in [-1, 1] from layers, one scene and background each."""
    albedo = torch.tensor([[world.COLOURS[o.colour] for o in s.objects] for s in scenes])
    cover, shade = (layers.float() / 255).unbind(dim=1)
    rgb = torch.einsum("bkhw,bkc->bchw", shade, albedo)
    rgb = rgb + (1 - cover.sum(dim=1, keepdim=True)) * backgrounds[:, :, None, None]
    return rgb * 2 - 1


def draw_backgrounds(
    count: int, generator: torch.Generator, grey_share: float = GREY_BACKGROUND_SHARE
) -> Float[Tensor, "count 3"]:
    """White, or for a share of the groups one random grey."""
    grey = torch.rand((count, 1), generator=generator)
    chosen = torch.rand((count, 1), generator=generator) < grey_share
    return torch.where(chosen, grey, 1.0).expand(count, 3)


def save_groups(groups: ViewGroups, path: Path) -> None:
    """Write groups as plain tensors and captions."""
    captions = [scene.caption for scene in groups.scenes]
    torch.save({"captions": captions, "cameras": groups.cameras, "layers": groups.layers}, path)


def load_groups(path: Path) -> ViewGroups:
    """Read what `save_groups` wrote."""
    from custom.fourd.world.grammar import parse_caption

    data = torch.load(path, weights_only=True, mmap=True)
    scenes = [parse_caption(caption) for caption in data["captions"]]
    return ViewGroups(scenes, data["cameras"], data["layers"])
