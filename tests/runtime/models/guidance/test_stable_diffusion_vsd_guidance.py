from itertools import pairwise

import pytest
import threestudio
import torch
from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint

from tests.fixtures.embeddings import random_embeddings
from tests.fixtures.model_folders import write_stable_diffusion_folder


@pytest.fixture(scope="session")
def velocity_folder(tmp_path_factory):
    """A tiny model of the same family with other weights that predicts velocities."""
    return write_stable_diffusion_folder(
        tmp_path_factory.mktemp("priors") / "velocity", prediction_type="v_prediction", seed=40
    )


def guidance(folder, second=None, **keys):
    cls = threestudio.find("stable-diffusion-vsd-guidance")
    models = {
        "pretrained_model_name_or_path": str(folder),
        "pretrained_model_name_or_path_lora": str(second or folder),
    }
    return cls({**models, "image_size": 16, **keys})


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(3)
    return {
        "rgb": torch.rand(2, 12, 12, 3, generator=g),
        "elevation": torch.tensor([0.0, 15.0]),
        "azimuth": torch.tensor([10.0, 200.0]),
        "camera_distances": torch.full((2,), 2.5),
        "c2w": torch.randn(2, 4, 4, generator=g),
        "mvp_mtx": torch.randn(2, 4, 4, generator=g),
        "fovy": torch.full((2,), 0.7),
        "height": 12,
    }


@pytest.fixture
def prompt():
    return random_embeddings()


def make_it_learned(g):
    stream = torch.Generator().manual_seed(8)
    for p in g.parameters():
        p.data.normal_(std=0.2, generator=stream)
    return g


@torch.no_grad()
def noisy_by_hand(g, batch):
    """Return the latents, their timesteps, abar and the noisy latents of a step."""
    images = batch["rgb"].permute(0, 3, 1, 2)
    images = torch.nn.functional.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    posterior = g.vae.encode(images * 2 - 1).latent_dist
    latents = posterior.mean + posterior.std * g.draw_noise("vsd-posterior", (2, 4, 8, 8))
    latents = latents * g.vae.config.scaling_factor
    timesteps = g.draw_timesteps("vsd-timestep", 2, shared=False)
    abar = g.schedule.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noise = g.draw_noise("vsd-noise", (2, 4, 8, 8))
    return timesteps, abar, abar.sqrt() * latents + (1 - abar).sqrt() * noise


@torch.no_grad()
def expected_gradient(g, batch, prompt, labels=None, scale=7.5):
    """(1 - abar) (eps_prior - eps_second), the two U-Nets called one image and text at a time.

    ``labels`` turns an image's row into what the second U-Net takes as its class.
    """
    timesteps, abar, noisy = noisy_by_hand(g, batch)
    text = prompt.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"]
    )
    rows = []
    for i in range(2):
        one = (noisy[i:i + 1], timesteps[i])
        cond, uncond = (
            g.unet(*one, encoder_hidden_states=text[row:row + 1]).sample[0] for row in (i, 2 + i)
        )
        prior = uncond + scale * (cond - uncond)
        class_of = {} if labels is None else {"class_labels": labels(i)}
        velocity = g.unet_lora(
            *one, encoder_hidden_states=prompt.text_embeddings, **class_of
        ).sample[0]
        second = (1 - abar[i]).sqrt() * noisy[i] + abar[i].sqrt() * velocity
        rows.append((1 - abar[i]) * (prior - second))
    return torch.stack(rows)


def check(out, expected):
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert out["loss_vsd"].item() == pytest.approx(0.5 * expected.square().sum().item() / 2, 1e-4)


def test_gradient_against_the_formula(sd_folder, velocity_folder, batch, prompt):
    g = make_it_learned(guidance(sd_folder, velocity_folder))
    g.update_step(0, 4)
    out = g(**batch, prompt_utils=prompt)
    check(out, expected_gradient(g, batch, prompt,
                                 lambda i: (None, batch["c2w"][i].reshape(1, 16))))
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_frozen_second_score_against_the_formula(sd_folder, velocity_folder, batch, prompt):
    g = guidance(sd_folder, velocity_folder, second_score="frozen")
    out = g(**batch, prompt_utils=prompt)
    check(out, expected_gradient(g, batch, prompt))
    assert "loss_lora" not in out
    assert not list(g.parameters()) and not g.state_dict() and g.trainable_parameters() == {}


def test_same_frozen_model_without_view_words_is_classifier_score_distillation(
    sd_folder, batch, prompt
):
    g = guidance(sd_folder, second_score="frozen", view_dependent_prompting=False)
    assert g.unet is g.unet_lora
    timesteps, abar, noisy = noisy_by_hand(g, batch)
    with torch.no_grad():
        cond, uncond = (
            g.unet(noisy, timesteps, encoder_hidden_states=text.expand(2, -1, -1)).sample
            for text in (prompt.text_embeddings, prompt.uncond_text_embeddings)
        )
    check(g(**batch, prompt_utils=prompt), 6.5 * (1 - abar) * (cond - uncond))


def test_an_untrained_lora_changes_nothing(sd_folder, velocity_folder, batch, prompt):
    losses = [
        guidance(sd_folder, velocity_folder, second_score=kind)(**batch, prompt_utils=prompt)
        for kind in ("trained", "frozen")
    ]
    assert torch.equal(losses[0]["loss_vsd"], losses[1]["loss_vsd"])


@pytest.mark.parametrize("kind, row", [
    ("mvp", lambda batch, i: batch["mvp_mtx"][i].reshape(1, 16)),
    ("spherical", lambda batch, i: torch.stack([
        torch.deg2rad(batch["elevation"][i]), torch.deg2rad(batch["azimuth"][i]).sin(),
        torch.deg2rad(batch["azimuth"][i]).cos(), batch["camera_distances"][i]])[None]),
])
def test_other_camera_conditions(kind, row, sd_folder, velocity_folder, batch, prompt):
    g = make_it_learned(guidance(sd_folder, velocity_folder, camera_condition_type=kind))
    out = g(**batch, prompt_utils=prompt)
    check(out, expected_gradient(g, batch, prompt, lambda i: (None, row(batch, i))))


def test_each_loss_has_its_own_gradients(sd_folder, velocity_folder, batch, prompt):
    g = make_it_learned(guidance(sd_folder, velocity_folder))
    rgb = batch["rgb"].requires_grad_()
    out = g(**batch, prompt_utils=prompt)
    out["loss_lora"].backward()
    assert rgb.grad is None
    grads = {name: p.grad for name, p in g.named_parameters()}
    assert all(grad is not None and grad.norm() > 0 for grad in grads.values())
    g.zero_grad()
    out["loss_vsd"].backward()
    assert rgb.grad.norm() > 0 and all(p.grad is None for p in g.parameters())
    frozen = [*g.unet.parameters(), *g.vae.parameters()]
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_lora_loss_against_the_formula(kind, sd_folder, velocity_folder, batch, prompt):
    g = make_it_learned(guidance(sd_folder if kind == "epsilon" else velocity_folder,
                                 lora_n_timestamp_samples=3, lora_cfg_training=False))
    latents, camera = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    text = prompt.text_embeddings.expand(2, -1, -1)
    actual = g.lora_loss(latents, text, None, camera)
    noise = g.draw_noise("vsd-lora-noise", (6, 4, 8, 8))
    shares = threestudio.utils.rng.rand_items((6,), "vsd-lora-timestep", 0)
    errors = []
    for row in range(6):
        timestep = (shares[row] * 1000).long()
        abar, clean = g.schedule.alphas_cumprod[timestep], latents[row // 3]
        noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise[row]
        target = noise[row]
        if kind == "v_prediction":
            target = abar.sqrt() * noise[row] - (1 - abar).sqrt() * clean
        with torch.no_grad():
            output = g.unet_lora(noisy[None], timestep, encoder_hidden_states=text[:1],
                                 class_labels=(None, camera[row // 3][None])).sample[0]
        errors.append((output - target).square().mean())
    assert actual.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-4)


def test_cameras_are_hidden_in_a_tenth_of_the_steps(sd_folder, prompt):
    g = make_it_learned(guidance(sd_folder))
    hidden = []
    for step in range(400):
        g._step = step
        hidden.append(g._hides_cameras())
    assert 20 < sum(hidden) < 65
    text, latents = prompt.text_embeddings, torch.randn(1, 4, 8, 8)
    for step in (hidden.index(True), hidden.index(False)):
        g._step = step
        losses = [g.lora_loss(latents, text, None, camera).item()
                  for camera in (torch.ones(1, 16), torch.zeros(1, 16))]
        assert (losses[0] == losses[1]) is hidden[step]
    g.cfg.lora_cfg_training = False
    g._step = hidden.index(True)
    assert g.lora_loss(latents, text, None, torch.ones(1, 16)).item() != losses[0]


def test_the_lora_learns_fixed_latents(sd_folder, prompt):
    g = guidance(sd_folder, lora_n_timestamp_samples=8)
    latents, camera = torch.zeros(1, 4, 8, 8), torch.randn(1, 16)
    optimizer = torch.optim.AdamW(g.trainable_parameters().values(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = g.lora_loss(latents, prompt.text_embeddings, None, camera)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert sum(later < earlier for earlier, later in pairwise(losses)) >= 10


def test_state_is_what_was_trained_and_comes_back_equal(
    sd_folder, velocity_folder, batch, prompt, tmp_path
):
    g = make_it_learned(guidance(sd_folder, velocity_folder))
    state = g.state_dict()
    assert {key.partition(".")[0] for key in state} == {"lora_layers", "camera_embedding"}
    assert set(state) == set(g.trainable_parameters())
    assert sum(p.numel() for p in state.values()) < 0.15 * sum(
        p.numel() for p in g.unet.parameters()
    )
    save_checkpoint(tmp_path / "a.ckpt", {"state_dict": state})
    other = guidance(sd_folder, velocity_folder)
    fresh = other(**batch, prompt_utils=prompt)
    other.load_state_dict(load_checkpoint(tmp_path / "a.ckpt")["state_dict"])
    expected, actual = (x(**batch, prompt_utils=prompt) for x in (g, other))
    for key in ("loss_vsd", "loss_lora", "grad_norm"):
        assert torch.equal(actual[key], expected[key]) and not torch.equal(fresh[key], actual[key])


def test_a_system_stores_trains_and_hands_on_the_lora(sd_folder, tmp_path):
    from threestudio.systems.base import BaseSystem
    from threestudio.systems.utils import parse_optimizer

    class System(BaseSystem):
        strict_optimizer_groups = True
        late_modules = ("guidance_single_view",)

        def configure(self):
            self.scene = torch.nn.Linear(1, 1)

        def build(self):
            self.guidance = object()
            self.guidance_single_view = guidance(sd_folder)
            self.load_late_weights()
            return self

    first = System({}).build()
    make_it_learned(first.guidance_single_view)
    checkpoint = {"state_dict": first.state_dict(), "global_step": 10_000}
    first.on_save_checkpoint(checkpoint)
    roots = {".".join(key.split(".")[:2]) for key in checkpoint["state_dict"]}
    assert roots == {"scene.weight", "scene.bias", "guidance_single_view.lora_layers",
                     "guidance_single_view.camera_embedding"}
    save_checkpoint(tmp_path / "a.ckpt", checkpoint)
    second = System({"weights": str(tmp_path / "a.ckpt")}).build()
    for key, value in second.state_dict().items():
        assert torch.equal(value, checkpoint["state_dict"][key])
    assert second.guidance_single_view.max_step == 980
    groups = {"scene": {"lr": 0.1}, "guidance_single_view": {"lr": 1e-4}}
    optimizer = parse_optimizer({"name": "AdamW", "params": groups}, second)
    assert len(optimizer.param_groups[1]["params"]) == len(second.guidance_single_view.state_dict())
    with pytest.raises(ValueError, match=r"guidance_single_view\.lora_layers.* in no group"):
        parse_optimizer({"name": "AdamW", "params": {"scene": {}}}, second)
    with pytest.raises(ValueError, match="the guidance that trains is 'guidance_single_view'"):
        parse_optimizer({"name": "AdamW", "params": {"scene": {}, "guidance": {}}}, second)


def test_schedules_are_functions_of_the_step_alone(sd_folder):
    g = guidance(sd_folder, guidance_scale_lora=[1.0, 3.0, 100])
    for step, highest, scale in ((0, 980, 1.0), (10_000, 500, 3.0), (5000, 980, 3.0),
                                 (5001, 500, 3.0), (50, 980, 2.0)):
        g.update_step(0, step)
        assert (g.min_step, g.max_step, g.guidance_scale_lora) == (20, highest, scale)
    g = guidance(sd_folder, anneal_start_step=None)
    g.update_step(0, 10_000)
    assert g.max_step == 980


def test_draws_depend_on_the_step_alone(sd_folder, batch, prompt):
    g, twin = guidance(sd_folder), guidance(sd_folder)
    torch.manual_seed(1)
    first = g(**batch, prompt_utils=prompt)
    torch.manual_seed(2)
    for step in (7, 0):
        twin.update_step(0, step)
        again = twin(**batch, prompt_utils=prompt)
        assert torch.equal(again["loss_vsd"], first["loss_vsd"]) is (step == 0)
        assert torch.equal(again["loss_lora"], first["loss_lora"]) is (step == 0)


def test_latents_may_be_given_instead_of_images(sd_folder, batch, prompt):
    batch["rgb"] = torch.randn(2, 8, 8, 4)
    out = guidance(sd_folder)(**batch, prompt_utils=prompt, rgb_as_latents=True)
    assert out["loss_vsd"].isfinite() and out["loss_lora"].isfinite()


def test_the_embedded_model_serves_as_both_sides(batch):
    import custom.fourd  # noqa: F401 - brings the embedded models

    g = guidance("embedded://multiview", image_size=None)
    assert g.image_size == 64
    prompt = random_embeddings(77, g.unet.config.cross_attention_dim)
    rgb = batch["rgb"].requires_grad_()
    out = g(**batch, prompt_utils=prompt)
    (out["loss_vsd"] + out["loss_lora"]).backward()
    assert rgb.grad.norm() > 0
    assert g.camera_embedding.linear_2.weight.grad.norm() > 0
    seeing = guidance("embedded://multiview", image_size=None, prior_sees_cameras=True)
    assert not torch.equal(seeing(**batch, prompt_utils=prompt)["loss_vsd"], out["loss_vsd"])
    del batch["fovy"]
    with pytest.raises(ValueError, match="prior_sees_cameras is true; expected the batch to hold"):
        seeing(**batch, prompt_utils=prompt)


@pytest.mark.parametrize("keys, sentence", [
    ({"second_score": "none"}, "second_score is 'none'; expected one of 'trained', 'frozen'"),
    ({"camera_condition_type": "pose"}, "camera_condition_type is 'pose'; expected one of 'ext"),
    ({"lora_n_timestamp_samples": 0}, "lora_n_timestamp_samples is 0; expected 1 or more"),
    ({"enable_sequential_cpu_offload": True}, "enable_sequential_cpu_offload is true"),
])
def test_bad_keys(keys, sentence, sd_folder):
    with pytest.raises(ValueError, match=sentence):
        guidance(sd_folder, **keys)


def test_models_that_do_not_go_together(sd_folder, v_folder, tmp_path):
    with pytest.raises(ValueError, match="different noise schedules; expected the same betas"):
        guidance(sd_folder, v_folder)
    other = write_stable_diffusion_folder(tmp_path / "other", unet={"cross_attention_dim": 16})
    with pytest.raises(ValueError, match="have cross_attention_dim 24 and 16; expected equal"):
        guidance(sd_folder, other)


def test_perp_neg_is_refused(sd_folder, batch, prompt):
    prompt.use_perp_neg = True
    with pytest.raises(ValueError, match="use_perp_neg is true; expected false"):
        guidance(sd_folder)(**batch, prompt_utils=prompt)


def test_required_models():
    cls = threestudio.find("stable-diffusion-vsd-guidance")
    prior, second = cls.required_models({"revision_lora": "abc"})
    assert prior == "stabilityai/stable-diffusion-2-1-base"
    assert prior.components == ("unet", "vae", "scheduler")
    assert second == "stabilityai/stable-diffusion-2-1" and second.revision == "abc"
    assert second.components == ("unet", "scheduler")
