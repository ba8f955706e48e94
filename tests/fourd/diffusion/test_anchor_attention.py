"""Anchor attention: against attention written out by hand, and what depends on what."""

import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from custom.fourd.diffusion.anchor_attention import (
    ANCHOR_MODES,
    AnchorAttention,
    AnchorAttnProcessor,
    remove_anchor_attention,
    set_anchor_attention,
)
from tests.fixtures.model_folders import TINY_UNET

FRAMES, BRANCHES = 4, 3


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY_UNET, "in_channels": 8}).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def inputs():
    """Latents of (frame, branch), frame-major, and the text of each branch."""
    g = torch.Generator().manual_seed(1)
    latents = torch.randn(FRAMES, BRANCHES, 8, 8, 8, generator=g)
    return latents, torch.randn(BRANCHES, 5, 24, generator=g)


def small_attention(**keys):
    torch.manual_seed(3)
    return Attention(query_dim=6, heads=2, dim_head=3, **keys).eval()


def by_hand(attn, queries, sources):
    """softmax(q k / sqrt(d)) v, one head at a time, in loops; sources: tokens to look at."""
    out = []
    for head in range(attn.heads):
        part = slice(head * 3, head * 3 + 3)
        q = queries @ attn.to_q.weight.T[:, part]
        k = sources @ attn.to_k.weight.T[:, part]
        v = sources @ attn.to_v.weight.T[:, part]
        out.append((q @ k.T / math.sqrt(3)).softmax(-1) @ v)
    return torch.cat(out, -1) @ attn.to_out[0].weight.T + attn.to_out[0].bias


def sources_of(mode, frames, index):
    others = {"anchor": [], "anchor_self": [frames[index]]}
    others["sparse_causal"] = [frames[max(index - 1, 0)]]
    return torch.cat([frames[0], *others[mode]])


@pytest.mark.parametrize("mode", ANCHOR_MODES)
@torch.no_grad()
def test_each_mode_is_attention_to_its_frames(mode):
    attn = small_attention()
    tokens = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    shared = AnchorAttention(mode)
    shared.joint(3)
    got = AnchorAttnProcessor(shared, "x")(attn, tokens.flatten(0, 1)).view_as(tokens)
    for group in range(2):
        for frame in range(3):
            sources = sources_of(mode, tokens[group], frame)
            expected = by_hand(attn, tokens[group, frame], sources)
            torch.testing.assert_close(got[group, frame], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_residual_and_scale_of_the_layer_are_kept():
    """Layers outside transformers add their input and divide; the stock processor says how."""
    attn = small_attention(residual_connection=True, rescale_output_factor=2.0)
    tokens = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    got = AnchorAttnProcessor(AnchorAttention("anchor"), "x")(attn, tokens)
    torch.testing.assert_close(got, attn(tokens), atol=1e-5, rtol=1e-4)


def run(unet, latents, text, rows):
    """The U-Net on (frame, branch) rows."""
    frames, branches = (list(part) for part in zip(*rows, strict=True))
    with torch.no_grad():
        return unet(latents[frames, branches], 500, encoder_hidden_states=text[branches]).sample


def in_pieces(unet, shared, latents, text, size):
    rows = [(f, b) for f in range(FRAMES) for b in range(BRANCHES)]
    shared.anchors()
    out = [run(unet, latents, text, rows[:BRANCHES])]
    for first in range(BRANCHES, len(rows), size):
        piece = rows[first : first + size]
        shared.frames([b for _, b in piece])
        out.append(run(unet, latents, text, piece))
    return torch.cat(out).unflatten(0, (FRAMES, BRANCHES))


@pytest.mark.parametrize("mode", ANCHOR_MODES)
def test_pieces_of_any_size_give_what_one_batch_gives(unet, inputs, mode):
    latents, text = inputs
    shared = set_anchor_attention(unet, mode)
    shared.joint(FRAMES)
    rows = [(f, b) for b in range(BRANCHES) for f in range(FRAMES)]
    whole = run(unet, latents, text, rows).unflatten(0, (BRANCHES, FRAMES)).transpose(0, 1)
    for size in (1, 4):
        pieces = in_pieces(unet, shared, latents, text, size)
        torch.testing.assert_close(pieces, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ANCHOR_MODES)
def test_which_frame_depends_on_which(unet, inputs, mode):
    latents, text = inputs
    shared = set_anchor_attention(unet, mode)
    before = in_pieces(unet, shared, latents, text, 5)
    for changed in range(FRAMES):
        other = latents.clone()
        other[changed] += 1.0
        moved = (in_pieces(unet, shared, other, text, 5) - before).abs().amax((1, 2, 3, 4)) > 1e-4
        expected = [changed == 0 or frame == changed for frame in range(FRAMES)]
        if mode == "sparse_causal" and 0 < changed < FRAMES - 1:
            # One U-Net call holds several layers, so the change walks on from frame to frame.
            assert moved[: changed + 2].tolist() == expected[: changed + 1] + [True]
        else:
            assert moved.tolist() == expected


@pytest.mark.parametrize("mode", ANCHOR_MODES)
def test_the_anchor_is_edited_as_if_it_were_alone(unet, inputs, mode):
    latents, text = inputs
    alone = [(0, branch) for branch in range(BRANCHES)]
    remove_anchor_attention(unet)
    expected = run(unet, latents, text, alone)
    got = in_pieces(unet, set_anchor_attention(unet, mode), latents, text, 5)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_branch_looks_at_the_anchor_of_its_own(unet, inputs):
    latents, text = inputs
    shared = set_anchor_attention(unet, "anchor")
    before = in_pieces(unet, shared, latents, text, 4)
    other = latents.clone()
    other[0, 1] += 1.0
    moved = (in_pieces(unet, shared, other, text, 4) - before).abs().amax((2, 3, 4)) > 1e-4
    assert moved.tolist() == [[False, True, False]] * FRAMES


def test_features_can_be_recalled_for_another_window(unet, inputs):
    latents, text = inputs
    shared = set_anchor_attention(unet, "sparse_causal")
    whole = in_pieces(unet, shared, latents, text, 9)
    shared.anchors()
    run(unet, latents, text, [(0, b) for b in range(BRANCHES)])
    kept = shared.snapshot()
    for _ in range(2):
        shared.recall(kept)
        shared.frames([0, 1, 2])
        got = run(unet, latents, text, [(1, b) for b in range(BRANCHES)])
        torch.testing.assert_close(got, whole[1], atol=2e-5, rtol=1e-4)
    shared.forget()
    assert not shared.kept and not shared.before


def test_only_self_attention_changes_and_it_can_be_undone(unet):
    set_anchor_attention(unet, "anchor")
    for name, processor in unet.attn_processors.items():
        assert isinstance(processor, AnchorAttnProcessor) == (".attn1." in name)
    remove_anchor_attention(unet)
    assert not any(isinstance(p, AnchorAttnProcessor) for p in unet.attn_processors.values())


# Errors


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode is 'ancor'; expected one of anchor, anchor_self"):
        AnchorAttention("ancor")


def test_frames_without_an_anchor_are_refused():
    with pytest.raises(RuntimeError, match="no anchor features are kept; expected a call"):
        AnchorAttention("anchor").frames([0])


def test_a_branch_without_an_anchor_is_refused():
    shared = AnchorAttention("anchor")
    shared.recall({"layer": (torch.zeros(2, 5, 6), torch.zeros(2, 5, 6))})
    with pytest.raises(ValueError, match=r"branches are \[0, 2\]; expected numbers below 2"):
        shared.frames([0, 2])


def test_a_batch_that_is_no_groups_is_refused():
    shared = AnchorAttention("anchor")
    shared.joint(3)
    with pytest.raises(ValueError, match="4 images does not divide into groups of 3 frames"):
        AnchorAttnProcessor(shared, "x")(small_attention(), torch.zeros(4, 5, 6))
    with pytest.raises(ValueError, match="num_frames is 0; expected 1 or more"):
        shared.joint(0)


def test_cross_attention_is_refused():
    with pytest.raises(ValueError, match="is for unmasked self-attention only"):
        AnchorAttnProcessor(AnchorAttention("anchor"), "x")(
            small_attention(), torch.zeros(1, 5, 6), torch.zeros(1, 5, 6)
        )
