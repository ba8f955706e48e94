"""Two controls together: what each mode attends to, and the guidance formulas."""

import pytest
import torch

from custom.fourd.mappers.composition import (
    COMPOSE_MODES,
    Composition,
    guidance_weights,
    without_control,
)
from custom.fourd.mappers.mapper import MapperOutput
from custom.fourd.mappers.text_injection import TextInjection
from custom.fourd.scripts.make_family import make_tokenizer
from tests.fixtures.text_encoders import WIDTH, tiny_text_encoder

LAYERS, BATCH = 3, 2
TEXTS = ["a photo of a red cube", "a ball"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return tiny_text_encoder(tokenizer)


def word(seed):
    g = torch.Generator().manual_seed(seed)
    base, bypass = torch.randn(2, LAYERS, BATCH, WIDTH, generator=g)
    return MapperOutput(base, bypass)


def composed(encoder, tokenizer, **keys):
    composition = Composition(**keys)
    injection = TextInjection(encoder, tokenizer, composition.super_categories)
    prompts = injection.tokenize([composition.prompt(text) for text in TEXTS])
    return composition, injection, prompts


def two_words(first=1):
    return {"<time>": word(first), "<view>": word(first + 1)}


def test_placeholders_stand_in_one_order(encoder, tokenizer):
    for mode in COMPOSE_MODES:
        composition, _, prompts = composed(encoder, tokenizer, mode=mode)
        expected = {"<control>": 1} if mode == "joint_token" else {"<view>": 1, "<time>": 2}
        found = {name: set(where.tolist()) for name, where in prompts.positions.items()}
        assert found == {name: {position} for name, position in expected.items()}
    assert Composition().prompt("a ball") == "<view> <time>. a ball"


def test_tokens_is_one_prompt_with_both(encoder, tokenizer):
    composition, injection, prompts = composed(encoder, tokenizer)
    words = two_words()
    branches = composition.branches(injection, prompts, words, two_words(5))
    assert list(branches) == ["control"]
    expected = injection.contexts(prompts, words)
    assert torch.equal(branches["control"].keys, expected.keys)
    assert torch.equal(branches["control"].values, expected.values)


def test_joint_token_is_one_word(encoder, tokenizer):
    composition, injection, prompts = composed(encoder, tokenizer, mode="joint_token")
    words = {"<control>": word(3)}
    contexts = composition.branches(injection, prompts, words, {})["control"]
    assert torch.equal(contexts.keys, injection.contexts(prompts, words).keys)


@pytest.mark.parametrize("mode", ["attention", "guidance"])
def test_each_branch_has_the_other_control_at_rest(encoder, tokenizer, mode):
    composition, injection, prompts = composed(
        encoder, tokenizer, mode=mode, time_weight=0.3, view_weight=0.7
    )
    words, neutral = two_words(), two_words(5)
    branches = composition.branches(injection, prompts, words, neutral)
    of_time = injection.contexts(prompts, {"<time>": words["<time>"], "<view>": neutral["<view>"]})
    of_view = injection.contexts(prompts, {"<time>": neutral["<time>"], "<view>": words["<view>"]})
    if mode == "guidance":
        found = [branches["time"], branches["view"]]
        assert [branch.weight for branch in found] == [1.0, 1.0]
    else:
        found = branches["control"]
        assert [branch.weight for branch in found] == [0.3, 0.7]
    for branch, expected in zip(found, (of_time, of_view), strict=True):
        assert torch.equal(branch.keys, expected.keys)
        assert torch.equal(branch.values, expected.values)


def test_no_control_is_the_super_categories(encoder, tokenizer):
    _, injection, prompts = composed(encoder, tokenizer)
    contexts = without_control(injection, prompts, LAYERS)
    assert contexts.keys.shape == (LAYERS, BATCH, 77, WIDTH)
    plain = tokenizer([f"view time. {text}" for text in TEXTS], padding="max_length")
    expected = encoder(torch.tensor(plain.input_ids)).last_hidden_state
    torch.testing.assert_close(contexts.keys[2], expected)
    torch.testing.assert_close(contexts.values[0], expected)


def guided(values, controls, **keys):
    return sum(weight * values[name] for name, weight in guidance_weights(controls, **keys).items())


def test_guidance_by_hand():
    values = {"nothing": 1.0, "image": 3.0, "control": 4.0, "time": 5.0, "view": 2.5}
    one = {"control": 1.0}
    assert guided(values, one, image_scale=3.0, control_scale=4.5) == 1 + 3 * 2 + 4.5 * 1
    assert guided(values, one, image_scale=1.0, control_scale=1.0) == 4.0
    both = {"time": 2.0, "view": 4.0}
    assert guided(values, both, image_scale=1.0, control_scale=1.0) == 3 + 2 * 2 - 4 * 0.5
    assert guided(values, {}, image_scale=3.0) == 1 + 3 * 2
    assert guided(values, one, has_image=False, control_scale=2.0) == 1 + 2 * 3
    assert guidance_weights({}, has_image=False) == {"nothing": 1.0}


def test_a_scale_of_one_needs_one_prediction():
    weights = guidance_weights({"control": 1.0}, image_scale=1.0, control_scale=1.0)
    assert weights == {"nothing": 0.0, "image": 0.0, "control": 1.0}


def test_weights_left_out_are_those_of_the_mode():
    assert Composition("attention").weight("time") == 0.5
    assert Composition("guidance").weight("view") == 1.0
    assert Composition("guidance", view_weight=2.0).weight("view") == 2.0


def test_unknown_modes_and_missing_words_are_refused(encoder, tokenizer):
    with pytest.raises(ValueError, match="compose is 'sum'; expected one of tokens, joint_token"):
        Composition("sum")
    composition, injection, prompts = composed(encoder, tokenizer)
    with pytest.raises(ValueError, match="compose=tokens has no words for <view>; expected one"):
        composition.branches(injection, prompts, {"<time>": word(1)}, {})
    attention = Composition("attention")
    with pytest.raises(ValueError, match="compose=attention has no neutral words for <view>"):
        attention.branches(injection, prompts, two_words(), {"<time>": word(1)})
