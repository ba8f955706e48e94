"""Anchor-aware editing: T and n, chunking, what depends on what, noise, sizes, refusals."""

import math
import resource

import pytest
import torch

from custom.fourd.diffusion.edit_denoiser import ATTENTIONS
from custom.fourd.diffusion.samplers import partial_timesteps
from custom.fourd.guidance.anchor_instructpix2pix_guidance import (
    Anchor,
    AnchorInstructPix2PixGuidance,
)
from tests.fixtures.edit_folders import (
    write_edit_folder,
    write_full_edit_folder,
    write_patch_edit_folder,
)

SIZE = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_edit_folder(tmp_path_factory.mktemp("edit"))


@pytest.fixture(scope="module")
def guidance(folder):
    return build(folder)


def build(folder, **keys):
    cfg = {"pretrained_model_name_or_path": str(folder), **keys}
    return AnchorInstructPix2PixGuidance(cfg)


@pytest.fixture(scope="module")
def frames():
    """Three frames to start from, their originals, and the text of the branches."""
    g = torch.Generator().manual_seed(1)
    images, conditions = torch.rand(2, 3, SIZE, SIZE, 3, generator=g)
    return images, conditions, torch.randn(3, 5, 24, generator=g)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def an_anchor(seed=9):
    image, condition = torch.rand(2, SIZE, SIZE, 3, generator=torch.Generator().manual_seed(seed))
    return Anchor(image, condition, *generators(seed))


def edit(guidance, frames, anchor=None, steps=1, seeds=(1, 2, 3), **keys):
    images, conditions, text = frames
    given = generators(*seeds)
    return guidance.edit(images, conditions, text, 600, steps, anchor, given, **keys)


@pytest.fixture
def with_keys(guidance):
    """Set keys of the one guidance for a test, and set them back."""
    before = {key: getattr(guidance.cfg, key) for key in ("chunk_size", "share_group_norm")}
    for key in ("shared_noise", "resize", "timestep_spacing"):
        before[key] = getattr(guidance.cfg, key)

    def change(attention="anchor", **keys):
        guidance.set_attention(attention)
        for key, value in {**before, **keys}.items():
            setattr(guidance.cfg, key, value)
        return guidance

    yield change
    change()


def moved(first, second):
    return ((first - second).abs().amax((1, 2, 3)) > 1e-4).tolist()


# Strength: acceptance check 1


@pytest.mark.parametrize(
    "start, steps, first, signal, noise",
    [
        (1000, 20, 951, 0.090, 0.996),
        (803, 16, 751, 0.236, 0.972),
        (800, 10, 721, 0.266, 0.964),
        (700, 6, 581, 0.424, 0.906),
        (700, 5, 561, 0.449, 0.894),
        (600, 5, 481, 0.550, 0.835),
        (600, 4, 451, 0.588, 0.809),
        (550, 3, 367, 0.692, 0.722),
    ],
)
def test_the_published_table_of_t_and_n(guidance, start, steps, first, signal, noise):
    timesteps = partial_timesteps(start, steps)
    assert timesteps[0] == first and timesteps[-1] == 1 and len(timesteps) == steps
    assert {a - b for a, b in zip(timesteps, timesteps[1:])} == {start // steps}
    abar = guidance.alphas_cumprod[first].item()
    assert math.sqrt(abar) == pytest.approx(signal, abs=6e-4)
    assert math.sqrt(1 - abar) == pytest.approx(noise, abs=6e-4)


@pytest.mark.parametrize(
    "start, steps, message",
    [
        (600, 0, "steps is 0 and start 600; expected 1 <= steps <= start"),
        (5, 6, "steps is 6 and start 5; expected"),
        (1000, 1000, "begins at timestep 1000; expected one below 1000"),
    ],
)
def test_a_strength_out_of_range_is_refused(start, steps, message):
    with pytest.raises(ValueError, match=message):
        partial_timesteps(start, steps, 1000)


def test_trailing_steps_begin_at_the_strength_however_few(guidance, frames, with_keys):
    """By the rule, and by what the model is asked: 2 steps of 600 begin at 599, not at 301."""
    assert partial_timesteps(600, 2, spacing="trailing") == [599, 299]
    assert partial_timesteps(1000, 1, spacing="trailing") == [999]
    with pytest.raises(ValueError, match="start is 1001; expected at most 1000"):
        partial_timesteps(1001, 2, spacing="trailing")
    with pytest.raises(ValueError, match="spacing is 'even'; expected one of leading, trailing"):
        partial_timesteps(600, 2, spacing="even")
    with_keys("none", timestep_spacing="trailing")
    asked = []
    hook = guidance.unet.register_forward_pre_hook(lambda _, args: asked.append(int(args[1][0])))
    edit(guidance, frames, steps=2)
    hook.remove()
    assert sorted(set(asked), reverse=True) == [599, 299]


def test_the_whole_edit_is_that_of_a_loop_written_out(guidance, frames, with_keys):
    """One frame, without anchor attention, by the formulas of the specification in fp64."""
    with_keys("none")
    image, condition, text = frames[0][:1], frames[1][:1], frames[2]
    got = guidance.edit(image, condition, text, 9 * 50, 3, None, generators(4))
    vae, unet, g = guidance.vae, guidance.unet, generators(4)[0]
    with torch.no_grad():
        posterior = vae.encode(image.permute(0, 3, 1, 2) * 2 - 1).latent_dist
        x = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=g)
        c = vae.encode(condition.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mode()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = (1 - betas).cumprod(0)
        x = x.double() * 0.18215
        noise = torch.randn(x.shape, generator=g).double()
        x = abar[301].sqrt() * x + (1 - abar[301]).sqrt() * noise
        for now, after in ((301, 151), (151, 1), (1, 0)):
            three = torch.cat((torch.cat([x.float()] * 3), torch.cat((c, c, 0 * c))), 1)
            e = unet(three, now, encoder_hidden_states=text).sample.double()
            e = e[2:] + 7.5 * (e[:1] - e[1:2]) + 1.5 * (e[1:2] - e[2:])
            clean = (x - (1 - abar[now]).sqrt() * e) / abar[now].sqrt()
            x = abar[after].sqrt() * clean + (1 - abar[after]).sqrt() * e
        expected = vae.decode((x / 0.18215).float()).sample / 2 + 0.5
    expected = expected.clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)


# Anchor and chunks: acceptance check 2


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_any_chunk_size_gives_the_same_frames(frames, with_keys, attention):
    results = [
        edit(with_keys(attention, chunk_size=size), frames, an_anchor(), steps=2)
        for size in (2, 99)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-4, rtol=1e-3)
    assert results[0].shape == (3, SIZE, SIZE, 3)


def test_kept_features_give_what_the_anchor_gives(frames, with_keys):
    for attention in ("anchor", "sparse_causal"):
        guidance = with_keys(attention)
        kept = guidance.anchor_features(an_anchor(), frames[2], 600, 2)
        with_anchor = edit(guidance, frames, an_anchor(), steps=2)
        for _ in range(2):
            got = edit(guidance, frames, kept, steps=2)
            torch.testing.assert_close(got, with_anchor, atol=1e-4, rtol=1e-3)


def test_a_frame_depends_on_itself_and_the_anchor_only(frames, with_keys):
    guidance = with_keys()
    before = edit(guidance, frames, an_anchor())
    images, conditions, text = frames
    changed = images.clone()
    changed[1] = 1 - changed[1]
    after = edit(guidance, (changed, conditions, text), an_anchor())
    assert moved(before, after) == [False, True, False]
    assert moved(before, edit(guidance, frames, an_anchor(10))) == [True] * 3
    alone = (images[1:2], conditions[1:2], text)
    got = edit(guidance, alone, an_anchor(), seeds=(2,))
    torch.testing.assert_close(got, before[1:2], atol=1e-4, rtol=1e-3)


def test_without_an_anchor_the_first_frame_is_it(frames, with_keys):
    guidance = with_keys()
    images, conditions, text = frames
    whole = edit(guidance, frames)
    anchor = Anchor(images[0], conditions[0], *generators(1))
    rest = edit(guidance, (images[1:], conditions[1:], text), anchor, seeds=(2, 3))
    torch.testing.assert_close(whole[1:], rest, atol=1e-4, rtol=1e-3)
    alone = edit(with_keys("none"), frames)
    torch.testing.assert_close(whole[0], alone[0], atol=1e-4, rtol=1e-3)
    assert moved(whole, alone)[1:] == [True, True]


def test_shared_group_norms_tie_all_frames(frames, with_keys):
    guidance = with_keys(share_group_norm=True)
    before = edit(guidance, frames, an_anchor())
    images, conditions, text = frames
    changed = images.clone()
    changed[1] = 1 - changed[1]
    after = edit(guidance, (changed, conditions, text), an_anchor())
    assert moved(before, after) == [True] * 3
    assert moved(before, edit(with_keys(), frames, an_anchor())) == [True] * 3


# Noise


def test_noise_belongs_to_the_frame(frames, with_keys):
    guidance = with_keys()
    before = edit(guidance, frames, an_anchor())
    assert torch.equal(edit(guidance, frames, an_anchor()), before)
    other = edit(guidance, frames, an_anchor(), seeds=(1, 7, 3))
    assert moved(before, other) == [False, True, False]


def test_noise_in_common_makes_like_frames_alike(frames, tmp_path):
    """The embedded kind of autoencoder has a point for a posterior: noise is all that differs."""
    guidance = build(write_patch_edit_folder(tmp_path), attention="none", chunk_size=1)
    images, conditions, text = frames
    twice = (images[:1].repeat(2, 1, 1, 1), conditions[:1].repeat(2, 1, 1, 1), text)
    apart = []
    for share in (0.0, 0.9, 1.0):
        guidance.cfg.shared_noise = share
        (shared,) = generators(5)
        first, second = edit(guidance, twice, seeds=(1, 2), shared_generator=shared)
        assert first.shape == (SIZE, SIZE, 3) and torch.isfinite(first).all()
        apart.append((first - second).abs().mean().item())
    assert apart[0] > 1.5 * apart[1] > 0 and apart[2] == 0
    with pytest.raises(ValueError, match="shared_noise is 1.0 and shared_generator is missing"):
        edit(guidance, frames)


# Sizes and scales


def test_odd_sizes_come_back_as_they_were(frames, with_keys):
    images = torch.rand(2, 15, 21, 3, generator=torch.Generator().manual_seed(0))
    for resize in (None, 16):
        got = edit(with_keys(resize=resize), (images, images, frames[2]), seeds=(1, 2))
        assert got.shape == images.shape and got.dtype == torch.float32
        assert 0 <= got.min() and got.max() <= 1


def test_scales_follow_their_schedules(folder):
    schedule = [0, 1.5, 2.5, 10]
    guidance = build(folder, image_guidance_scale=schedule, guidance_scale=9.5)
    guidance.update_step(0, 5)
    assert guidance.image_guidance_scale == 2.0 and guidance.guidance_scale == 9.5


# Refusals


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"attention": "own"}, "attention is 'own'; expected one of anchor, anchor_self"),
        ({"chunk_size": 0}, "chunk_size is 0; expected 1 or more"),
        ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; expected one of leading, tr"),
        ({"shared_noise": 1.5}, "shared_noise is 1.5; expected a share from 0 to 1"),
    ],
)
def test_wrong_keys_are_refused(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        build(folder, **keys)


def test_frames_that_do_not_fit_are_refused(frames, with_keys):
    guidance = with_keys()
    images, conditions, text = frames
    with pytest.raises(ValueError, match=r"images have shape \(2, 12, 12, 3\) and conditions"):
        edit(guidance, (images[:2], conditions, text))
    with pytest.raises(ValueError, match="holds 2 rows; expected 3"):
        edit(guidance, (images, conditions, text[:2]))
    with pytest.raises(ValueError, match="there are 2 generators for 3 frames"):
        edit(guidance, frames, seeds=(1, 2))


def test_features_that_do_not_fit_are_refused(frames, with_keys):
    kept = with_keys().anchor_features(an_anchor(), frames[2], 600, 1)
    with pytest.raises(ValueError, match="features are of start=600, steps=1, size"):
        edit(with_keys(), frames, kept, steps=2)
    with pytest.raises(ValueError, match="were asked for with attention 'none'"):
        edit(with_keys("none"), frames, kept)
    for keys in ({"attention": "none"}, {"share_group_norm": True}):
        with pytest.raises(ValueError, match="features of an anchor were asked for"):
            with_keys(**keys).anchor_features(an_anchor(), frames[2], 600, 1)


@pytest.mark.slow
def test_a_window_of_the_full_size_model(tmp_path):
    """Five frames and their anchor, 128 px, one step, on the CPU in fp32, below 9 GB in all."""
    guidance = build(write_full_edit_folder(tmp_path), chunk_size=3)
    assert sum(p.numel() for p in guidance.unet.parameters()) == pytest.approx(859.5e6, rel=1e-3)
    assert len([n for n in guidance.unet.attn_processors if ".attn1." in n]) == 16
    g = torch.Generator().manual_seed(0)
    images = torch.rand(6, 128, 128, 3, generator=g)
    anchor = Anchor(images[5], images[5], *generators(9))
    text = torch.randn(3, 77, 768, generator=g)
    window = images[:5]
    got = guidance.edit(window, window, text, 600, 1, anchor, generators(*range(5)))
    assert got.shape == window.shape and torch.isfinite(got).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 9e6, "kilobytes"
