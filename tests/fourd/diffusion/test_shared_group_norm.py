"""Group norms over frames: against the five-dimensional norm that they stand for."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from custom.fourd.diffusion.anchor_attention import set_anchor_attention
from custom.fourd.diffusion.shared_group_norm import pooled_norms, shared_group_norm
from tests.fixtures.edit_folders import FULL_EDIT_UNET
from tests.fixtures.model_folders import TINY_UNET


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_UNET).eval().requires_grad_(False)


def call(unet, latents, text):
    return unet(latents, 500, encoder_hidden_states=text).sample


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_pooled_norm_is_that_of_frames_folded_into_a_fifth_dimension(unet):
    norm = pooled_norms(unet)[0]
    images = draw(2 * 3, norm.num_channels, 4, 5) + torch.arange(6.0).view(6, 1, 1, 1)
    with shared_group_norm(unet, 3):
        got = norm(images)
    five = images.unflatten(0, (2, 3)).transpose(1, 2)
    expected = torch.nn.functional.group_norm(
        five, norm.num_groups, norm.weight, norm.bias, norm.eps
    )
    expected = expected.transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (norm(images) - got).abs().max() > 0.1, "the context is over"


def test_frames_alike_are_not_changed_and_others_are(unet):
    latents, text = draw(1, 4, 8, 8).repeat(3, 1, 1, 1), draw(1, 5, 24).repeat(3, 1, 1)
    plain = call(unet, latents, text)
    with shared_group_norm(unet, 3):
        torch.testing.assert_close(call(unet, latents, text), plain, atol=2e-5, rtol=1e-4)
        latents = draw(3, 4, 8, 8)
        pooled = call(unet, latents, text)
    plain = call(unet, latents, text)
    relative = ((pooled - plain).norm() / plain.norm()).item()
    assert 0.005 < relative < 0.5


def test_with_pooled_norms_every_frame_depends_on_every_other(unet):
    """Acceptance check 2: the anchor's invariance holds without pooled norms, not with them."""
    latents, text = draw(3, 4, 8, 8), draw(1, 5, 24).repeat(3, 1, 1)
    other = latents.clone()
    other[2] += 1.0
    set_anchor_attention(unet, "anchor").joint(3)
    same = call(unet, latents, text) - call(unet, other, text)
    assert same[:2].abs().max() < 1e-5 and same[2].abs().max() > 1e-3
    with shared_group_norm(unet, 3):
        pooled = call(unet, latents, text) - call(unet, other, text)
    assert pooled.abs().amax((1, 2, 3)).min() > 1e-4


def test_the_full_size_network_pools_the_published_44_norms_and_its_last():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_EDIT_UNET)
    norms = pooled_norms(unet)
    assert len(norms) == 44 + 1 and len({id(norm) for norm in norms}) == 45


def test_a_batch_that_is_no_groups_is_refused_and_the_norms_are_restored(unet):
    with pytest.raises(ValueError, match="4 images does not divide into groups of 3 frames"):
        with shared_group_norm(unet, 3):
            call(unet, draw(4, 4, 8, 8), draw(4, 5, 24))
    assert all(not n._forward_hooks and not n._forward_pre_hooks for n in pooled_norms(unet))
