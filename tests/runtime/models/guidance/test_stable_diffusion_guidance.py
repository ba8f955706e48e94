import pytest
import threestudio
import torch

from tests.fixtures.embeddings import random_embeddings


def guidance(folder, **keys):
    cls = threestudio.find("stable-diffusion-guidance")
    defaults = {"pretrained_model_name_or_path": str(folder), "image_size": 16}
    return cls({**defaults, "guidance_scale": 7.0, **keys})


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    return {
        "rgb": torch.rand(3, 12, 12, 3, generator=g),
        "elevation": torch.tensor([0.0, 15.0, 70.0]),
        "azimuth": torch.tensor([10.0, 100.0, 200.0]),
        "camera_distances": torch.full((3,), 2.5),
        "c2w": torch.randn(3, 4, 4, generator=g),
        "fovy": torch.full((3,), 0.7),
        "height": 12,
    }


@pytest.fixture
def prompt():
    return random_embeddings()


@torch.no_grad()
def noises_by_hand(g, batch, prompt):
    """Latents, drawn noise, abar and every text's predicted noise, one image at a time."""
    images = batch["rgb"].permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    posterior = g.vae.encode(images * 2 - 1).latent_dist
    latents = posterior.mean + posterior.std * g.draw_noise("sd-posterior", (3, 4, 8, 8))
    latents = latents * g.vae.config.scaling_factor
    noise = g.draw_noise("sd-noise", (3, 4, 8, 8))
    timesteps = g.draw_timesteps("sd-timestep", 3, shared=False)
    abar = g.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise

    def predict(i, text):
        output = g.unet(noisy[i : i + 1], timesteps[i], encoder_hidden_states=text[None]).sample[0]
        if g.schedule.prediction_type == "epsilon":
            return output
        return (1 - abar[i]).sqrt() * noisy[i] + abar[i].sqrt() * output

    return latents, noise, abar, predict


@pytest.mark.parametrize("folder", ["sd_folder", "v_folder"])
@pytest.mark.parametrize(
    "keys, weight",
    [
        ({}, lambda abar: 1 - abar),
        ({"weighting_strategy": "uniform"}, torch.ones_like),
        ({"weighting_strategy": "fantasia3d"}, lambda abar: abar.sqrt() * (1 - abar)),
        ({"use_sjc": True}, torch.ones_like),
        ({"use_sjc": True, "var_red": False}, torch.ones_like),
    ],
)
def test_gradient_against_the_formula(folder, keys, weight, batch, prompt, request):
    g = guidance(request.getfixturevalue(folder), **keys)
    g.update_step(0, 4)
    latents, noise, abar, predict = noises_by_hand(g, batch, prompt)
    text = prompt.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"]
    )
    cond = torch.stack([predict(i, text[i]) for i in range(3)])
    uncond = torch.stack([predict(i, text[3 + i]) for i in range(3)])
    # threestudio's convention: the scale counts from the conditional prediction.
    guided = cond + 7.0 * (cond - uncond)
    reference = 0 if keys.get("var_red") is False else noise
    expected = weight(abar) * (guided - reference)
    out = g(**batch, prompt_utils=prompt)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert out["loss_sds"].item() == pytest.approx(0.5 * expected.square().sum().item() / 3, 1e-4)
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_gradient_flows_to_the_image(sd_folder, batch, prompt):
    batch["rgb"].requires_grad_()
    guidance(sd_folder)(**batch, prompt_utils=prompt)["loss_sds"].backward()
    assert batch["rgb"].grad.abs().min() >= 0 and batch["rgb"].grad.norm() > 0


def test_perp_neg_against_a_loop(sd_folder, batch, prompt):
    prompt.use_perp_neg = True
    g = guidance(sd_folder)
    latents, noise, abar, predict = noises_by_hand(g, batch, prompt)
    text, weights = prompt.get_text_embeddings_perp_neg(
        batch["elevation"], batch["azimuth"], batch["camera_distances"]
    )
    expected = []
    for i in range(3):
        uncond = predict(i, text[3 + i])
        positive = predict(i, text[i]) - uncond
        total = positive.clone()
        for k in range(2):
            negative = predict(i, text[6 + 2 * i + k]) - uncond
            along = (negative * positive).sum() / (positive * positive).sum()
            total += weights[i, k] * (negative - along * positive)
        expected.append((1 - abar[i]) * (uncond + 7.0 * total - noise[i]))
    out = g(**batch, prompt_utils=prompt)
    norm = torch.stack(expected).norm().item()
    assert out["grad_norm"].item() == pytest.approx(norm, rel=1e-4)


def test_each_image_has_its_own_timestep_whatever_the_batch(sd_folder):
    g = guidance(sd_folder)
    timesteps = g.draw_timesteps("sd-timestep", 8, shared=False)
    assert len(set(timesteps.tolist())) > 4
    assert torch.equal(timesteps[:3], g.draw_timesteps("sd-timestep", 3, shared=False))
    assert timesteps.min() >= 20 and timesteps.max() <= 980


def test_square_root_annealing_is_one_falling_timestep(sd_folder):
    g = guidance(sd_folder, sqrt_anneal=True, trainer_max_steps=400)
    for step, expected in ((0, 980), (100, 500), (400, 20), (9999, 20), (100, 500)):
        g.update_step(0, step)
        assert g.min_step == g.max_step == expected


@torch.no_grad()
def test_image_loss_compares_with_the_decoded_clean_latent(sd_folder, batch, prompt):
    g = guidance(sd_folder, use_img_loss=True)
    latents, noise, abar, predict = noises_by_hand(g, batch, prompt)
    text = prompt.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"]
    )
    cond = torch.stack([predict(i, text[i]) for i in range(3)])
    uncond = torch.stack([predict(i, text[3 + i]) for i in range(3)])
    guided = cond + 7.0 * (cond - uncond)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    clean = (noisy - (1 - abar).sqrt() * guided) / abar.sqrt()
    decoded = (g.vae.decode(clean / g.vae.config.scaling_factor).sample * 0.5 + 0.5).clamp(0, 1)
    images = torch.nn.functional.interpolate(
        batch["rgb"].permute(0, 3, 1, 2), (16, 16), mode="bilinear", antialias=True
    )
    pull = (1 - abar) * (abar / (1 - abar)).sqrt() * (images - decoded)
    out = g(**batch, prompt_utils=prompt)
    assert out["loss_sds_img"].item() == pytest.approx(
        0.5 * pull.square().sum().item() / 3, rel=1e-3
    )


def test_perp_neg_at_the_end_of_a_zero_snr_schedule_is_finite(v_folder, batch, prompt):
    prompt.use_perp_neg = True
    g = guidance(v_folder, use_img_loss=True, min_step_percent=1.0, max_step_percent=1.0)
    out = g(**batch, prompt_utils=prompt)
    assert g.max_step == 999
    assert torch.isfinite(out["loss_sds"]) and torch.isfinite(out["loss_sds_img"])


def test_latents_may_be_given_instead_of_images(sd_folder, batch, prompt):
    g = guidance(sd_folder, use_img_loss=True)
    batch["rgb"] = torch.randn(3, 8, 8, 4)
    out = g(**batch, prompt_utils=prompt, rgb_as_latents=True)
    assert torch.isfinite(out["loss_sds"]) and "loss_sds_img" not in out


def test_a_multiview_model_scores_single_images_given_their_cameras(
    multiview_folder, batch, prompt
):
    import custom.fourd  # noqa: F401 - registers the camera vectors

    g = guidance(multiview_folder, image_size=None)
    assert g.image_size == 16
    together = g(**batch, prompt_utils=prompt)["loss_sds"]
    batch["c2w"] = batch["c2w"].flip(0)
    assert not torch.equal(g(**batch, prompt_utils=prompt)["loss_sds"], together)
    del batch["fovy"]
    with pytest.raises(ValueError, match="reads cameras; expected the batch to hold c2w and fovy"):
        g(**batch, prompt_utils=prompt)


def test_views_of_a_multiview_model_do_not_see_each_other(multiview_folder, batch, prompt):
    import custom.fourd  # noqa: F401

    g = guidance(multiview_folder)
    rgb = batch["rgb"].requires_grad_()
    g(**batch, prompt_utils=prompt)["loss_sds"].backward()
    first = rgb.grad[0].clone()
    changed = batch["rgb"].detach().clone()
    changed[1:] = 0.5
    batch["rgb"] = changed.requires_grad_()
    g(**batch, prompt_utils=prompt)["loss_sds"].backward()
    torch.testing.assert_close(batch["rgb"].grad[0], first, rtol=1e-3, atol=1e-4)


def test_default_size_is_stable_diffusions(sd_folder):
    assert guidance(sd_folder, image_size=None).image_size == 512


def test_token_merging_is_refused(sd_folder):
    with pytest.raises(ValueError, match="token_merging is true; expected false"):
        guidance(sd_folder, token_merging=True)


def test_required_models():
    cls = threestudio.find("stable-diffusion-guidance")
    (required,) = cls.required_models({})
    assert required == "runwayml/stable-diffusion-v1-5"
    assert required.components == ("unet", "vae", "scheduler")
