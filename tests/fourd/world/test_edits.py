"""Instructions: what they mean, what they refuse, and the truth of their renders."""

import itertools
import math

import pytest
import torch

from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.scripts.make_family import vocabulary
from custom.fourd.world.edits import (
    MOTION_WORDS,
    STYLE_WORDS,
    EditedScene,
    EditError,
    Instruction,
    is_edit_of_the_world,
    is_held_out_edit,
    parse_instruction,
)
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render
from custom.fourd.world.styles import STYLES
from custom.fourd.world.vocabulary import COLOURS, SHAPES

LONE, PAIR = "a red cube", "a red cube next to a small wooden blue sphere spinning"


def edited(text, caption=LONE):
    return parse_instruction(text).answers(parse_caption(caption))


@pytest.mark.parametrize(
    "text, caption, expected",
    [
        ("make it blue", LONE, "a blue cube"),
        ("Please turn the cube into a ball.", LONE, "a red sphere"),
        ("turn the box into a small metal green torus", LONE, "a small metal green torus"),
        ("change its color to pink", LONE, "a pink cube"),
        ("change the colour of the cube to pink", LONE, "a pink cube"),
        ("the cube should be striped", LONE, "a striped red cube"),
        ("make it out of wood", LONE, "a wooden red cube"),
        ("give the cube stripes", LONE, "a striped red cube"),
        ("make it bigger", LONE, "a large red cube"),
        ("make it look like a small ball", LONE, "a small red sphere"),
        ("remove the stripes", "a striped red cube next to a wooden green cone",
         "a red cube next to a wooden green cone"),
        ("replace the cube with a cone", PAIR,
         "a red cone next to a small wooden blue sphere spinning"),
        ("make the blue object yellow", PAIR,
         "a red cube next to a small wooden yellow sphere spinning"),
        ("swap the small wooden ball for a green cylinder", PAIR,
         "a red cube next to a small wooden green cylinder spinning"),
        ("paint both green", PAIR, "a green cube next to a small wooden green sphere spinning"),
        ("make the sphere larger", PAIR, "a red cube next to a wooden blue sphere spinning"),
    ],
)  # fmt: skip
def test_what_an_instruction_makes_of_a_scene(text, caption, expected):
    (answer,) = edited(text, caption)
    assert answer == EditedScene(parse_caption(expected))


@pytest.mark.parametrize(
    "text, style",
    [
        ("make it look like a Van Gogh painting", "van gogh"),
        ("turn it into a sepia photo", "sepia"),
        ("make it black and white", "monochrome"),
        ("turn the picture into a negative", "negative"),
        ("make it night", "night"),
        ("add snow", "winter"),
    ],
)
def test_styles(text, style):
    assert edited(text, PAIR) == (EditedScene(parse_caption(PAIR), style),)


def test_random_edits_have_every_answer_but_what_is_there():
    assert {a.scene.objects[0].colour for a in edited("give it a random color")} == set(COLOURS) - {
        "red"
    }
    textures = edited("give the ball a random texture", PAIR)
    assert [a.scene.objects[1].material for a in textures] == ["striped", "metal"]
    both = edited("make it a random color", PAIR)
    assert len(both) == len(COLOURS) - 2
    assert all(len({o.colour for o in a.scene.objects}) == 1 for a in both)
    palettes = edited("give it a random palette", PAIR)
    assert len(palettes) == 5 == len({a.style for a in palettes})
    assert {a.scene for a in palettes} == {parse_caption(PAIR)}


@pytest.mark.parametrize("text", ["make it bouncing", "let it spin", "turn it slowly"])
def test_motion_is_no_edit(text):
    word = text.split()[-1]
    with pytest.raises(EditError, match=f"'{text}' is not an edit: '{word}' is about motion"):
        parse_instruction(text)
    assert not is_edit_of_the_world(text)


@pytest.mark.parametrize(
    "text", ["a red cube", "make it", "make it gothic", "make it red blue", ""]
)
def test_what_is_no_instruction(text):
    with pytest.raises(EditError, match=f"'{text}' is no instruction of the world; expected for"):
        parse_instruction(text)


@pytest.mark.parametrize(
    "text, caption, message",
    [
        ("make the cone blue", LONE, "there is no 'cone' in 'a red cube'"),
        ("make the blue cube green", PAIR, "there is no 'blue cube' in"),
        ("make it bigger", "a large red cube", "'a large red cube' cannot be made bigger: the"),
        ("make it smaller", "a small red cube", "cannot be made smaller: the world's sizes are"),
    ],
)
def test_what_means_nothing_for_a_scene(text, caption, message):
    with pytest.raises(EditError, match=message):
        edited(text, caption)


def test_an_unknown_random_thing_is_refused():
    with pytest.raises(EditError, match="'random shape' is unknown; expected a random color, tex"):
        parse_instruction("give it a random shape")


def test_every_word_is_one_of_the_frozen_tokenizer():
    words = set(vocabulary())
    assert set(" ".join(STYLE_WORDS).split()) <= words
    assert {"bouncing", "spinning", "moving", "motion"} <= MOTION_WORDS & words


# The split


def test_about_a_tenth_of_the_edits_is_held_out_and_more_with_their_appearances():
    held_out, total = 0, 0
    for shape, old, new in itertools.product(SHAPES, COLOURS, COLOURS):
        before, after = (parse_caption(f"a {c} {shape}") for c in (old, new))
        if old == new or before.is_held_out or after.is_held_out:
            continue
        total += 1
        held_out += is_held_out_edit(before, EditedScene(after))
    assert 0.03 < held_out / total < 0.2
    outside = next(
        s for s in (parse_caption(f"a {c} {x}") for c in COLOURS for x in SHAPES) if s.is_held_out
    )
    assert is_held_out_edit(outside, EditedScene(outside))


def test_the_split_does_not_depend_on_the_sentence():
    """The frozen hash: these stay in or out for good."""
    table = {
        (old, new): is_held_out_edit(
            parse_caption(f"a {old} cylinder"), EditedScene(parse_caption(f"a {new} cylinder"))
        )
        for old, new in itertools.permutations(("red", "green", "blue", "cyan"), 2)
    }
    assert [pair for pair, out in table.items() if out] == FROZEN_SAMPLE


FROZEN_SAMPLE = [("cyan", "red")]


def test_about_a_tenth_of_the_styled_colours_is_held_out():
    scenes = [parse_caption(f"a {colour} sphere") for colour in COLOURS]
    scenes = [scene for scene in scenes if not scene.is_held_out]
    table = [is_held_out_edit(s, EditedScene(s, style)) for s in scenes for style in STYLES]
    assert 0.03 < sum(table) / len(table) < 0.2
    assert not any(is_held_out_edit(scene, EditedScene(scene)) for scene in scenes)


# Truth


def views():
    c2w = camera_from_orbit(
        torch.tensor([15.0] * 2), torch.tensor([0.0, 50.0]), torch.full((2,), 3.0)
    )
    return c2w, torch.full((2,), math.radians(40)), 12, 12, torch.tensor([0.0, 0.6])


def test_the_truth_of_a_shape_edit_is_the_other_scene_in_the_same_motion():
    (answer,) = edited("turn the cube into a cone", "a red cube bouncing")
    expected = render(parse_caption("a red cone bouncing"), *views())
    got = answer.render(*views())
    assert torch.equal(got.rgb, expected.rgb) and torch.equal(got.depth, expected.depth)


def test_a_style_changes_colour_alone_and_the_background_too():
    (answer,) = edited("turn the picture into a negative", "a red cube sliding")
    plain = render(parse_caption("a red cube sliding"), *views())
    got = answer.render(*views())
    torch.testing.assert_close(got.rgb, 1 - plain.rgb)
    assert torch.equal(got.depth, plain.depth) and torch.equal(got.alpha, plain.alpha)
    assert got.rgb[0, 0, 0].tolist() == [0, 0, 0]


def test_palettes_change_the_object_and_not_the_background():
    plain = render(parse_caption(LONE), *views())
    for answer in edited("give it a random palette"):
        moved = (answer.render(*views()).rgb - plain.rgb).abs().amax(-1)
        assert moved.amax() > 0.2 and (moved[plain.alpha[..., 0] == 0] == 0).all()


def test_instructions_without_a_sentence():
    scene = parse_caption(PAIR)
    assert Instruction("both").meant(scene) == [0, 1] == Instruction().meant(scene)
    assert Instruction("the small object").meant(scene) == [1]
