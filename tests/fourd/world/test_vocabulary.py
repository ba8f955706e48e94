"""The world is as large as promised, and its words do not collide."""

import itertools

from custom.fourd.world import vocabulary as world
from tests.fixtures import world_reference


def test_the_world_has_what_the_project_promises():
    assert len(world.SHAPES) >= 6 and len(world.COLOURS) >= 8
    assert len(world.SIZES) >= 3 and len(world.MOTIONS) >= 6
    assert len(world.MATERIALS) >= 2 and len(world.RELATIONS) >= 2


def test_no_word_has_two_meanings():
    kinds = [
        {*world.SHAPES, *world.SHAPE_SYNONYMS},
        set(world.COLOURS),
        set(world.SIZES),
        {*world.MATERIALS, *world.MATERIAL_SYNONYMS},
        set(world.MOTIONS),
    ]
    assert all(not first & second for first, second in itertools.combinations(kinds, 2))


def test_every_synonym_stands_for_a_word_of_the_world():
    assert set(world.SHAPE_SYNONYMS.values()) <= set(world.SHAPES)
    assert set(world.MATERIAL_SYNONYMS.values()) <= set(world.MATERIALS)
    assert set(world.RELATION_SYNONYMS.values()) <= set(world.RELATIONS)


def test_the_numbers_are_frozen():
    """Training data and every asset made from it depend on them."""
    assert world.COLOURS == world_reference.COLOURS
    assert world.SIZES == world_reference.SIZES
    assert (world.PAIR_SCALE, world.PAIR_OFFSET, world.PAIR_MOTION) == (0.62, 0.46, 0.6)


def test_colours_can_be_told_apart():
    for first, second in itertools.combinations(world.COLOURS.values(), 2):
        assert max(abs(a - b) for a, b in zip(first, second)) > 0.2
    assert all(0 <= channel <= 1 for colour in world.COLOURS.values() for channel in colour)
