"""Captions to scenes and back: what a sentence of the world means, exactly.

Grammar (words in brackets may be missing, case and articles do not matter)::

    scene    = object [("and" | "next to" | "on top of") object] [", front view"]
    object   = ["a"] [size] [material] colour shape ["made of" material] [motion]
    material = "plain" | "striped" | "wooden" | "metal"

A caption fixes its scene completely: equal captions, equal pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from dataclasses import dataclass

from .vocabulary import (
    COLOURS,
    MATERIAL_SYNONYMS,
    MATERIALS,
    MOTIONS,
    RELATION_SYNONYMS,
    RELATIONS,
    SHAPE_SYNONYMS,
    SHAPES,
    SIZES,
    VIEW_SUFFIXES,
)

HELD_OUT_SALT = "threestudio-4d/appearance/66"
HELD_OUT_MOTION_SALT = "threestudio-4d/motion/62"


class CaptionError(ValueError):
    """A sentence that is not of the world; the message says which word and what was expected."""


@dataclass(frozen=True)
class WorldObject:
    """One object, as its words describe it; `motion` is None for an object at rest."""

    shape: str
    colour: str
    size: str = "medium"
    material: str = "plain"
    motion: str | None = None

    def __post_init__(self) -> None:
        for word, known, kind in (
            (self.shape, SHAPES, "shape"),
            (self.colour, COLOURS, "colour"),
            (self.size, SIZES, "size"),
            (self.material, MATERIALS, "material"),
            (self.motion, (None, *MOTIONS), "motion"),
        ):
            if word not in known:
                names = ", ".join(str(name) for name in known if name)
                raise CaptionError(f"'{word}' is no {kind} of the world; choose one of: {names}.")

    @property
    def appearance(self) -> tuple[str, str, str]:
        """(shape, colour, material): what the held-out split is decided by."""
        return self.shape, self.colour, self.material

    def phrase(self) -> str:
        """The object in words, without naming what is default."""
        words = ["a"]
        if self.size != "medium":
            words.append(self.size)
        if self.material != "plain":
            words.append(self.material)
        words += [self.colour, self.shape]
        if self.motion:
            words.append(self.motion)
        return " ".join(words)


@dataclass(frozen=True)
class WorldScene:
    """One object, or two in a relation."""

    objects: tuple[WorldObject, ...]
    relation: str = "next to"

    def __post_init__(self) -> None:
        if len(self.objects) not in (1, 2):
            raise CaptionError(f"a scene has one or two objects, not {len(self.objects)}.")
        if self.relation not in RELATIONS:
            raise CaptionError(
                f"'{self.relation}' is no relation of the world; choose: {', '.join(RELATIONS)}."
            )
        if len(self.objects) == 1:
            # A lone object has no relation; one value for all makes equal captions equal scenes.
            object.__setattr__(self, "relation", RELATIONS[0])

    @property
    def caption(self) -> str:
        """The canonical sentence; `parse_caption(scene.caption) == scene`."""
        return f" {self.relation} ".join(item.phrase() for item in self.objects)

    @property
    def is_moving(self) -> bool:
        return any(item.motion for item in self.objects)

    @property
    def is_held_out(self) -> bool:
        """True if any object's appearance is left out of all training."""
        return any(is_held_out_appearance(*item.appearance) for item in self.objects)

    @property
    def has_held_out_motion(self) -> bool:
        """True if any object's (shape, motion) pair is left out of all training."""
        return any(
            item.motion is not None and is_held_out_motion(item.shape, item.motion)
            for item in self.objects
        )


def is_in_tenth(salt: str, *words: str) -> bool:
    """Whether words belong to the tenth of all that a salted hash chooses."""
    digest = hashlib.sha256("|".join((salt, *words)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


def is_held_out_appearance(shape: str, colour: str, material: str) -> bool:
    """Whether this appearance is never trained on: a tenth of them, by a fixed hash."""
    return is_in_tenth(HELD_OUT_SALT, shape, colour, material)


def is_held_out_motion(shape: str, motion: str) -> bool:
    """Whether this (shape, motion) pair is never trained on: a tenth of them, by a fixed hash."""
    return is_in_tenth(HELD_OUT_MOTION_SALT, shape, motion)


def all_appearances() -> list[tuple[str, str, str]]:
    """Every (shape, colour, material) in a fixed order."""
    return list(itertools.product(SHAPES, COLOURS, MATERIALS))


def parse_caption(text: str) -> WorldScene:
    """The scene that a sentence describes.

    Raises:
        CaptionError: the sentence has a word or an order that the grammar lacks; it is named.
    """
    cleaned = re.sub(r"\s+", " ", text.strip().lower().rstrip(" .!"))
    for suffix in VIEW_SUFFIXES:
        cleaned = cleaned.removesuffix(f", {suffix}")
    relation, parts = _split_relation(cleaned)
    return WorldScene(tuple(_parse_object(part) for part in parts), relation)


def is_of_the_world(text: str) -> bool:
    """Whether truth exists for this sentence."""
    try:
        parse_caption(text)
    except CaptionError:
        return False
    return True


def _split_relation(text: str) -> tuple[str, list[str]]:
    words = sorted((*RELATIONS, *RELATION_SYNONYMS), key=len, reverse=True)
    found = re.split(r" (" + "|".join(words) + r") ", text)
    if len(found) == 1:
        return "next to", found
    if len(found) > 3:
        raise CaptionError(f"'{text}' relates more than two objects; the world holds one or two.")
    return RELATION_SYNONYMS.get(found[1], found[1]), [found[0], found[2]]


def _parse_object(text: str) -> WorldObject:
    words = text.split()
    fields: dict[str, str] = {}
    if words and words[0] in ("a", "an", "the"):
        words = words[1:]
    pairs = enumerate(itertools.pairwise(words))
    where = next((index for index, pair in pairs if pair == ("made", "of")), None)
    if where is not None:
        fields["material"] = _material(words[where + 2] if where + 2 < len(words) else "")
        words = words[:where] + words[where + 3 :]
    kinds = (("size", SIZES), ("colour", COLOURS), ("motion", MOTIONS))
    for word in words:
        shape = SHAPE_SYNONYMS.get(word, word)
        material = MATERIAL_SYNONYMS.get(word, word)
        kind = next((name for name, known in kinds if word in known), None)
        if kind is None and shape in SHAPES:
            kind, word = "shape", shape
        if kind is None and material in MATERIALS:
            kind, word = "material", material
        if kind is None:
            raise CaptionError(f"'{word}' in '{text}' is not a word of the world.")
        if kind in fields:
            raise CaptionError(f"'{text}' names its {kind} twice: '{fields[kind]}' and '{word}'.")
        fields[kind] = word
    for needed in ("shape", "colour"):
        if needed not in fields:
            raise CaptionError(f"'{text}' names no {needed}; expected e.g. 'a red cube'.")
    return WorldObject(**fields)


def _material(word: str) -> str:
    material = MATERIAL_SYNONYMS.get(word, word)
    if material not in MATERIALS:
        known = ", ".join((*MATERIALS, *MATERIAL_SYNONYMS))
        raise CaptionError(f"'made of {word}': the world's materials are {known}.")
    return material
