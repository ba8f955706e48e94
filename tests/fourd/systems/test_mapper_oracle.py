"""The oracle's tokens: fitted to their targets, and the frozen model untouched."""

import pytest
import torch

from custom.fourd.mappers.control_sampling import SamplingOptions
from custom.fourd.systems.mapper_oracle import OracleOptions, _fit, oracle_images
from custom.fourd.systems.time_view_mapper_system import TimeViewMapperSystem
from tests.fixtures.controlled_models import adapter_of, pair_of_images, write_controlled_folder


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    folder = write_controlled_folder(tmp_path_factory.mktemp("model"))
    return TimeViewMapperSystem({
        "base_model": str(folder), "mapper": {"hidden": [16]}, "ip_adapter": adapter_of(folder),
    })  # fmt: skip


def loss_of(system, batch, tokens, steps=10):
    """The denoiser's error on the targets, over noise that the fit does not draw."""
    from custom.fourd.diffusion.layer_contexts import unet_arguments
    from custom.fourd.mappers.mapper import MapperOutput

    model = system.model
    prompts = model.prompts([f"a photo of {caption}" for caption in batch["caption"]])
    contexts = model.injection.contexts(prompts, {"<time>": MapperOutput(*tokens)})
    latents = model.prior.encode(batch["target_rgb"])
    g, total = torch.Generator().manual_seed(99), 0.0
    abar = model.prior.schedule.alphas_cumprod
    with torch.no_grad():
        for _ in range(steps):
            noise = torch.randn(latents.shape, generator=g)
            now = torch.randint(1000, (len(latents),), generator=g)
            a = abar[now].view(-1, 1, 1, 1)
            noisy = a.sqrt() * latents + (1 - a).sqrt() * noise
            told = unet_arguments(contexts) | model.image_prompt(batch)
            total += float((model.prior.unet(noisy, now, **told).sample - noise).square().mean())
    return total / steps


def test_fitted_tokens_lower_the_loss_on_noise_that_they_never_saw(system):
    batch = pair_of_images(2)
    texts = [f"a photo of {caption}" for caption in batch["caption"]]
    options = OracleOptions(steps=8, rate=0.2, draws=2)
    start = _fit(system.steering, batch, texts, OracleOptions(steps=0))
    fitted = _fit(system.steering, batch, texts, options)
    assert loss_of(system, batch, fitted) < loss_of(system, batch, start) - 1e-4
    assert all(p.grad is None for p in system.model.prior.unet.parameters())


def test_tokens_start_as_the_super_category(system):
    batch = pair_of_images(1)
    base, bypass = _fit(system.steering, batch, ["a ball"], OracleOptions(steps=0))
    encoder, injection = system.model.injection.encoder, system.model.injection
    word = encoder.embeddings.token_embedding.weight[injection.super_ids["<time>"]]
    assert torch.equal(base, word.expand_as(base)) and float(bypass.detach().norm()) < 1


def test_targets_are_fitted_apart(system):
    """Each target's token depends on no other target, though they are fitted together."""
    batch, options = pair_of_images(2), OracleOptions(steps=2, rate=0.2, draws=1)
    texts = ["a photo of a red cube", "a photo of a ball"]
    together = _fit(system.steering, batch, texts, options)[0]
    other = {**batch, "target_rgb": batch["target_rgb"].clone()}
    other["target_rgb"][1] = 0.0
    apart = _fit(system.steering, other, texts, options)[0]
    torch.testing.assert_close(together[:, 0], apart[:, 0], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(together[:, 1], apart[:, 1], rtol=1e-3, atol=1e-5)


def test_images_come_out_of_an_evaluation_loop(system):
    with torch.inference_mode():
        batch = pair_of_images(2)
        noise = system.steering.noise(batch["cond_rgb"]).expand(2, -1, -1, -1)
        system.steering.sampling = SamplingOptions(steps=1)
        with torch.inference_mode(False), torch.enable_grad():
            images = oracle_images(system.steering, batch, noise, OracleOptions(steps=1, draws=1))
    assert images.shape == (2, 16, 16, 3) and not images.requires_grad
