import pytest
import torch
from diffusers import AutoencoderKL
from threestudio.models.guidance.latent_images import (
    decode_latents,
    encode_images,
    encode_renders,
    latent_size,
    resize_images,
)

from tests.fixtures.model_folders import TINY_VAE


@pytest.fixture(scope="module")
def autoencoder():
    torch.manual_seed(0)
    return AutoencoderKL(**TINY_VAE).eval().requires_grad_(False)


def images(seed=0, size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_shrinking_averages_instead_of_skipping():
    # Eight columns to two, the first one bright. The triangle over four columns around 2.0 weighs
    # them 0.625, 0.875, 0.875, 0.625, 0.375, 0.125; without it columns 1 and 2 alone would count.
    bright = torch.zeros(1, 1, 8, 8)
    bright[..., 0] = 1.0
    small = resize_images(bright, (2, 2))
    torch.testing.assert_close(small[0, 0, :, 0], torch.full((2,), 0.625 / 3.5))
    assert (small[..., 1] == 0).all()


def test_same_size_is_untouched():
    picture = images()
    assert resize_images(picture, (16, 16)) is picture


def test_encode_is_scaled_mean_plus_std_times_noise(autoencoder):
    posterior = autoencoder.encode(images() * 2 - 1).latent_dist
    torch.testing.assert_close(encode_images(autoencoder, images()), posterior.mean * 0.18215)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        encode_images(autoencoder, images(), lambda shape: noise.view(shape)),
        (posterior.mean + posterior.std * noise) * 0.18215,
    )


def test_gradient_reaches_the_images_as_finite_differences_say(autoencoder):
    double = AutoencoderKL(**TINY_VAE).double().requires_grad_(False)
    double.load_state_dict(autoencoder.state_dict())
    picture = images(size=4).double().requires_grad_()
    weights = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    (encode_images(double, picture) * weights).sum().backward()
    step = torch.zeros_like(picture)
    step[1, 2, 3, 1] = 1e-2
    with torch.no_grad():
        ahead = (encode_images(double, picture + step) * weights).sum()
        behind = (encode_images(double, picture - step) * weights).sum()
    # encode_images answers in fp32 whatever the model computes in.
    assert picture.grad[1, 2, 3, 1].item() == pytest.approx(
        (ahead - behind).item() / 2e-2, rel=1e-2
    )


def test_renders_are_resized_to_what_the_model_sees_and_latents_to_its_latents(autoencoder):
    large = images(size=32)
    expected = encode_images(autoencoder, resize_images(large, (16, 16)), torch.ones)
    renders = large.permute(0, 2, 3, 1)
    torch.testing.assert_close(encode_renders(autoencoder, renders, 16, torch.ones), expected)
    latents = torch.rand(2, 4, 4, 4)
    grown = encode_renders(autoencoder, latents.permute(0, 2, 3, 1), 16, None, rgb_as_latents=True)
    torch.testing.assert_close(grown, resize_images(latents, (8, 8)))


def test_decode_undoes_the_scaling_and_clamps(autoencoder):
    latents = 5 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    decoded = decode_latents(autoencoder, latents)
    expected = autoencoder.decode(latents / 0.18215).sample * 0.5 + 0.5
    torch.testing.assert_close(decoded, expected.clamp(0, 1))
    assert decoded.min() >= 0 and decoded.max() <= 1


def test_a_deterministic_posterior_draws_nothing():
    from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

    def refuse(shape):
        raise AssertionError("a draw was made")

    patches = PatchAutoencoder(patch_size=4, latent_channels=6)
    assert encode_images(patches, images(), refuse).shape == (2, 6, 4, 4)


def test_latents_of_clips_are_normalised_channel_by_channel_and_back():
    from diffusers import AutoencoderKLWan

    from tests.fixtures.video_models import TINY_WAN_VAE

    torch.manual_seed(0)
    autoencoder = AutoencoderKLWan(**TINY_WAN_VAE).eval().requires_grad_(False)
    clip = torch.rand(1, 3, 5, 16, 16)
    latents = encode_images(autoencoder, clip)
    assert latents.shape == (1, 4, 2, 2, 2)
    z = autoencoder.encode(clip * 2 - 1).latent_dist.mean
    for channel, (mean, std) in enumerate(
        zip(TINY_WAN_VAE["latents_mean"], TINY_WAN_VAE["latents_std"])
    ):
        torch.testing.assert_close(latents[:, channel], (z[:, channel] - mean) / std)
    expected = (autoencoder.decode(z).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode_latents(autoencoder, latents), expected, rtol=1e-4, atol=1e-4)
    assert latent_size(autoencoder, 32) == 4


def test_latent_size(autoencoder):
    from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder

    assert latent_size(autoencoder, 16) == 8
    assert latent_size(PatchAutoencoder(patch_size=4), 64) == 16
