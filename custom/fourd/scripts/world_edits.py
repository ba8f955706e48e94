"""Training pairs of edits: the same view of a world before and after an instruction.

Geometry of both is rendered once, as layers of coverage and shading; colours, styles, palettes,
words and background are drawn anew each time a pair is used. A group holds frames of one scene from
several cameras and times, so that they can be edited alike. Held-out appearances, motions and edits
never occur.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world import vocabulary as world
from custom.fourd.world.edits import STYLE_WORDS, EditedScene, Instruction, is_held_out_edit
from custom.fourd.world.grammar import WorldScene, is_held_out_motion, parse_caption
from custom.fourd.world.render import render_layers

from .world_views import chance, colour_views, draw, draw_colour, draw_scene

NUM_VIEWS = 4
ELEVATION_DEG, DISTANCE, FOVY_DEG = (-5.0, 35.0), (2.7, 3.4), (37.0, 43.0)
ARC_DEG = 60.0
"""Cameras of a group stand on an arc of this width."""
MOTION_SHARE = 0.6
GEOMETRY_EDITS = (("shape", 0.50), ("material", 0.22), ("size", 0.13), ("none", 0.15))
"""What differs between the layers before and after, and the share of the groups."""
LOOK_EDITS = (("colour", 0.50), ("style", 0.26), ("random colour", 0.12), ("palette", 0.12))
"""What is edited where the layers do not differ."""
ANCHORED_LOOK_EDITS = (
    ("colour", 0.28),
    ("style", 0.22),
    ("random colour", 0.25),
    ("palette", 0.25),
)
"""The same where frames look at an anchor: only edits with several answers need to."""
LOOK_SHARE = 0.25
"""Of the groups whose layers differ: used for an edit of the look, with the layers before."""
COLOUR_TOO_SHARE, RANDOM_TEXTURE_SHARE, SYNONYM_SHARE = 0.15, 0.30, 0.25
ATTEMPTS = 100


@dataclass
class EditGroups:
    """Rendered groups: scenes without colour before and after, and 8-bit layers of both."""

    before: list[WorldScene]
    after: list[WorldScene]
    layers: UInt8[Tensor, "g 4 2 2 k 64 64"]
    """Per view: before and after; coverage and shading; of each object, times 255."""


@dataclass
class EditPair:
    """An edit of one group as it is used once: words, and images before and after."""

    instruction: str
    before: WorldScene
    after: EditedScene
    images: Float[Tensor, "v 3 h w"]
    edited: Float[Tensor, "v 3 h w"]


def draw_kind(generator: torch.Generator, shares: tuple[tuple[str, float], ...]) -> str:
    """One of the kinds, each with its share."""
    weights = torch.tensor([share for _, share in shares])
    return shares[int(torch.multinomial(weights, 1, generator=generator))][0]


def draw_group(generator: torch.Generator, num_objects: int) -> tuple[WorldScene, WorldScene]:
    """A scene, moving or at rest, and the same after an edit of geometry; colours come later."""
    scene = draw_scene(generator, num_objects)
    objects = []
    for item in scene.objects:
        motions = [m for m in world.MOTIONS if not is_held_out_motion(item.shape, m)]
        moves = chance(generator, MOTION_SHARE)
        objects.append(replace(item, motion=draw(generator, motions) if moves else None))
    kind = draw_kind(generator, GEOMETRY_EDITS)
    index = int(torch.randint(num_objects, (), generator=generator))
    before = replace(scene, objects=tuple(objects))
    known = {"shape": world.SHAPES, "material": world.MATERIALS, "size": tuple(world.SIZES)}
    if kind == "none":
        return before, before
    words = [word for word in known[kind] if word != getattr(objects[index], kind)]
    objects[index] = replace(objects[index], **{kind: draw(generator, words)})
    return before, replace(scene, objects=tuple(objects))


def render_edit_groups(
    count: int, num_objects: int, generator: torch.Generator, size_px: int = 64, report=None
) -> EditGroups:
    """Draw and render `count` groups."""
    groups = [draw_group(generator, num_objects) for _ in range(count)]
    layers = torch.empty(count, NUM_VIEWS, 2, 2, num_objects, size_px, size_px, dtype=torch.uint8)
    for index, scenes in enumerate(groups):
        poses, fovy, times = _cameras(generator)
        for which, scene in enumerate(scenes):
            if which and scenes[0] == scenes[1]:
                layers[index, :, 1] = layers[index, :, 0]
                continue
            parts = render_layers(scene, poses, fovy, size_px, size_px, times)
            layers[index, :, which] = (torch.stack(parts, dim=1) * 255).round().to(torch.uint8)
        if report and index % 500 == 499:
            report(f"rendered {index + 1} of {count} groups of {num_objects}")
    before, after = (list(part) for part in zip(*groups, strict=True))
    return EditGroups(before, after, layers)


def _cameras(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Poses on an arc about a random direction, fields of view in radians, scene times."""

    def between(low: float, high: float, count: int) -> Tensor:
        return low + torch.rand((count,), generator=generator) * (high - low)

    azimuth = between(0.0, 360.0, 1) + between(-ARC_DEG / 2, ARC_DEG / 2, NUM_VIEWS)
    elevation = between(*ELEVATION_DEG, 1).expand(NUM_VIEWS)
    distance = between(*DISTANCE, 1).expand(NUM_VIEWS)
    fovy = torch.deg2rad(between(*FOVY_DEG, 1)).expand(NUM_VIEWS)
    poses = camera_from_orbit(elevation, azimuth, distance)
    return poses, fovy, between(0.0, 1.0, NUM_VIEWS)


def draw_pair(
    groups: EditGroups,
    index: int,
    views: slice,
    background: Tensor,
    generator: torch.Generator,
    looks: tuple[tuple[str, float], ...] = LOOK_EDITS,
) -> EditPair:
    """An edit of a group's frames; drawn again until it is none of the held-out ones.

    Args:
        views: which frames of the group.
        background: colour in [0, 1] behind all of them.
        looks: kinds of edits that leave geometry as it is, and their shares.

    Raises:
        RuntimeError: no edit was found in `ATTEMPTS` draws.
    """
    for _ in range(ATTEMPTS):
        drawn = _draw_edit(groups.before[index], groups.after[index], generator, looks)
        if drawn is None:
            continue
        instruction, before, after, which = drawn
        unseen = is_held_out_edit(before, after) or after.scene.has_held_out_motion
        if unseen or after == EditedScene(before):
            continue
        layers = groups.layers[index, views]
        backgrounds = background.expand(len(layers), 3)
        images = colour_views(layers[:, 0], [before] * len(layers), backgrounds)
        edited = colour_views(layers[:, which], [after.scene] * len(layers), backgrounds)
        styled = after.styled((edited.permute(0, 2, 3, 1) + 1) / 2).permute(0, 3, 1, 2)
        words = say_edit(instruction, before, generator)
        return EditPair(words, before, after, images, styled * 2 - 1)
    raise RuntimeError(f"no edit of '{groups.before[index].caption}' that may be trained on.")


def _draw_edit(
    before: WorldScene,
    after: WorldScene,
    generator: torch.Generator,
    kinds: tuple[tuple[str, float], ...],
) -> tuple[Instruction, WorldScene, EditedScene, int] | None:
    """Instruction, scene, edited scene, and which layers show it; None where the draw fails."""
    objects = tuple(
        replace(item, colour=draw_colour(item.shape, item.material, generator))
        for item in before.objects
    )
    scene = replace(before, objects=objects)
    differs = before != after
    looks = not differs or chance(generator, LOOK_SHARE)
    if looks:
        instruction = _draw_look(scene, kinds, generator)
    else:
        instruction = _draw_geometry(scene, after, generator)
    if instruction is None:
        return None
    answers = instruction.answers(scene)
    if instruction.random == "texture":
        # Only one of the answers was rendered.
        index = _changed_index(before, after)
        word = after.objects[index].material
        answers = [a for a in answers if a.scene.objects[index].material == word]
    return instruction, scene, draw(generator, answers), 0 if looks else 1


def _draw_look(
    scene: WorldScene, kinds: tuple[tuple[str, float], ...], generator: torch.Generator
) -> Instruction | None:
    kind = draw_kind(generator, kinds)
    if kind == "style":
        return Instruction(style=draw(generator, sorted(set(STYLE_WORDS.values()))))
    if kind == "palette":
        return Instruction(random="palette")
    target = _draw_target(scene, None, generator)
    if kind == "random colour":
        return Instruction(target, random="colour")
    return Instruction(target, colour=draw(generator, tuple(world.COLOURS)))


def _draw_geometry(
    scene: WorldScene, after: WorldScene, generator: torch.Generator
) -> Instruction | None:
    index = _changed_index(scene, after)
    old, new = scene.objects[index], after.objects[index]
    target = _draw_target(scene, index, generator)
    if Instruction(target).meant(scene) != [index]:
        return None
    if old.material != new.material:
        if new.material != "plain" and chance(generator, RANDOM_TEXTURE_SHARE):
            return Instruction(target, random="texture")
        return Instruction(target, material=new.material)
    colour = None
    if chance(generator, COLOUR_TOO_SHARE):
        colour = draw(generator, tuple(world.COLOURS))
    if old.shape != new.shape:
        return Instruction(target, shape=new.shape, colour=colour)
    sizes = list(world.SIZES)
    step = sizes.index(new.size) - sizes.index(old.size)
    relative = {1: "bigger", -1: "smaller"}.get(step)
    return Instruction(target, size=relative if relative and chance(generator, 0.5) else new.size)


def _changed_index(before: WorldScene, after: WorldScene) -> int:
    kinds = ("shape", "material", "size")
    return next(
        index
        for index, (old, new) in enumerate(zip(before.objects, after.objects, strict=True))
        if any(getattr(old, kind) != getattr(new, kind) for kind in kinds)
    )


def _draw_target(scene: WorldScene, index: int | None, generator: torch.Generator) -> str:
    """Words for all objects (index None, sometimes) or for one."""
    lone = len(scene.objects) == 1
    if index is None and chance(generator, 0.5):
        return "it" if lone or chance(generator, 0.5) else "both"
    if index is None:
        index = int(torch.randint(len(scene.objects), (), generator=generator))
    if lone and chance(generator, 0.6):
        return "it"
    item = scene.objects[index]
    forms = [f"the {item.shape}", f"the {item.colour} {item.shape}", f"the {item.colour} object"]
    return draw(generator, forms)


# Words


STYLE_FORMS = {
    "van gogh": (
        "make it look like a {} painting", "turn it into a {} painting", "make it a {} painting",
    ),
    "night": ("make it {}", "make it look like {}", "turn the scene into {}"),
    "sunset": ("make it a {}", "make it look like a {}", "turn the scene into a {}"),
    "winter": ("make it {}", "make it look like {}", "turn the scene into {}"),
    "snow": ("add {}", "make it look like {}"),
    "": ("make it {}", "make it look {}", "turn it into a {} picture", "turn it into a {} photo",
         "make the scene {}"),
}  # fmt: skip
COLOUR_FORMS = (
    "make {} {}", "paint {} {}", "turn {} {}", "change the color of {} to {}", "{} should be {}",
)  # fmt: skip
SHAPE_FORMS = (
    "turn {} into a {}", "make {} a {}", "change {} to a {}", "replace {} with a {}",
    "swap {} for a {}",
)  # fmt: skip
RANDOM_FORMS = {
    "colour": ("give {} a random color", "make {} a random color", "paint {} in a random color"),
    "texture": ("give {} a random texture", "give {} a random pattern"),
    "palette": ("give it a random palette", "turn it into a random palette"),
}
MATERIAL_FORMS = {
    "plain": ("make {} plain", "turn {} plain"),
    "striped": ("make {} striped", "give {} stripes", "turn {} striped"),
    "wooden": ("make {} wooden", "make {} out of wood", "turn {} into wood"),
    "metal": ("make {} metal", "make {} out of metal", "turn {} into metal"),
}


def say_edit(instruction: Instruction, scene: WorldScene, generator: torch.Generator) -> str:
    """A sentence for an instruction, in one of the ways that the grammar allows."""
    target, result = instruction.target, instruction.shape or ""
    if chance(generator, SYNONYM_SHARE):
        for synonym, shape in world.SHAPE_SYNONYMS.items():
            target = target.replace(f" {shape}", f" {synonym}")
            result = result.replace(shape, synonym)
    if instruction.style is not None:
        words = [word for word, style in STYLE_WORDS.items() if style == instruction.style]
        word = draw(generator, words)
        text = draw(generator, STYLE_FORMS.get(word, STYLE_FORMS[""])).format(word)
        return text.replace(" a inverted", " an inverted")
    if instruction.random is not None:
        return draw(generator, RANDOM_FORMS[instruction.random]).format(target)
    if instruction.shape is not None:
        described = " ".join(filter(None, (instruction.colour, result)))
        text = draw(generator, SHAPE_FORMS).format(target, described)
        return text.replace(" a orange", " an orange")
    if instruction.material is not None:
        return draw(generator, MATERIAL_FORMS[instruction.material]).format(target)
    if instruction.size is not None:
        return f"make {target} {instruction.size}"
    return draw(generator, COLOUR_FORMS).format(target, instruction.colour)


# Files


def save_edit_groups(groups: EditGroups, path: Path) -> None:
    """Write groups as plain tensors and captions."""
    captions = [[scene.caption for scene in part] for part in (groups.before, groups.after)]
    torch.save({"captions": captions, "layers": groups.layers}, path)


def load_edit_groups(path: Path) -> EditGroups:
    """Read what `save_edit_groups` wrote."""
    data = torch.load(path, weights_only=True, mmap=True)
    before, after = ([parse_caption(text) for text in part] for part in data["captions"])
    return EditGroups(before, after, data["layers"])
