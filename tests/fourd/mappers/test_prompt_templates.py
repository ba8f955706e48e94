"""Templates of prompts: how they are filled, drawn and checked."""

from collections import Counter

import pytest
import torch

from custom.fourd.mappers.prompt_templates import (
    NEUTRAL_TEMPLATES,
    checked_templates,
    drawn_templates,
    fill_template,
)


def test_nouns_lose_their_article_and_captions_do_not():
    assert fill_template("the photo of a {noun}", "a red cube") == "the photo of a red cube"
    assert fill_template("a photo of {caption}", "a red cube") == "a photo of a red cube"
    assert fill_template("{noun}", "An orange ball") == "orange ball"
    assert fill_template("my {noun}", "two cubes") == "my two cubes"
    assert fill_template("{caption} made of wood", "a cube") == "a cube made of wood"
    assert fill_template("{noun}", "a") == "a" and fill_template("{noun}", "") == ""


def test_there_are_27_neutral_ones_with_a_noun_each():
    assert len(NEUTRAL_TEMPLATES) == len(set(NEUTRAL_TEMPLATES)) == 27
    assert all(template.count("{noun}") == 1 for template in NEUTRAL_TEMPLATES)
    kinds = Counter(
        next(kind for kind in ("photo", "rendition", "rendering") if kind in template)
        for template in NEUTRAL_TEMPLATES
    )
    assert kinds == {"photo": 24, "rendition": 2, "rendering": 1}


def test_configs_name_one_several_or_the_neutral_ones():
    assert checked_templates("imagenet", "key") == NEUTRAL_TEMPLATES
    assert checked_templates("a {noun}", "key") == ("a {noun}",)
    assert checked_templates(["a {noun}", "the {noun}"], "key") == ("a {noun}", "the {noun}")


@pytest.mark.parametrize("template", ["a {name}", "a {}", "a {noun", "{noun!x}"])
def test_unknown_fields_are_refused(template):
    with pytest.raises(ValueError, match="system.x holds .*expected {caption} or {noun} alone"):
        checked_templates(["fine", template], "system.x")


def test_none_at_all_is_refused():
    with pytest.raises(ValueError, match="system.x is empty; expected a template such as"):
        checked_templates([], "system.x")


def test_templates_are_drawn_evenly():
    found = drawn_templates(("a", "b", "c", "d"), torch.tensor([0.0, 0.24, 0.25, 0.76, 0.99999999]))
    assert found == ["a", "a", "b", "d", "d"]
