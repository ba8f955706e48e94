"""Mappers' words in a prompt: the encoder's own output, formulas by hand, and gradients."""

import copy

import pytest
import torch

from custom.fourd.mappers.mapper import MapperOutput
from custom.fourd.mappers.text_injection import (
    InjectionConfig,
    TextInjection,
    unit_length,
)
from custom.fourd.scripts.make_family import make_tokenizer
from tests.fixtures.model_folders import write_clip_tokenizer
from tests.fixtures.text_encoders import WIDTH, tiny_text_encoder

LAYERS = 3
PROMPTS = ["<view> <time>. a photo of a red cube", "a ball <view> <time>."]
SUPER = {"<view>": "view", "<time>": "time"}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return tiny_text_encoder(tokenizer)


def draws(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(seed, batch=2):
    shape = (LAYERS, batch, WIDTH)
    return MapperOutput(draws(*shape, seed=seed), draws(*shape, seed=seed + 1))


def encode(encoder, ids):
    """The encoder as it stands: (before, after) its final norm."""
    out = encoder(ids, output_hidden_states=True)
    return out.hidden_states[-1], out.last_hidden_state


def placed(encoder, prompts, words):
    """Slow reference: the stock forward, layer by layer, with embeddings replaced by a hook."""
    hidden, normed = [], []
    for layer in range(LAYERS):

        def replace(_, __, embedded, layer=layer):
            embedded = embedded.clone()
            for name, word in words.items():
                for row, position in enumerate(prompts.positions[name].tolist()):
                    embedded[row, position] = word.base[layer, row]
            return embedded

        inner = getattr(encoder, "text_model", encoder)
        handle = inner.embeddings.token_embedding.register_forward_hook(replace)
        try:
            before, after = encode(encoder, prompts.input_ids)
        finally:
            handle.remove()
        hidden.append(before), normed.append(after)
    return torch.stack(hidden), torch.stack(normed)


def test_prompts_are_full_and_placeholders_found(encoder, tokenizer):
    prompts = TextInjection(encoder, tokenizer, SUPER).tokenize(PROMPTS)
    assert prompts.input_ids.shape == (2, 77)
    assert prompts.positions["<view>"].tolist() == [1, 3]
    assert prompts.positions["<time>"].tolist() == [2, 4]
    ids = tokenizer.convert_tokens_to_ids(["view", "time"])
    assert prompts.input_ids[0, 1:3].tolist() == ids
    assert prompts.input_ids[1, 3:5].tolist() == ids
    plain = tokenizer("view time. a photo of a red cube", padding="max_length").input_ids
    assert prompts.input_ids[0].tolist() == plain


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("projection", [False, True], ids=["flat", "nested"])
def test_without_words_it_is_the_encoder(tokenizer, attention, projection):
    encoder = tiny_text_encoder(tokenizer, attention, projection)
    injection = TextInjection(encoder, tokenizer, SUPER)
    prompts = injection.tokenize(PROMPTS)
    contexts = injection.contexts(prompts, {})
    torch.testing.assert_close(contexts.keys[0], encoder(prompts.input_ids).last_hidden_state)
    assert contexts.keys.shape == (1, 2, 77, WIDTH) and contexts.values is contexts.keys


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bases_take_the_place_of_embeddings(tokenizer, attention):
    encoder = tiny_text_encoder(tokenizer, attention)
    injection = TextInjection(encoder, tokenizer, SUPER)
    prompts = injection.tokenize(PROMPTS)
    words = {"<view>": output(1), "<time>": output(5)}
    contexts = injection.contexts(prompts, words)
    _, expected = placed(encoder, prompts, words)
    torch.testing.assert_close(contexts.keys, expected, atol=1e-5, rtol=1e-4)


def bypassed(encoder, injection, mode_formula, names=("<view>", "<time>")):
    prompts = injection.tokenize(PROMPTS)
    words = {name: output(seed) for name, seed in zip(names, (1, 5), strict=False)}
    hidden, normed = placed(encoder, prompts, words)
    expected = mode_formula(hidden, normed, prompts, words)
    contexts = injection.contexts(prompts, words)
    torch.testing.assert_close(contexts.keys, normed, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(contexts.values, expected, atol=1e-5, rtol=1e-4)
    return contexts, prompts


def each_row(prompts, words):
    for name, word in words.items():
        for layer in range(LAYERS):
            for row, position in enumerate(prompts.positions[name].tolist()):
                vector = word.bypass[layer, row]
                yield (layer, row, position), vector / vector.norm()


def test_constrained_bypass_by_hand(encoder, tokenizer):
    def formula(hidden, normed, prompts, words):
        changed = hidden.clone()
        for at, direction in each_row(prompts, words):
            changed[at] = hidden[at] + 0.7 * hidden[at].norm() * direction
        return encoder.final_layer_norm(changed)

    injection = TextInjection(encoder, tokenizer, SUPER, InjectionConfig(bypass_strength=0.7))
    contexts, prompts = bypassed(encoder, injection, formula)
    differs = (contexts.values - contexts.keys).abs().amax(dim=(0, 3)) > 1e-6
    for name in SUPER:
        differs[torch.arange(2), prompts.positions[name]] ^= True
    assert not bool(differs.any()), "the bypass changes the placeholders' rows and no others"


def test_unconstrained_bypass_by_hand(encoder, tokenizer):
    def formula(hidden, normed, prompts, words):
        changed = hidden.clone()
        for at, direction in each_row(prompts, words):
            changed[at] = hidden[at[0], at[1]].norm(dim=-1).mean() * direction
        return encoder.final_layer_norm(changed)

    injection = TextInjection(encoder, tokenizer, SUPER, InjectionConfig(mode="unconstrained"))
    bypassed(encoder, injection, formula)


def test_literal_bypass_by_hand(encoder, tokenizer):
    """v* = CLIP(v_base) + 0.2 normalize(v_bypass): after the norm, and hardly seen."""

    def formula(hidden, normed, prompts, words):
        changed = normed.clone()
        for at, direction in each_row(prompts, words):
            changed[at] = normed[at] + 0.2 * direction
        return changed

    injection = TextInjection(encoder, tokenizer, SUPER, InjectionConfig(mode="literal"))
    contexts, prompts = bypassed(encoder, injection, formula)
    rows = (slice(None), torch.arange(2), prompts.positions["<time>"])
    moved = (contexts.values - contexts.keys)[rows].norm(dim=-1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2))


def test_one_word_alone_leaves_the_other_neutral(encoder, tokenizer):
    injection = TextInjection(encoder, tokenizer, SUPER)
    prompts = injection.tokenize(PROMPTS)
    alone = {"<time>": MapperOutput(output(5).base, None)}
    contexts = injection.contexts(prompts, alone)
    _, expected = placed(encoder, prompts, alone)
    torch.testing.assert_close(contexts.keys, expected, atol=1e-5, rtol=1e-4)
    assert contexts.values is contexts.keys
    # Causal: what stands before <time> in the first prompt does not hear it.
    neutral = injection.contexts(prompts, {})
    torch.testing.assert_close(contexts.keys[:, 0, :2], neutral.keys[:, 0, :2].expand(3, -1, -1))
    assert (contexts.keys[:, 0, 3:] - neutral.keys[:, 0, 3:]).abs().amin(dim=-1).max() > 1e-4


def test_a_bypass_alone_leaves_the_keys(encoder, tokenizer):
    injection = TextInjection(encoder, tokenizer, SUPER)
    prompts = injection.tokenize(PROMPTS)
    contexts = injection.contexts(prompts, {"<time>": MapperOutput(None, output(5).bypass)})
    neutral = injection.contexts(prompts, {})
    torch.testing.assert_close(contexts.keys, neutral.keys.expand(LAYERS, -1, -1, -1))
    assert contexts.values.shape[0] == LAYERS


def test_a_base_can_be_added_to_the_embedding(encoder, tokenizer):
    prompts = TextInjection(encoder, tokenizer, SUPER).tokenize(PROMPTS)
    weight = encoder.embeddings.token_embedding.weight
    id_of_time = tokenizer.convert_tokens_to_ids("time")
    word = MapperOutput(output(5).base, None)
    added = TextInjection(encoder, tokenizer, SUPER, InjectionConfig(base_entry="add"))
    sums = {"<time>": MapperOutput(word.base + weight[id_of_time], None)}
    _, expected = placed(encoder, prompts, sums)
    found = added.contexts(prompts, {"<time>": word}).keys
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gradients_reach_both_vectors(encoder, tokenizer):
    injection = TextInjection(encoder, tokenizer, SUPER)
    word = output(3)
    word.base.requires_grad_(), word.bypass.requires_grad_()
    contexts = injection.contexts(injection.tokenize(PROMPTS), {"<time>": word})
    (contexts.keys * draws(77, WIDTH)).sum().backward(retain_graph=True)
    assert float(word.base.grad.flatten(2).norm(dim=-1).min()) > 1e-3
    assert word.bypass.grad is None or not bool(word.bypass.grad.any())
    (contexts.values * draws(77, WIDTH)).sum().backward()
    assert float(word.bypass.grad.flatten(2).norm(dim=-1).min()) > 1e-4


def test_no_table_is_resized_and_no_tokenizer_changed(encoder, tmp_path):
    write_clip_tokenizer(tmp_path)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    size = len(tokenizer)
    encoder = tiny_text_encoder(tokenizer)
    before = copy.deepcopy(encoder.state_dict())
    injection = TextInjection(encoder, tokenizer, {"<time>": "red"})
    prompts = injection.tokenize(["<time>. red red", "red<time>, red"])
    assert len(tokenizer) == size and int(prompts.input_ids.max()) < size
    assert prompts.positions["<time>"].tolist() == [1, 2]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    # Pooled outputs look for the highest id or for the end: it is where it was.
    end = prompts.input_ids == tokenizer.eos_token_id
    assert end.int().argmax(dim=1).tolist() == [5, 5]


def test_the_norm_of_the_base_is_that_of_the_super_category(encoder, tokenizer):
    injection = TextInjection(encoder, tokenizer, SUPER)
    row = encoder.embeddings.token_embedding.weight[tokenizer.convert_tokens_to_ids("time")]
    assert injection.base_norm("<time>") == pytest.approx(float(row.norm()))
    assert (injection.width, injection.length) == (WIDTH, 77)


def test_unit_length_is_smooth_at_zero():
    zero = torch.zeros(4, requires_grad=True)
    unit_length(zero).sum().backward()
    assert bool(zero.grad.isfinite().all()) and not bool(unit_length(torch.zeros(4)).any())
    torch.testing.assert_close(unit_length(torch.tensor([3.0, 4.0])), torch.tensor([0.6, 0.8]))


def test_what_does_not_fit_is_refused(encoder, tokenizer):
    with pytest.raises(ValueError, match="super-category 'zebra' is 1 tokens, or unknown"):
        TextInjection(encoder, tokenizer, {"<time>": "zebra"})
    with pytest.raises(ValueError, match="super-category 'red cube' is 2 tokens"):
        TextInjection(encoder, tokenizer, {"<time>": "red cube"})
    with pytest.raises(ValueError, match="mode is 'free'; expected one of constrained"):
        InjectionConfig(mode="free")
    with pytest.raises(ValueError, match="base_entry is 'sum'; expected one of replace, add"):
        InjectionConfig(base_entry="sum")
    injection = TextInjection(encoder, tokenizer, SUPER)
    with pytest.raises(ValueError, match="'<view> a cube' holds <time> 0 times within its 77"):
        injection.tokenize(["<view> a cube"])
    with pytest.raises(ValueError, match="holds <time> 2 times"):
        injection.tokenize(["<view> <time> <time>"])
    with pytest.raises(ValueError, match="holds <time> 0 times"):
        injection.tokenize(["<view> " + "red " * 90 + "<time>"])
    prompts = injection.tokenize(PROMPTS)
    with pytest.raises(ValueError, match="given for <control>; expected placeholders"):
        injection.contexts(prompts, {"<control>": output(1)})
    with pytest.raises(ValueError, match=r"shapes \[\(3, 5, 24\)\]; expected \(layers, 2, 24\)"):
        injection.contexts(prompts, {"<time>": output(1, batch=5)})
