from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel

from custom.fourd.diffusion.samplers import sample_ddim, trailing_timesteps
from tests.fixtures.model_folders import TINY_UNET, camera_unet_keys

ZERO_SNR = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
}


class KnowsTheAnswer(torch.nn.Module):
    """The exact denoiser of data that is one single latent: v = (noisy signal - x0) / noise."""

    def __init__(self, answer, alphas_cumprod):
        super().__init__()
        self.answer = torch.nn.Parameter(answer)
        self.alphas_cumprod = alphas_cumprod
        self.batches = []

    def forward(self, sample, timesteps, encoder_hidden_states, class_labels):
        self.batches.append(len(sample))
        abar = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        velocity = (abar.sqrt() * sample - self.answer) / (1 - abar).sqrt()
        return SimpleNamespace(sample=velocity)


@pytest.fixture(scope="module")
def tiny_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**TINY_UNET, **camera_unet_keys()}).eval()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_trailing_timesteps_are_diffusers_own():
    for steps in (1, 3, 7, 20, 50, 1000):
        scheduler = DDIMScheduler(**ZERO_SNR, timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert trailing_timesteps(1000, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1001])
def test_step_numbers_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}; expected a number from 1 to 1000"):
        trailing_timesteps(1000, steps)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_a_model_that_knows_the_answer_is_followed_exactly(steps):
    scheduler = DDIMScheduler(**ZERO_SNR)
    answer = torch.randn(1, 4, 3, 3, generator=generator(1))
    model = KnowsTheAnswer(answer, scheduler.alphas_cumprod)
    text = torch.zeros(4, 5, 6)
    got = sample_ddim(model, scheduler, text, None, (2, 4, 3, 3), steps, 3.0, generator())
    torch.testing.assert_close(got, answer.expand(2, -1, -1, -1), rtol=1e-4, atol=1e-4)
    assert model.batches == [4] * steps


def test_scale_one_computes_the_conditional_half_only():
    scheduler = DDIMScheduler(**ZERO_SNR)
    model = KnowsTheAnswer(torch.zeros(1, 4, 3, 3), scheduler.alphas_cumprod)
    sample_ddim(model, scheduler, torch.zeros(4, 5, 6), None, (2, 4, 3, 3), 2, 1.0, generator())
    assert model.batches == [2, 2]


@torch.no_grad()
def test_same_latents_as_a_loop_over_diffusers_scheduler(tiny_unet):
    text = torch.randn(4, 7, 24, generator=generator(1))
    camera = torch.randn(2, 16, generator=generator(2))
    got = sample_ddim(
        tiny_unet, DDIMScheduler(**ZERO_SNR), text, camera, (2, 4, 8, 8), 5, 4.0, generator(3)
    )
    scheduler = DDIMScheduler(
        **ZERO_SNR, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(5)
    latents = torch.randn(2, 4, 8, 8, generator=generator(3))
    for step in scheduler.timesteps:
        cond, uncond = (
            tiny_unet(latents, step, encoder_hidden_states=half, class_labels=camera).sample
            for half in text.chunk(2)
        )
        guided = uncond + 4.0 * (cond - uncond)
        latents = scheduler.step(guided, step, latents, eta=0.0).prev_sample
    torch.testing.assert_close(got, latents, rtol=1e-4, atol=1e-4)


def test_same_generator_same_sample_and_rescale_keeps_contrast_down(tiny_unet):
    text = torch.randn(8, 7, 24, generator=generator(1))
    camera = torch.randn(4, 16, generator=generator(2))

    def run(rescale):
        return sample_ddim(
            tiny_unet,
            ZERO_SNR,
            text,
            camera,
            (4, 4, 8, 8),
            3,
            20.0,
            generator(3),
            guidance_rescale=rescale,
            group_size=4,
        )

    assert torch.equal(run(0.0), run(0.0))
    assert run(1.0).std() < 0.8 * run(0.0).std()


@pytest.mark.parametrize(
    "rows, cameras, message",
    [
        (3, None, "text_embeddings holds 3 rows; expected 4"),
        (4, 1, "camera holds 1 rows; expected 2, one per latent"),
    ],
)
def test_batches_that_do_not_fit_are_refused(tiny_unet, rows, cameras, message):
    camera = None if cameras is None else torch.zeros(cameras, 16)
    with pytest.raises(ValueError, match=message):
        sample_ddim(
            tiny_unet, ZERO_SNR, torch.zeros(rows, 7, 24), camera, (2, 4, 8, 8), 2, 3.0, None
        )


def test_each_half_may_have_its_own_camera(tiny_unet):
    g = torch.Generator().manual_seed(3)
    text, camera = torch.randn(4, 7, 24, generator=g), torch.randn(2, 16, generator=g)

    def sample(rows, scale=3.0):
        return sample_ddim(tiny_unet, ZERO_SNR, text, rows, (2, 4, 8, 8), 2, scale, None)

    torch.testing.assert_close(sample(torch.cat((camera, camera))), sample(camera))
    other = sample(torch.cat((camera, -camera)))
    assert not torch.allclose(other, sample(camera))
    alone = sample(torch.cat((camera, -camera)), scale=1.0)
    torch.testing.assert_close(alone, sample(camera, scale=1.0))
