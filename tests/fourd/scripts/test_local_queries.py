"""Tokens that look at squares of the image before anything is trained."""

import pytest
import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection

from custom.fourd.scripts.embedded_models import build_vision_encoder
from custom.fourd.scripts.local_queries import look_at_squares, place_codes, shift_of_codes


def make_resampler(num_tokens=16):
    torch.manual_seed(1)
    return IPAdapterPlusImageProjection(
        embed_dims=96, output_dims=128, hidden_dims=80, depth=4, dim_head=64, heads=1,
        num_queries=num_tokens,
    )  # fmt: skip


@pytest.fixture
def encoders():
    torch.manual_seed(0)
    vision, resampler = build_vision_encoder().eval(), make_resampler().eval()
    look_at_squares(vision, resampler)
    return vision, resampler


def tokens_of(encoders, pixels):
    vision, resampler = encoders
    states = vision(pixels, output_hidden_states=True).hidden_states[-2]
    return resampler(states)[0]


def test_codes_are_shifted_by_a_matrix():
    rows, columns = torch.tensor([0.5, 3.5, 6.0]), torch.tensor([7.0, 1.5, 2.0])
    further = place_codes(rows, columns, 8) @ shift_of_codes(0.5, -1.5, 8).T
    expected = place_codes(rows + 0.5, columns - 1.5, 8)
    torch.testing.assert_close(further, expected, atol=1e-5, rtol=0)


def test_a_place_is_most_like_itself():
    places = torch.arange(8) + 0.5
    codes = place_codes(places, torch.full((8,), 3.5), 8)
    assert torch.equal((codes @ codes.T).argmax(dim=1), torch.arange(8))


@pytest.mark.parametrize("square", [0, 3, 6, 13])
@torch.no_grad()
def test_a_change_in_a_square_changes_its_token_most(encoders, square):
    g = torch.Generator().manual_seed(3)
    pixels = torch.randn(1, 3, 64, 64, generator=g)
    row, column = 16 * (square // 4), 16 * (square % 4)
    other = pixels.clone()
    other[..., row : row + 16, column : column + 16] = torch.randn(3, 16, 16, generator=g)
    moved = (tokens_of(encoders, other) - tokens_of(encoders, pixels)).norm(dim=1)
    assert int(moved.argmax()) == square
    moved[square] = -moved[square]
    assert float(-moved[square]) > 1.5 * float(moved.max())


@torch.no_grad()
def test_each_block_looks_at_a_quarter_of_its_own(encoders):
    vision, resampler = encoders
    pixels = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    states = vision(pixels, output_hidden_states=True).hidden_states[-2]
    patches, latents = resampler.proj_in(states), resampler.latents.repeat(8, 1, 1)
    quarters = ((0, 0), (0, 1), (1, 0), (1, 1))
    for block, (row, column) in zip(resampler.layers, quarters, strict=True):
        queries = block.attn.to_q(block.ln1(latents))
        logits = queries @ block.attn.to_k(block.ln0(patches))[:, 1:].mT
        k = torch.arange(16)
        expected = 8 * (2 * (k // 4) + row) + 2 * (k % 4) + column
        # What patches show wins now and then; by chance 1 of 64 would be right.
        assert (logits.argmax(dim=2) == expected).float().mean() > 0.6
        latents = block(patches, latents, latents)


def test_tokens_that_are_no_squares_are_refused():
    with pytest.raises(ValueError, match=r"9 tokens over 8 x 8 patches: expected one token"):
        look_at_squares(build_vision_encoder(), make_resampler(9))
