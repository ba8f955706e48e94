"""Text that must stay as typed."""

import random

import pytest
from omegaconf import OmegaConf
from threestudio.utils.config_text import (
    escape_interpolations,
    escaped_config,
    is_text_key,
    unquote,
)


def test_escaped_text_reads_back_literally_whatever_it_holds():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("\\${}ab: '\"#[", k=draw.randint(0, 9)))
        config = escaped_config({"a": text, "b": [{"c": text}]})
        assert config.a == text and config.b[0].c == text
        assert OmegaConf.create(OmegaConf.to_yaml(config)).a == text


def test_text_without_dollar_brace_is_not_changed():
    assert escape_interpolations("a $5 {cube} \\ b") == "a $5 {cube} \\ b"


def test_text_keys_count_at_any_depth():
    assert is_text_key("prompt")
    assert is_text_key("system.prompt_processor.prompt_side")
    assert is_text_key("system.editing.instruction")
    assert not is_text_key("system.prompt_processor_type")
    assert not is_text_key("system.prompt.weight")


@pytest.mark.parametrize(
    "typed, text",
    [
        ("'a cube'", "a cube"),
        ('"a cube"', "a cube"),
        ("a cube", "a cube"),
        ("'a' and 'b", "'a' and 'b"),
        ("\"'a'\"", "'a'"),  # one pair only
        ("'", "'"),
        ("", ""),
    ],
)
def test_one_pair_of_outer_quotes_is_removed(typed, text):
    assert unquote(typed) == text
