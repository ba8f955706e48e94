"""SDS on pixels against the formula, one image at a time."""

import pytest
import threestudio
import torch

from tests.fixtures.deep_floyd_folder import TEXT_WIDTH, write_deep_floyd_folder
from tests.fixtures.embeddings import random_embeddings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_deep_floyd_folder(tmp_path_factory.mktemp("priors") / "if")


def guidance(folder, **keys):
    cls = threestudio.find("deep-floyd-guidance")
    return cls({"pretrained_model_name_or_path": str(folder), "guidance_scale": 7.0, **keys})


@pytest.fixture
def batch():
    return {
        "rgb": torch.rand(2, 20, 20, 3, generator=torch.Generator().manual_seed(3)),
        "elevation": torch.tensor([0.0, 70.0]),
        "azimuth": torch.tensor([10.0, 200.0]),
        "camera_distances": torch.full((2,), 2.5),
        "c2w": torch.eye(4).repeat(2, 1, 1),
        "height": 20,
    }


@pytest.fixture
def prompt():
    return random_embeddings(7, TEXT_WIDTH)


@pytest.mark.parametrize("strategy, weight", [
    ("sds", lambda abar: 1 - abar),
    ("uniform", torch.ones_like),
    ("fantasia3d", lambda abar: abar.sqrt() * (1 - abar)),
])  # fmt: skip
@torch.no_grad()
def test_gradient_against_the_formula(folder, batch, prompt, strategy, weight):
    g = guidance(folder, weighting_strategy=strategy)
    g.update_step(0, 4)
    images = torch.nn.functional.interpolate(
        batch["rgb"].permute(0, 3, 1, 2), (16, 16), mode="bilinear", antialias=True
    )
    clean = images * 2 - 1
    noise = g.draw_noise("if-noise", (2, 3, 16, 16))
    timesteps = g.draw_timesteps("if-timestep", 2, shared=False)
    # Cosine schedule: abar(t) is a product of ratios of squared cosines.
    abar = g.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    text = prompt.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"]
    )
    expected = []
    for i in range(2):
        noisy = abar[i].sqrt() * clean[i] + (1 - abar[i]).sqrt() * noise[i]

        def predict(row, noisy=noisy, i=i):
            output = g.unet(noisy[None], timesteps[i], encoder_hidden_states=text[row][None])
            assert output.sample.shape == (1, 6, 16, 16)
            return output.sample[0, :3]

        cond, uncond = predict(i), predict(2 + i)
        expected.append(weight(abar[i]) * (cond + 7.0 * (cond - uncond) - noise[i]))
    expected = torch.stack(expected)
    out = g(**batch, prompt_utils=prompt)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert out["loss_sds"].item() == pytest.approx(0.5 * expected.square().sum().item() / 2, 1e-4)
    assert (out["min_step"], out["max_step"]) == (20, 980) and "eval" not in out


def test_the_schedule_is_the_cosine_one(folder):
    """abar(t) = cos^2((t / 1000 + 0.008) / 1.008 pi / 2), relative to its start."""
    t = torch.tensor([0, 250, 500, 750])
    law = torch.cos(((t + 1) / 1000 + 0.008) / 1.008 * torch.pi / 2).square()
    law = law / torch.cos(torch.tensor(0.008 / 1.008 * torch.pi / 2)).square()
    torch.testing.assert_close(guidance(folder).alphas_cumprod[t], law, rtol=1e-3, atol=1e-5)


def test_gradient_flows_to_the_image_and_perp_neg_is_understood(folder, batch, prompt):
    prompt.use_perp_neg = True
    batch["rgb"].requires_grad_()
    guidance(folder)(**batch, prompt_utils=prompt)["loss_sds"].backward()
    assert batch["rgb"].grad.norm() > 0


def test_pictures_are_pixels(folder, batch, prompt):
    g = guidance(folder, max_items_eval=1, min_step_percent=0.1, max_step_percent=0.1)
    shown = g(**batch, prompt_utils=prompt, guidance_eval=True)["eval"]
    assert shown["bs"] == 1 and shown["imgs_final"].shape == (1, 16, 16, 3)
    assert shown["texts"] == ["n0.10\ne0\na10\nc2.50"]
    for key in ("imgs_noisy", "imgs_1step", "imgs_1orig", "imgs_final"):
        assert 0 <= shown[key].min() and shown[key].max() <= 1


def test_required_models_and_defaults():
    cls = threestudio.find("deep-floyd-guidance")
    (required,) = cls.required_models({})
    assert required == "DeepFloyd/IF-I-XL-v1.0" and required.components == ("unet", "scheduler")
    assert cls.Config.guidance_scale == 20.0 and cls.Config.enable_channels_last_format


def test_latents_are_refused(folder, sd_folder, batch, prompt):
    with pytest.raises(ValueError, match="rgb_as_latents is true; expected false, since DeepFloyd"):
        guidance(folder)(**batch, prompt_utils=prompt, rgb_as_latents=True)
    with pytest.raises(ValueError, match="takes images of 4 channels; expected 3, those of Deep"):
        guidance(sd_folder)
