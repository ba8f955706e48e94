"""Attention over views: plain attention on joined tokens, nothing more."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from custom.fourd.diffusion.cross_view_attention import (
    CrossViewAttnProcessor,
    cross_view_attention_size,
    set_cross_view_attention,
)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention(query_dim=12, heads=3, dim_head=4, bias=False).eval()


@pytest.fixture
def tokens():
    return torch.randn(8, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16),
        layers_per_block=1, cross_attention_dim=6, attention_head_dim=2, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    return model.eval()


def by_loops(attention, tokens, num_views):
    """Softmax attention, one object, head and query at a time."""
    out = torch.zeros_like(tokens)
    for start in range(0, len(tokens), num_views):
        joined = tokens[start : start + num_views].reshape(-1, tokens.shape[-1])
        query, key, value = (f(joined) for f in (attention.to_q, attention.to_k, attention.to_v))
        mixed = torch.zeros_like(query)
        for head in range(3):
            columns = slice(4 * head, 4 * head + 4)
            for row in range(len(joined)):
                scores = key[:, columns] @ query[row, columns] / 2.0
                mixed[row, columns] = scores.softmax(0) @ value[:, columns]
        result = attention.to_out[0](mixed).view(num_views, -1, tokens.shape[-1])
        out[start : start + num_views] = result
    return out


@pytest.mark.parametrize("num_views", [1, 2, 4, 8])
def test_equals_softmax_by_loops(attention, tokens, num_views):
    with torch.no_grad():
        ours = CrossViewAttnProcessor(num_views)(attention, tokens)
        torch.testing.assert_close(ours, by_loops(attention, tokens, num_views))


def test_one_view_is_plain_attention(attention, tokens):
    with torch.no_grad():
        torch.testing.assert_close(
            CrossViewAttnProcessor(1)(attention, tokens), attention(tokens)
        )


def test_four_views_are_not_plain_attention(attention, tokens):
    with torch.no_grad():
        ours = CrossViewAttnProcessor(4)(attention, tokens)
        assert (ours - attention(tokens)).abs().max() > 0.01


def test_objects_do_not_see_each_other(attention, tokens):
    with torch.no_grad():
        first = CrossViewAttnProcessor(4)(attention, tokens)
        tokens[4:] += 1
        second = CrossViewAttnProcessor(4)(attention, tokens)
    assert torch.equal(first[:4], second[:4]) and not torch.equal(first[4:], second[4:])


def test_permuted_views_give_permuted_results(attention, tokens):
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        processor = CrossViewAttnProcessor(4)
        torch.testing.assert_close(
            processor(attention, tokens[:4][order]), processor(attention, tokens[:4])[order]
        )


def test_bad_input_is_refused(attention, tokens):
    with pytest.raises(ValueError, match="num_views is 0; expected 1 or more"):
        CrossViewAttnProcessor(0)
    with pytest.raises(ValueError, match="8 images does not divide into groups of 3 views"):
        CrossViewAttnProcessor(3)(attention, tokens)
    for extra in ({"encoder_hidden_states": tokens}, {"attention_mask": tokens}):
        with pytest.raises(ValueError, match="unmasked self-attention only"):
            CrossViewAttnProcessor(4)(attention, tokens, **extra)


def test_only_self_attention_of_a_unet_is_joined(unet):
    set_cross_view_attention(unet, 4)
    for name, processor in unet.attn_processors.items():
        assert isinstance(processor, CrossViewAttnProcessor) == (".attn1." in name)
    assert cross_view_attention_size(unet) == 4
    processors = dict(unet.attn_processors)
    odd = next(name for name in processors if ".attn1." in name)
    processors[odd] = CrossViewAttnProcessor(2)
    unet.set_attn_processor(processors)
    with pytest.raises(ValueError, match=r"joins different numbers of views: \[2, 4\]"):
        cross_view_attention_size(unet)


def test_a_unet_of_one_view_is_the_image_unet(unet):
    from diffusers.models.attention_processor import AttnProcessor2_0

    g = torch.Generator().manual_seed(3)
    latents, text = torch.randn(4, 4, 8, 8, generator=g), torch.randn(4, 3, 6, generator=g)

    def run():
        with torch.no_grad():
            return unet(latents, 7, text).sample

    unet.set_attn_processor(AttnProcessor2_0())
    assert cross_view_attention_size(unet) == 1
    plain = run()
    set_cross_view_attention(unet, 1)
    torch.testing.assert_close(run(), plain, atol=1e-5, rtol=1e-4)
    set_cross_view_attention(unet, 4)
    assert (run() - plain).abs().max() > 1e-4
