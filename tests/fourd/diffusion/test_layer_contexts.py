"""Texts of their own for every layer: the stock model, the order of layers, and gradients."""

import copy
import logging
from functools import lru_cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from custom.fourd.diffusion.cross_view_attention import (
    cross_view_attention_size,
    set_cross_view_attention,
)
from custom.fourd.diffusion.ip_adapter import (
    image_arguments,
    load_ip_adapter,
    set_ip_adapter_scale,
)
from custom.fourd.diffusion.layer_contexts import (
    IgnoreLayerContexts,
    LayerContextAttnProcessor,
    LayerContexts,
    has_layer_contexts,
    joined_along_batch,
    layer_table,
    same_everywhere,
    set_layer_contexts,
    unet_arguments,
)
from custom.fourd.scripts.embedded_models import build_edit_unet
from tests.fixtures.ip_adapters import image_prompt, ip_adapter_weights
from tests.fixtures.model_folders import TINY_UNET

BATCH, TOKENS, WIDTH = 2, 6, 24
# The layout of Stable Diffusion 1.x and 2.x, with channels that a test can afford.
STABLE_DIFFUSION = {
    **TINY_UNET,
    "block_out_channels": [8, 8, 16, 16],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
THE_SIXTEEN = [
    "down_blocks.0.attentions.0", "down_blocks.0.attentions.1",
    "down_blocks.1.attentions.0", "down_blocks.1.attentions.1",
    "down_blocks.2.attentions.0", "down_blocks.2.attentions.1",
    "mid_block.attentions.0",
    "up_blocks.1.attentions.0", "up_blocks.1.attentions.1", "up_blocks.1.attentions.2",
    "up_blocks.2.attentions.0", "up_blocks.2.attentions.1", "up_blocks.2.attentions.2",
    "up_blocks.3.attentions.0", "up_blocks.3.attentions.1", "up_blocks.3.attentions.2",
]  # fmt: skip


@lru_cache
def built(layout, depth):
    torch.manual_seed(0)
    if layout == "embedded":
        return build_edit_unet().eval().requires_grad_(False)
    facts = STABLE_DIFFUSION if layout == "stable-diffusion" else TINY_UNET
    unet = UNet2DConditionModel(**{**facts, "transformer_layers_per_block": depth})
    return unet.eval().requires_grad_(False)


def build(layout="stable-diffusion", depth=1):
    """A fresh copy: making the modules takes longer than copying them."""
    return copy.deepcopy(built(layout, depth))


def embedded():
    return build("embedded")


def draws(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latents_of(unet):
    return draws(BATCH, unet.config.in_channels, 8, 8)


def contexts_of(unet, seed=2):
    shape = (len(layer_table(unet)), BATCH, TOKENS, unet.config.cross_attention_dim)
    return LayerContexts(draws(*shape, seed=seed), draws(*shape, seed=seed + 1))


def predict(unet, **arguments):
    return unet(latents_of(unet), 321, **arguments).sample


def test_stable_diffusion_has_the_sixteen_layers_in_order():
    unet = build()
    assert [name.split(".transformer")[0] for name in layer_table(unet)] == THE_SIXTEEN
    listed = [name for name in unet.attn_processors if ".attn2." in name]
    # The trap: the library lists the middle last, and it runs seventh.
    assert listed[15].startswith("mid_block") and layer_table(unet)[6].startswith("mid_block")


@pytest.mark.parametrize(
    "make",
    [build, embedded, lambda: build("shallow"), lambda: build("shallow", depth=2)],
    ids=["stable-diffusion", "embedded", "shallow", "two-deep"],
)
def test_layer_table_is_the_order_of_execution(make):
    unet = make()
    ran = []
    for name, module in unet.named_modules():
        if isinstance(module, Attention) and name.endswith("attn2"):
            module.register_forward_hook(lambda *_, name=name: ran.append(name))
    predict(unet, encoder_hidden_states=draws(BATCH, TOKENS, unet.config.cross_attention_dim))
    assert tuple(ran) == layer_table(unet) and len(set(ran)) == len(ran)


@pytest.mark.parametrize("kind", ["none", "base", "plus"])
def test_one_text_for_all_is_the_stock_model(kind):
    unet, extra = build(), {}
    if kind != "none":
        load_ip_adapter(unet, ip_adapter_weights(unet, kind))
        extra = image_arguments(image_prompt(kind, BATCH))
    text = draws(BATCH, TOKENS, WIDTH)
    stock = predict(unet, encoder_hidden_states=text, **extra)
    table = set_layer_contexts(unet)
    ours = predict(unet, **unet_arguments(same_everywhere(text, len(table))), **extra)
    assert torch.equal(ours, stock)
    assert torch.equal(predict(unet, encoder_hidden_states=text, **extra), stock)
    other = predict(unet, **unet_arguments(contexts_of(unet)), **extra)
    assert (other - stock).abs().max() > 1e-3


def test_the_embedded_family_pools_the_mean_of_the_values():
    unet = embedded()
    text = draws(BATCH, TOKENS, unet.config.cross_attention_dim)
    stock = predict(unet, encoder_hidden_states=text)
    table = set_layer_contexts(unet)
    ours = predict(unet, **unet_arguments(same_everywhere(text, len(table))))
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    contexts = contexts_of(unet)
    given = unet_arguments(contexts)["encoder_hidden_states"]
    torch.testing.assert_close(given, sum(contexts.values) / len(table))
    weighted = [contexts, LayerContexts(contexts.values, contexts.keys, weight=3.0)]
    expected = (sum(contexts.values) + 3 * sum(contexts.keys)) / (4 * len(table))
    torch.testing.assert_close(unet_arguments(weighted)["encoder_hidden_states"], expected)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_each_layer_hears_its_own_context(part):
    """A change in row l of the contexts is first heard where row l of the table runs."""
    unet = build()
    table = set_layer_contexts(unet)
    heard = {}
    for name in table:
        unet.get_submodule(name).register_forward_hook(
            lambda _, __, out, name=name: heard.setdefault(name, out)
        )
    contexts = contexts_of(unet)
    predict(unet, **unet_arguments(contexts))
    before = dict(heard)
    for layer in (0, 6, 7, 15):
        heard.clear()
        changed = {"keys": contexts.keys.clone(), "values": contexts.values.clone()}
        changed[part][layer] += 1.0 * draws(BATCH, TOKENS, WIDTH, seed=9)
        predict(unet, **unet_arguments(LayerContexts(**changed)))
        moved = [name for name in table if not torch.equal(heard[name], before[name])]
        assert moved[0] == table[layer]


def grads(unet, contexts, **extra):
    for part in (contexts.keys, contexts.values):
        part.grad = None
    (
        predict(unet, **unet_arguments(contexts), **extra) * draws(1, 4, 8, 8, seed=7)
    ).sum().backward()
    return contexts.keys.grad.clone(), contexts.values.grad.clone()


@pytest.mark.parametrize("kind", ["none", "plus"])
def test_gradient_checkpointing_changes_no_gradient(kind):
    unet, extra = build(), {}
    if kind == "plus":
        load_ip_adapter(unet, ip_adapter_weights(unet, kind))
        extra = image_arguments(image_prompt(kind, BATCH))
    set_layer_contexts(unet)
    contexts = contexts_of(unet)
    contexts.keys.requires_grad_(), contexts.values.requires_grad_()
    unet.train()
    plain = grads(unet, contexts, **extra)
    unet.enable_gradient_checkpointing()
    for again, first in zip(grads(unet, contexts, **extra), plain, strict=True):
        assert torch.equal(again, first)
        per_layer = first.flatten(1).norm(dim=1)
        assert float(per_layer.min()) > 1e-6, "a layer's text has no gradient"


def test_keys_learn_from_a_full_prompt_and_not_from_one_token():
    """The trap: softmax over one key is 1 whatever the key, so nothing reaches it."""
    torch.manual_seed(0)
    attn = Attention(query_dim=12, cross_attention_dim=WIDTH, heads=3, dim_head=4)
    ratio = {}
    for n_tokens in (1, 77):
        attn.zero_grad()
        text = draws(BATCH, n_tokens, WIDTH)
        (attn(draws(BATCH, 10, 12), text) * draws(BATCH, 10, 12, seed=3)).sum().backward()
        ratio[n_tokens] = float(attn.to_k.weight.grad.norm() / attn.to_v.weight.grad.norm())
    assert ratio[1] < 1e-6 and ratio[77] > 1e-2
    with pytest.raises(ValueError, match="have 1 token; expected at least 2, best the 77"):
        same_everywhere(draws(BATCH, 1, WIDTH), 16)


def test_separate_texts_are_weighed_and_summed():
    torch.manual_seed(0)
    attn = Attention(query_dim=12, cross_attention_dim=WIDTH, heads=3, dim_head=4).eval()
    hidden = draws(BATCH, 10, 12)
    shape = (1, BATCH, TOKENS, WIDTH)
    first = LayerContexts(draws(*shape), draws(*shape, seed=2), 0.25)
    second = LayerContexts(draws(*shape, seed=3), draws(*shape, seed=4), 0.5)

    def softmax_attention(context):
        out = torch.zeros(BATCH, 10, 12)
        query = attn.to_q(hidden)
        key, value = attn.to_k(context.keys[0]), attn.to_v(context.values[0])
        for head in range(3):
            part = slice(4 * head, 4 * head + 4)
            scores = query[..., part] @ key[..., part].transpose(1, 2) / 2.0
            out[..., part] = scores.softmax(-1) @ value[..., part]
        return context.weight * out

    with torch.no_grad():
        ours = LayerContextAttnProcessor(0)(attn, hidden, kv_context=[first, second])
        expected = attn.to_out[0](softmax_attention(first) + softmax_attention(second))
        torch.testing.assert_close(ours, expected)


def test_branches_of_a_guidance_are_one_batch():
    unet = build("shallow")
    set_layer_contexts(unet)
    parts = [contexts_of(unet, seed=2), contexts_of(unet, seed=5)]
    joined = joined_along_batch(parts)
    latents = latents_of(unet)
    together = unet(torch.cat((latents, latents)), 321, **unet_arguments(joined)).sample
    alone = torch.cat([unet(latents, 321, **unet_arguments(part)).sample for part in parts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="expected equal weights within one batch"):
        joined_along_batch([parts[0], LayerContexts(parts[1].keys, parts[1].values, 0.5)])


def test_the_scale_of_the_image_prompt_still_works():
    unet = build("shallow")
    set_layer_contexts(unet)
    contexts = contexts_of(unet)
    plain = predict(unet, **unet_arguments(contexts))
    load_ip_adapter(unet, ip_adapter_weights(unet, "base"))
    assert not has_layer_contexts(unet)
    set_layer_contexts(unet)
    assert has_layer_contexts(unet)
    image = image_arguments(image_prompt("base", BATCH))
    half = predict(unet, **unet_arguments(contexts), **image)
    assert (half - plain).abs().max() > 1e-3
    set_ip_adapter_scale(unet, 0.0)
    torch.testing.assert_close(predict(unet, **unet_arguments(contexts), **image), plain)
    set_ip_adapter_scale(unet, 0.5)
    assert torch.equal(predict(unet, **unet_arguments(contexts), **image), half)


def test_nothing_warns_of_unknown_arguments(caplog):
    unet = build()
    load_ip_adapter(unet, ip_adapter_weights(unet, "base"))
    set_layer_contexts(unet)
    logger = logging.getLogger("diffusers.models.attention_processor")
    logger.addHandler(caplog.handler)
    try:
        image = image_arguments(image_prompt("base", BATCH))
        predict(unet, **unet_arguments(contexts_of(unet)), **image)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record for record in caplog.records if record.name == logger.name] == []


def test_self_attention_over_views_stays():
    unet = build("shallow")
    set_cross_view_attention(unet, 2)
    text = draws(BATCH, TOKENS, WIDTH)
    stock = predict(unet, encoder_hidden_states=text)
    table = set_layer_contexts(set_and_return(unet))
    assert cross_view_attention_size(unet) == 2
    assert torch.equal(predict(unet, **unet_arguments(same_everywhere(text, len(table)))), stock)


def set_and_return(unet):
    """Installing twice is installing once."""
    set_layer_contexts(unet)
    inner = [p.inner for p in unet.attn_processors.values() if isinstance(p, IgnoreLayerContexts)]
    assert not any(isinstance(each, IgnoreLayerContexts) for each in inner)
    return unet


def test_a_mask_over_the_text_is_kept():
    unet = build("shallow")
    text = draws(BATCH, TOKENS, WIDTH)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    stock = predict(unet, encoder_hidden_states=text, encoder_attention_mask=mask)
    table = set_layer_contexts(unet)
    same = unet_arguments(same_everywhere(text, len(table)))
    assert torch.equal(predict(unet, **same, encoder_attention_mask=mask), stock)
    assert not torch.equal(predict(unet, **same), stock)


def test_what_does_not_fit_is_refused():
    unet = build("shallow")
    set_layer_contexts(unet)
    with pytest.raises(ValueError, match="contexts are of 3 samples; expected 2"):
        shape = (len(layer_table(unet)), 3, TOKENS, WIDTH)
        predict(unet, **unet_arguments(LayerContexts(draws(*shape), draws(*shape))))
    with pytest.raises(ValueError, match=r"expected both \(layers, batch, tokens, width\)"):
        LayerContexts(draws(3, 2, 6, 24), draws(3, 2, 5, 24))
    attn = unet.get_submodule(layer_table(unet)[0])
    text = draws(BATCH, TOKENS, WIDTH)
    with pytest.raises(ValueError, match="image tokens reached a layer without an IP-Adapter"):
        LayerContextAttnProcessor(0)(attn, draws(BATCH, 4, 16), (text, [text]))
    without = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match="the U-Net has no cross-attention; expected"):
        set_layer_contexts(without)


def test_a_foreign_processor_and_a_missing_image_are_refused():
    unet = build("shallow")
    load_ip_adapter(unet, ip_adapter_weights(unet, "base"))
    set_layer_contexts(unet)
    adapted = unet.attn_processors[f"{layer_table(unet)[0]}.processor"]
    attn = unet.get_submodule(layer_table(unet)[0])
    text = draws(BATCH, TOKENS, WIDTH)
    with pytest.raises(ValueError, match="no image tokens reached the IP-Adapter"):
        adapted(attn, draws(BATCH, 4, 16), text)
    with pytest.raises(ValueError, match="ip_adapter_masks were given; expected none"):
        adapted(attn, draws(BATCH, 4, 16), (text, [text]), ip_adapter_masks=text)

    class Foreign:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return hidden_states

    unet = build("shallow")
    unet.set_attn_processor(Foreign())
    with pytest.raises(ValueError, match="has the processor Foreign; expected AttnProcessor2_0"):
        set_layer_contexts(unet)
