"""The linear autoencoder: principal components, diffusers' interface, quality on the world."""

import math

import pytest
import torch

from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.world.grammar import parse_caption
from custom.fourd.world.render import render


def images_of_rank(rank, count=40, seed=0):
    """Images [n 3 8 8] whose 4 x 4 patches span `rank` directions around a mean."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 48, generator=g)
    scale = torch.linspace(2, 0.5, rank)[:, None]
    codes = torch.randn(count * 4, rank, generator=g)
    patches = codes @ (basis * scale) + torch.randn(48, generator=g)
    patches = patches.view(count, 2, 2, 48).permute(0, 3, 1, 2)
    return torch.nn.functional.pixel_shuffle(patches, 4)


def round_trip_error(vae, images):
    return float((vae(images).sample - images).square().mean())


@pytest.fixture
def fitted():
    vae = PatchAutoencoder(latent_channels=6)
    images = images_of_rank(12)
    vae.fit(images)
    return vae, images


def test_a_round_trip_is_the_projection_on_the_principal_components(fitted):
    vae, images = fitted
    patches = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    mean = patches.mean(dim=0)
    _, _, axes = torch.linalg.svd(patches - mean, full_matrices=False)
    projected = (patches - mean) @ axes[:6].T @ axes[:6] + mean
    ours = torch.nn.functional.pixel_unshuffle(vae(images).sample, 4)
    ours = ours.permute(0, 2, 3, 1).reshape(-1, 48)
    torch.testing.assert_close(ours, projected, atol=1e-4, rtol=1e-4)


def test_the_fit_is_exact_where_it_can_be_and_better_than_other_projections(fitted):
    vae, images = fitted
    best = round_trip_error(vae, images)
    enough = PatchAutoencoder(latent_channels=12)
    enough.fit(images)
    assert round_trip_error(enough, images) < 1e-8 < best
    g = torch.Generator().manual_seed(1)
    rows = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    centred = rows - rows.mean(dim=0)
    for _ in range(5):
        axes, _ = torch.linalg.qr(torch.randn(48, 6, generator=g))
        assert (centred - centred @ axes @ axes.T).square().mean() > best


def test_latents_are_partly_whitened_in_falling_order(fitted):
    """Channel i has zero mean and the deviation gain * std_i ** (1 - power)."""
    vae, images = fitted
    latents = vae.encode(images).latent_dist.mode()
    rows = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    std = torch.linalg.svdvals(rows - rows.mean(dim=0))[:6] / math.sqrt(len(rows))
    torch.testing.assert_close(
        latents.std(dim=(0, 2, 3), correction=0), 0.8 * std**0.4, atol=1e-4, rtol=1e-3
    )
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    # The code of one patch does not see its neighbours.
    changed = images.clone()
    changed[:, :, :4, :4] = 0
    moved = (vae.encode(changed).latent_dist.mode() - latents).abs().amax(dim=(0, 1))
    assert moved[0, 0] > 0.1 and moved[0, 1] == moved[1, 0] == moved[1, 1] == 0


def test_the_fit_is_reproducible(fitted):
    vae, images = fitted
    again = PatchAutoencoder(latent_channels=6)
    again.fit(images)
    for first, second in zip(vae.state_dict().values(), again.state_dict().values()):
        assert torch.equal(first, second)


def test_the_interface_of_diffusers(fitted, tmp_path):
    vae, images = fitted
    posterior = vae.encode(images).latent_dist
    latents = posterior.mode()
    assert latents.shape == (40, 6, 2, 2)
    assert torch.equal(posterior.sample(torch.Generator().manual_seed(0)), latents)
    (as_tuple,) = vae.encode(images, return_dict=False)
    assert torch.equal(as_tuple.mode(), latents)
    decoded = vae.decode(latents, generator=torch.Generator()).sample
    assert torch.equal(vae.decode(latents, return_dict=False)[0], decoded)
    assert torch.equal(vae(images).sample, decoded)
    assert vae.config.scaling_factor == 1.0 and vae.config.patch_size == 4
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = PatchAutoencoder.from_pretrained(tmp_path)
    assert torch.equal(loaded(images).sample, decoded)
    assert loaded.config.latent_channels == 6


def test_gradients_pass_as_through_a_matrix(fitted):
    """The gradient of a linear map is the same everywhere."""
    vae, images = fitted

    def gradient(at):
        at = at.clone().requires_grad_()
        vae.encode(at).latent_dist.mode()[:, 1].sum().backward()
        return at.grad

    torch.testing.assert_close(gradient(images[:2]), gradient(torch.zeros_like(images[:2])))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 x 8 pixels; expected multiples of its patch size 4"):
        PatchAutoencoder().encode(torch.zeros(1, 3, 10, 8))


def test_sixteen_channels_keep_the_world_above_32_db():
    """Fitted on some scenes, measured on others: colours, shapes and materials not seen."""

    def views(captions, size=64):
        c2w = camera_from_orbit(torch.tensor([10.0, 25.0]), torch.tensor([30.0, 160.0]), 3.0)
        fovy = torch.full((2,), math.radians(40))
        rendered = [render(parse_caption(c), c2w, fovy, size, size).rgb for c in captions]
        return torch.cat(rendered).movedim(-1, 1) * 2 - 1

    train = views([
        "a red cube", "a striped blue sphere next to a green cone", "a wooden yellow torus",
        "a metal pink cylinder", "a small purple pyramid on top of a cyan cube",
        "a large orange sphere and a green torus", "a striped red pyramid",
    ])  # fmt: skip
    test = views(["a striped purple cylinder", "a cyan cone on top of a red torus"])
    vae = PatchAutoencoder()
    vae.fit(train)
    error = ((vae(test).sample - test) / 2).square().mean(dim=(1, 2, 3))
    assert (-10 * torch.log10(error)).mean() > 32
