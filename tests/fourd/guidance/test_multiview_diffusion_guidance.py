import pytest
import threestudio
import torch
from threestudio.utils.pretrained import ModelUnavailableError

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.diffusion.camera_vector import camera_vector
from tests.fixtures.embeddings import random_embeddings
from tests.fixtures.model_folders import ldm_multiview_state


def guidance(folder, **keys):
    cls = threestudio.find("multiview-diffusion-guidance")
    return cls({"pretrained_model_name_or_path": str(folder), "guidance_scale": 5.0, **keys})


@pytest.fixture
def prompt():
    return random_embeddings()


def drawn(g, latents_shape):
    """The noise and the timestep that the guidance draws at its current step."""
    return g.draw_noise("mv-noise", latents_shape), g.draw_timesteps("mv-timestep", 8, shared=True)


@torch.no_grad()
def by_hand(g, batch, prompt, scale, group_of=4):
    """Every formula of the guidance again, one object and one half of the guidance at a time."""
    latents = g.encode(batch["rgb"])
    noise, timesteps = drawn(g, latents.shape)
    abar = g.schedule.alphas_cumprod[timesteps[0]]
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    gradients = []
    for start in range(0, 8, group_of):
        rows = slice(start, start + group_of)
        noisy = alpha * latents[rows] + sigma * noise[rows]
        camera = camera_vector(batch["c2w"][rows], batch["fovy"][rows], g.facts.camera_vector)
        cond, uncond = (
            g.unet(
                noisy,
                timesteps[rows],
                encoder_hidden_states=text.expand(group_of, -1, -1),
                class_labels=camera,
            ).sample
            for text in (prompt.text_embeddings, prompt.uncond_text_embeddings)
        )
        guided = uncond + scale * (cond - uncond)

        def clean(prediction):
            if g.schedule.prediction_type == "epsilon":
                return (noisy - sigma * prediction) / alpha  # noqa: B023
            return alpha * noisy - sigma * prediction  # noqa: B023

        if g.cfg.recon_loss:
            phi = g.cfg.recon_std_rescale
            factor = (clean(cond).std() + 1e-8) / (clean(guided).std() + 1e-8)
            target = phi * factor * clean(guided) + (1 - phi) * clean(guided)
            gradients.append(latents[rows] - target)
        else:
            noise_pred = guided
            if g.schedule.prediction_type == "v_prediction":
                noise_pred = sigma * noisy + alpha * guided
            gradients.append((1 - abar) * (noise_pred - noise[rows]))
    return torch.cat(gradients)


@pytest.mark.parametrize("recon_loss", [True, False])
@pytest.mark.parametrize("folder", ["epsilon_folder", "embedded_folder"])
def test_gradient_against_the_formulas(folder, recon_loss, batch, prompt, request):
    g = guidance(request.getfixturevalue(folder), recon_loss=recon_loss)
    g.update_step(0, 11)
    expected = by_hand(g, batch, prompt, scale=5.0)
    latents = g.encode(batch["rgb"])
    noise, timesteps = drawn(g, latents.shape)
    angles = (batch["elevation"], batch["azimuth"], batch["camera_distances"])
    text = prompt.get_text_embeddings(*angles, view_dependent_prompting=False)
    camera = g.camera_vectors(batch["c2w"], batch["fovy"])
    got = g.gradient(latents, noise, timesteps, text, camera)
    # One batched U-Net call against four: fp32 rounding, times the CFG scale and 1 / alpha.
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    out = g(**batch, prompt_utils=prompt)
    loss = 0.5 * expected.square().sum() / 8
    assert out["loss_sds"].item() == pytest.approx(loss.item(), rel=1e-4)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (out["min_step"], out["max_step"]) == (20, 980)


@pytest.mark.parametrize("recon_loss", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_half_that_nobody_reads_is_not_computed(epsilon_folder, batch, prompt, scale, recon_loss):
    g = guidance(epsilon_folder, guidance_scale=scale, recon_loss=recon_loss)
    sizes = []
    hook = g.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    out = g(**batch, prompt_utils=prompt)
    hook.remove()
    # Scale 0 with the rescale still needs the conditional prediction, for its contrast.
    assert sizes == [16 if scale == 0.0 and recon_loss else 8]
    expected = by_hand(g, batch, prompt, scale)
    assert out["loss_sds"].item() == pytest.approx(
        0.5 * expected.square().sum().item() / 8, rel=1e-4
    )


def test_gradient_of_the_image_is_that_of_the_latents_through_the_encoder(
    epsilon_folder, batch, prompt
):
    g = guidance(epsilon_folder)
    rgb = batch["rgb"].requires_grad_()
    g(**batch, prompt_utils=prompt)["loss_sds"].backward()
    again = batch["rgb"].detach().requires_grad_()
    latents = g.encode(again)
    (latents * by_hand(g, batch, prompt, 5.0) / 8).sum().backward()
    torch.testing.assert_close(rgb.grad, again.grad, rtol=1e-3, atol=1e-4)


def test_latents_may_be_given_instead_of_images(epsilon_folder, batch, prompt):
    g = guidance(epsilon_folder)
    latents = g.encode(batch["rgb"]).detach()
    expected = g(**batch, prompt_utils=prompt)["loss_sds"]
    batch["rgb"] = latents.permute(0, 2, 3, 1)
    torch.testing.assert_close(
        g(**batch, prompt_utils=prompt, rgb_as_latents=True)["loss_sds"], expected
    )


def test_same_step_same_bits_whatever_was_done_before(epsilon_folder, batch, prompt):
    def loss_at(g, step):
        g.update_step(0, step)
        return g(**batch, prompt_utils=prompt)["loss_sds"]

    fresh, used = guidance(epsilon_folder), guidance(epsilon_folder)
    loss_at(used, 900)
    at_five = loss_at(used, 5)
    assert torch.equal(at_five, loss_at(used, 5))
    assert torch.equal(at_five, loss_at(fresh, 5))
    assert not torch.equal(at_five, loss_at(fresh, 6))


def test_one_timestep_for_the_step_and_noise_for_each_view(epsilon_folder):
    g = guidance(epsilon_folder, min_step_percent=0.0, max_step_percent=1.0)
    seen = set()
    for step in range(200):
        g.update_step(0, step)
        timesteps = g.draw_timesteps("mv-timestep", 8, shared=True)
        assert (timesteps == timesteps[0]).all()
        assert torch.equal(timesteps[:2], g.draw_timesteps("mv-timestep", 2, shared=True))
        seen.add(timesteps[0].item())
    assert min(seen) < 50 and max(seen) > 950 and max(seen) <= 999
    noise = g.draw_noise("mv-noise", (8, 4, 8, 8))
    assert torch.equal(noise[:4], g.draw_noise("mv-noise", (4, 4, 8, 8)))
    assert not torch.equal(noise[0], noise[1])


def test_schedules_depend_on_the_step_alone(epsilon_folder):
    g = guidance(
        epsilon_folder,
        min_step_percent=[0, 0.98, 0.02, 8000],
        max_step_percent=[0, 0.98, 0.5, 8000],
        guidance_scale=[0, 50.0, 10.0, 100],
        grad_clip=[0, 2.0, 4.0, 100],
    )
    for step, low, high in ((10_000, 20, 500), (0, 980, 980), (4000, 500, 740), (0, 980, 980)):
        g.update_step(0, step)
        assert (g.min_step, g.max_step) == (low, high)
    g.update_step(0, 50)
    assert (g.guidance_scale, g.grad_clip_val) == (30.0, 3.0)


def test_gradients_are_clipped(epsilon_folder, batch, prompt):
    g = guidance(epsilon_folder, grad_clip=0.01)
    out = g(**batch, prompt_utils=prompt)
    count = 8 * 4 * 8 * 8
    assert out["grad_norm"].item() <= 0.01 * count**0.5
    assert out["loss_sds"].item() <= 0.5 * 0.01**2 * count / 8 * 1.001


def test_cameras_are_not_written_to(epsilon_folder, batch, prompt):
    before = batch["c2w"].clone()
    guidance(epsilon_folder)(**batch, prompt_utils=prompt)
    assert torch.equal(batch["c2w"], before)


def test_view_dependent_prompts_are_looked_up_when_asked_for(epsilon_folder, batch, prompt):
    plain = guidance(epsilon_folder)(**batch, prompt_utils=prompt)["loss_sds"]
    worded = guidance(epsilon_folder, view_dependent_prompting=True)(**batch, prompt_utils=prompt)
    assert not torch.equal(plain, worded["loss_sds"])


def test_given_timestep_and_embeddings_replace_the_drawn_ones(epsilon_folder, batch, prompt):
    g = guidance(epsilon_folder)
    text = prompt.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"], False
    )
    drawn_step = g.draw_timesteps("mv-timestep", 1, shared=True).item()
    usual = g(**batch, prompt_utils=prompt)["loss_sds"]
    given = g(**batch, prompt_utils=None, text_embeddings=text, timestep=drawn_step)["loss_sds"]
    assert torch.equal(usual, given)


def test_noise_at_the_end_of_a_zero_snr_schedule_is_finite(embedded_folder, batch, prompt):
    for recon_loss in (True, False):
        g = guidance(
            embedded_folder, recon_loss=recon_loss, min_step_percent=1.0, max_step_percent=1.0
        )
        assert g.min_step == g.max_step == 999
        assert g.alphas_cumprod[999] == 0
        assert torch.isfinite(g(**batch, prompt_utils=prompt)["loss_sds"])


def test_an_original_checkpoint_serves_by_ckpt_path(batch, prompt, tmp_path):
    torch.save(ldm_multiview_state(), tmp_path / "mv.pt")
    cls = threestudio.find("multiview-diffusion-guidance")
    g = cls({"ckpt_path": str(tmp_path / "mv.pt"), "image_size": 16})
    out = g(**batch, prompt_utils=prompt)
    assert torch.isfinite(out["loss_sds"]) and g.guidance_scale == 50.0


def test_channels_last_changes_the_layout_only(epsilon_folder, batch, prompt):
    usual = guidance(epsilon_folder)(**batch, prompt_utils=prompt)["loss_sds"]
    other = guidance(epsilon_folder, enable_channels_last_format=True)
    torch.testing.assert_close(
        other(**batch, prompt_utils=prompt)["loss_sds"], usual, rtol=1e-4, atol=1e-4
    )


def test_weights_are_half_precision_off_the_cpu_only(epsilon_folder):
    g = guidance(epsilon_folder)
    assert g.weights_dtype == torch.float32
    assert g.weights_dtype_for(torch.device("meta")) == torch.float16
    g.cfg.half_precision_weights = False
    assert g.weights_dtype_for(torch.device("meta")) == torch.float32


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"n_view": 2}, "n_view is 2; expected 4, the number of views that the model"),
        ({"camera_condition_type": "mvp"}, "camera_condition_type is 'mvp'; expected 'rotation'"),
        ({"enable_sequential_cpu_offload": True}, "enable_sequential_cpu_offload is true"),
        (
            {"min_step_percent": 0.9, "max_step_percent": 0.5},
            "min_step_percent is 0.9 and max_step_percent 0.5 at step 0",
        ),
        (
            {"pretrained_model_name_or_path": None, "model_name": "sd-v9"},
            "model_name is 'sd-v9'; expected one of sd-v2.1-base-4view",
        ),
    ],
)
def test_keys_that_ask_for_what_is_not_there_are_refused(epsilon_folder, keys, message):
    with pytest.raises(ValueError, match=message):
        threestudio.find("multiview-diffusion-guidance")(
            {"pretrained_model_name_or_path": str(epsilon_folder), **keys}
        )


def test_batches_without_whole_groups_or_fovy_are_refused(embedded_folder, batch, prompt):
    g = guidance(embedded_folder)
    with pytest.raises(ValueError, match="batch holds 6 images; expected a multiple of n_view=4"):
        g(**{k: v[:6] if torch.is_tensor(v) else v for k, v in batch.items()}, prompt_utils=prompt)
    del batch["fovy"]
    with pytest.raises(ValueError, match="'embedded' holds the field of view; expected fovy"):
        g(**batch, prompt_utils=prompt)


def test_mvdream_needs_no_field_of_view(epsilon_folder, batch, prompt):
    g = guidance(epsilon_folder)
    usual = g(**batch, prompt_utils=prompt)["loss_sds"]
    del batch["fovy"]
    assert torch.equal(g(**batch, prompt_utils=prompt)["loss_sds"], usual)


def test_required_models_are_known_without_building():
    cls = threestudio.find("multiview-diffusion-guidance")
    assert cls.required_models({}) == ["ashawkey/mvdream-sd2.1-diffusers"]
    assert cls.required_models({"pretrained_model_name_or_path": "a/b"}) == ["a/b"]
    assert cls.required_models({"ckpt_path": "mv.pt", "pretrained_model_name_or_path": "a/b"}) == [
        "mv.pt"
    ]


def test_a_missing_folder_is_one_sentence(tmp_path):
    with pytest.raises(ModelUnavailableError, match="does not exist; give an existing diffusers"):
        guidance(tmp_path / "nowhere")


def test_published_alias_finds_the_same_class():
    mine = threestudio.find("multiview-diffusion-guidance")
    assert threestudio.find("mvdream-multiview-diffusion-guidance") is mine
