"""Instructions to edited worlds: what a sentence makes of a scene, exactly.

Grammar (a target is "it", "both", "the object", or "the" with words that name objects, "the red
cube"; a result is one or more of the world's words, "blue", "a small wooden ball")::

    make | turn | paint | let TARGET [be | look | into] RESULT, turn | change TARGET into RESULT
    replace TARGET with RESULT, swap TARGET for RESULT, TARGET should be RESULT
    change the color of TARGET to COLOUR, make TARGET bigger | smaller, give TARGET stripes
    give TARGET a random color | texture, give it a random palette      (several valid answers)
    make it look like a STYLE painting, turn it into a STYLE photo, make it STYLE

An instruction changes how things look, never how they move. Where it allows several answers, each
of them is true.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from .grammar import WorldObject, WorldScene, is_in_tenth
from .render import WorldImages, render
from .styles import PALETTES, apply_style
from .vocabulary import (
    COLOURS,
    MATERIAL_SYNONYMS,
    MATERIALS,
    MOTIONS,
    SHAPE_SYNONYMS,
    SHAPES,
    SIZES,
)

HELD_OUT_EDIT_SALT = "threestudio-4d/edit/6"
RANDOM = ("colour", "texture", "palette")
STYLE_WORDS = {
    "van gogh": "van gogh",
    "sepia": "sepia",
    "monochrome": "monochrome",
    "black and white": "monochrome",
    "grey": "monochrome",
    "negative": "negative",
    "inverted": "negative",
    "neon": "neon",
    "night": "night",
    "sunset": "sunset",
    "winter": "winter",
    "snow": "winter",
    "pastel": "pastel",
    "warm": "warm",
    "cold": "cold",
}
MOTION_WORDS = frozenset(
    (*MOTIONS, *"swinging rolling floating pulsing falling rising wobbling rotating turning moving "
     "jumping shaking drifting still resting slowly quickly fast slow motion bounce grow shrink "
     "spin orbit slide move jump roll float rotate fall rise faster slower stop".split())
)  # fmt: skip
_FILLERS = frozenset(
    "make turn change paint give add let put have it its this that the a an scene image picture "
    "photo photograph video painting drawing style stylized look looks like as into in to be "
    "become should would colors more of and with frame".split()
)
_NOUN = "|".join((*SHAPES, *SHAPE_SYNONYMS, "objects", "object"))
_TARGET = rf"(?P<target>it|both|both objects|this|that|the (?:[a-z]+ ){{0,3}}?(?:{_NOUN}))"
_PATTERNS = tuple(
    re.compile(pattern.replace("TARGET", _TARGET) + "$")
    for pattern in (
        r"change (?:the colou?r of TARGET|its colou?r) to (?P<result>.+)",
        r"(?:make|turn|paint|let) TARGET (?:be |become |look like |look |into )?(?P<result>.+)",
        r"(?:turn|change|swap|replace) TARGET (?:into|to|for|with|by) (?P<result>.+)",
        r"TARGET should (?:be|become|look) (?P<result>.+)",
        r"give TARGET (?P<result>stripes)",
        r"remove (?P<plain>(?:the |its )?stripes)(?: from TARGET)?",
    )
)
_ALL_OBJECTS = ("the", "it", "both", "this", "that", "object", "objects")
_RANDOM_PATTERN = re.compile(
    r"(?:give|paint|make|turn|change) (?:the colou?r of )?" + _TARGET + r" (?:in |into |to )?a? ?"
    r"random (?P<kind>[a-z]+)$"
)


class EditError(ValueError):
    """An instruction that is none of the world, or that means nothing for a scene."""


@dataclass(frozen=True)
class EditedScene:
    """A scene after an edit: the truth that an edit is measured against."""

    scene: WorldScene
    style: str | None = None

    def render(
        self,
        c2w: Float[Tensor, "b 4 4"],
        fovy: Float[Tensor, "b"],
        height: int,
        width: int,
        frame_times: Float[Tensor, "b"] | None = None,
        background: Float[Tensor, "3"] | Float[Tensor, "b 3"] | None = None,
        samples_per_axis: int = 2,
    ) -> WorldImages:
        """The true images; see `render.render`. The background is styled as well."""
        images = render(
            self.scene, c2w, fovy, height, width, frame_times, background, samples_per_axis
        )
        return images if self.style is None else replace(images, rgb=self.styled(images.rgb))

    def styled(self, rgb: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
        """Colours in [0, 1] of the edited scene in its style."""
        return rgb if self.style is None else apply_style(self.style, rgb)


@dataclass(frozen=True)
class Instruction:
    """What a sentence asks for; fields that are None stay as they are."""

    target: str = "it"
    """Words that name the objects meant, or a word for all of them."""
    shape: str | None = None
    colour: str | None = None
    size: str | None = None
    """A size of the world, or "bigger", "smaller"."""
    material: str | None = None
    style: str | None = None
    random: str | None = None
    """One of `RANDOM`: several answers are valid."""

    def answers(self, scene: WorldScene) -> tuple[EditedScene, ...]:
        """Every valid edited scene, in a fixed order; exactly one unless the edit is random.

        Raises:
            EditError: the scene has no such object, or it cannot grow or shrink any further.
        """
        if self.style is not None:
            return (EditedScene(scene, self.style),)
        if self.random == "palette":
            return tuple(EditedScene(scene, f"palette {n + 1}") for n in range(len(PALETTES)))
        meant = self.meant(scene)
        if self.random is None:
            return (self._changed(scene, meant, {}),)
        kind = "colour" if self.random == "colour" else "material"
        words = tuple(COLOURS) if kind == "colour" else MATERIALS[1:]
        now = {getattr(scene.objects[index], kind) for index in meant}
        return tuple(self._changed(scene, meant, {kind: w}) for w in words if w not in now)

    def meant(self, scene: WorldScene) -> list[int]:
        """Indices of the objects that the target names.

        Raises:
            EditError: there is none.
        """
        words = [word for word in self.target.split() if word not in _ALL_OBJECTS]
        wanted = {MATERIAL_SYNONYMS.get(w, SHAPE_SYNONYMS.get(w, w)) for w in words}
        meant = [i for i, item in enumerate(scene.objects) if wanted <= _words_of(item)]
        if not meant:
            raise EditError(f"there is no '{' '.join(words)}' in '{scene.caption}'.")
        return meant

    def _changed(self, scene: WorldScene, meant: list[int], also: dict[str, str]) -> EditedScene:
        objects = list(scene.objects)
        for index in meant:
            item = objects[index]
            fields = {"shape": self.shape, "colour": self.colour, "material": self.material}
            fields = {key: word for key, word in {**fields, **also}.items() if word is not None}
            if self.size is not None:
                fields["size"] = _size_after(item, self.size)
            objects[index] = replace(item, **fields)
        return EditedScene(replace(scene, objects=tuple(objects)))


def parse_instruction(text: str) -> Instruction:
    """What a sentence asks for.

    Raises:
        EditError: it asks for motion, which is no edit of how things look; or it is no instruction
            of the world.
    """
    cleaned = re.sub(r"\s+", " ", text.strip().lower().rstrip(" .!")).removeprefix("please ")
    moving = next((word for word in re.findall(r"[a-z]+", cleaned) if word in MOTION_WORDS), None)
    if moving is not None:
        raise EditError(
            f"'{text}' is not an edit: '{moving}' is about motion, and an instruction changes how "
            "things look, never how they move. To get another motion, write it into the prompt of "
            "a new scene."
        )
    found = _parse_random(cleaned) or _parse_style(cleaned)
    if found is not None:
        return found
    for pattern in _PATTERNS:
        match = pattern.match(cleaned)
        fields = _parse_result(match.groupdict()) if match else None
        if fields:
            # Without further words, stripes are removed from what has some.
            default = "the striped object" if match.groupdict().get("plain") else "it"
            return Instruction(match.groupdict().get("target") or default, **fields)
    raise EditError(
        f"'{text}' is no instruction of the world; expected for example 'make it blue', 'turn the "
        "cube into a ball', 'make it look like a van gogh painting' or 'give it a random color'."
    )


def is_edit_of_the_world(text: str) -> bool:
    """Whether truth exists for this instruction."""
    try:
        parse_instruction(text)
    except EditError:
        return False
    return True


def is_held_out_edit(before: WorldScene, after: EditedScene) -> bool:
    """Whether this edit is never trained on.

    So are the edits from or to a held-out appearance, and by a further hash a tenth of the changes:
    (kind, word before, word after) of an object, or (style, colour of an object).
    """
    if before.is_held_out or after.scene.is_held_out:
        return True
    changes = []
    for old, new in zip(before.objects, after.scene.objects, strict=True):
        for kind in ("shape", "colour", "size", "material"):
            words = getattr(old, kind), getattr(new, kind)
            changes += [(kind, *words)] if words[0] != words[1] else []
        if after.style is not None:
            changes.append(("style", after.style, old.colour))
    return any(is_in_tenth(HELD_OUT_EDIT_SALT, *change) for change in changes)


def _words_of(item: WorldObject) -> set[str]:
    return {item.shape, item.colour, item.size, item.material}


def _size_after(item: WorldObject, size: str) -> str:
    if size in SIZES:
        return size
    names = list(SIZES)
    index = names.index(item.size) + (1 if size == "bigger" else -1)
    if not 0 <= index < len(names):
        raise EditError(
            f"'{item.phrase()}' cannot be made {size}: the world's sizes are {', '.join(names)}."
        )
    return names[index]


def _parse_random(text: str) -> Instruction | None:
    match = _RANDOM_PATTERN.match(text)
    if match is None:
        return None
    kinds = {"color": "colour", "pattern": "texture", "material": "texture"}
    kind = kinds.get(match["kind"], match["kind"])
    if kind not in RANDOM:
        raise EditError(
            f"'random {match['kind']}' is unknown; expected a random color, texture or palette."
        )
    return Instruction("it" if kind == "palette" else match["target"], random=kind)


def _parse_style(text: str) -> Instruction | None:
    """A style where beside its name there are only words that say nothing else."""
    for words, style in STYLE_WORDS.items():
        rest, found = re.subn(rf"\b{words}\b", " ", text)
        if found == 1 and set(rest.split()) <= _FILLERS:
            return Instruction(style=style)
    return None


def _parse_result(groups: dict[str, str | None]) -> dict[str, str]:
    """Fields of a result, empty where it is none."""
    if groups.get("plain"):
        return {"material": "plain"}
    fields: dict[str, str] = {}
    text = re.sub(r"\b(?:made |out )of\b", "", groups["result"])
    for word in text.split():
        if word in ("a", "an", "and", "object", "color", "colour"):
            continue
        known = _field_of(word)
        if known is None or known[0] in fields:
            return {}
        fields[known[0]] = known[1]
    return fields


def _field_of(word: str) -> tuple[str, str] | None:
    word = {"larger": "bigger", "stripes": "striped"}.get(word, word)
    if word in SIZES or word in ("bigger", "smaller"):
        return "size", word
    for kind, known, synonyms in (
        ("shape", SHAPES, SHAPE_SYNONYMS),
        ("material", MATERIALS, MATERIAL_SYNONYMS),
        ("colour", COLOURS, {}),
    ):
        if synonyms.get(word, word) in known:
            return kind, synonyms.get(word, word)
    return None
