"""InstructPix2Pix's formula, sizes and loading."""

import json

import pytest
import torch

from custom.fourd.diffusion.instruct_pix2pix import (
    condition_latents,
    draw_frames,
    editing_size,
    load_edit_prior,
    three_branch_guidance,
)
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from tests.fixtures.edit_folders import write_edit_folder
from tests.fixtures.model_folders import write_multiview_folder, write_stable_diffusion_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_edit_folder(tmp_path_factory.mktemp("edit"))


# Guidance


def test_the_guidance_formula_by_hand():
    """Acceptance check 3: 1 + 7.5 (4 - 2) + 1.5 (2 - 1) = 17.5."""
    text, image, uncond = (torch.full((1, 2), value) for value in (4.0, 2.0, 1.0))
    assert three_branch_guidance(text, image, uncond, 7.5, 1.5).tolist() == [[17.5, 17.5]]


@pytest.mark.parametrize(
    "scales, expected", [((1.0, 1.0), 4.0), ((0.0, 1.0), 2.0), ((0.0, 0.0), 1.0)]
)
def test_scales_of_one_and_none_choose_a_branch(scales, expected):
    branches = (torch.tensor([value]) for value in (4.0, 2.0, 1.0))
    assert three_branch_guidance(*branches, *scales).item() == expected


def test_velocities_combine_as_noises_do():
    g = torch.Generator().manual_seed(0)
    noises, noisy = torch.randn(3, 1, 5, generator=g), torch.randn(1, 5, generator=g)
    signal, noise = 0.6, 0.8
    clean = (noisy - noise * noises) / signal
    velocities = signal * noises - noise * clean
    guided = three_branch_guidance(*velocities, 9.5, 1.5)
    expected = three_branch_guidance(*noises, 9.5, 1.5)
    torch.testing.assert_close(noise * noisy + signal * guided, expected, atol=1e-5, rtol=1e-5)


# Sizes


@pytest.mark.parametrize(
    "size, longest, expected",
    [
        ((1014, 1352), None, (1008, 1352)),  # 1352 = 169 latents, 1008 = 126
        ((1014, 1352), 1024, (768, 1024)),
        ((960, 720), 512, (512, 384)),
        ((64, 64), None, (64, 64)),
        ((15, 9), None, (8, 8)),
        ((300, 400), 512, (384, 512)),
    ],
)
def test_the_published_resize_rules(size, longest, expected):
    assert editing_size(*size, 8, longest) == expected


def test_the_embedded_model_keeps_its_size():
    assert editing_size(64, 64, 4) == (64, 64) == editing_size(128, 128, 4, 64)
    assert editing_size(50, 67, 4) == (48, 64)


def test_an_image_without_a_whole_latent_is_refused():
    with pytest.raises(ValueError, match="an image of 7 x 100 pixels holds no whole latent of 8"):
        editing_size(7, 100, 8)


# Latents and noise


def test_the_condition_is_the_mode_and_not_scaled(folder):
    vae = load_edit_prior(str(folder)).autoencoder
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    posterior = vae.encode(image * 2 - 1).latent_dist
    got = condition_latents(vae, image)
    torch.testing.assert_close(got, posterior.mean, atol=1e-6, rtol=1e-5)
    assert vae.config.scaling_factor == 0.18215
    assert torch.equal(got, condition_latents(vae, image)), "nothing is drawn"


def test_the_condition_of_the_patch_autoencoder():
    vae = PatchAutoencoder(patch_size=4, latent_channels=16)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.encode(image * 2 - 1).latent_dist.mode()
    assert torch.equal(condition_latents(vae, image), expected)


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_frame_has_its_own_noise_whoever_is_beside_it():
    three = draw_frames((3, 2, 4, 4), generators(5, 6, 7))
    assert torch.equal(draw_frames((1, 2, 4, 4), generators(6))[0], three[1])
    assert (three[0] - three[1]).abs().max() > 0.1


def test_shared_noise_has_unit_variance_and_the_asked_correlation():
    common = draw_frames((1, 100, 20, 20), generators(0))[0]
    rows = draw_frames((2, 100, 20, 20), generators(1, 2), common, 0.36).flatten(1)
    assert rows.std(1).sub(1).abs().max() < 0.02
    assert torch.corrcoef(rows)[0, 1].item() == pytest.approx(0.36, abs=0.02)
    same = draw_frames((2, 100, 20, 20), generators(1, 2), common, 1.0)
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], common)


# Loading


def test_the_last_step_ends_where_the_scheduler_says(folder, tmp_path):
    prior = load_edit_prior(str(folder))
    assert prior.final_alpha_cumprod == pytest.approx(1 - 0.00085, abs=1e-6)
    assert prior.unet.conv_in.in_channels == 8 and not prior.unet.training
    write_edit_folder(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "set_alpha_to_one": True}))
    assert load_edit_prior(str(tmp_path)).final_alpha_cumprod == 1.0


def test_a_text_to_image_model_is_refused(tmp_path):
    write_stable_diffusion_folder(tmp_path)
    with pytest.raises(ValueError, match="takes 4 channels; expected 8, noisy latents"):
        load_edit_prior(str(tmp_path))


def test_a_model_with_cameras_is_refused(tmp_path):
    write_multiview_folder(tmp_path)
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 8}))
    with pytest.raises(ValueError, match=r"takes a class vector \(projection\); expected an image"):
        load_edit_prior(str(tmp_path))
