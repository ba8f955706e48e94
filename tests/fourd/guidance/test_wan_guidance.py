import pytest
import threestudio
import torch
from threestudio.utils.pretrained import ModelUnavailableError

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.video_models import TINY_WAN_VAE, write_wan_folder

CLASS = "wan-guidance"
CLIPS, FRAMES, SCALE = 2, 5, 4.0
ANGLES = {key: torch.zeros(1) for key in ("elevation", "azimuth", "camera_distances")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_wan_folder(tmp_path_factory.mktemp("priors") / "wan")


@pytest.fixture
def clips():
    """Two clips of five frames of 16 x 32 pixels: two latent frames of 2 x 4."""
    return torch.rand(CLIPS * FRAMES, 16, 32, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text():
    """Two clips with the prompt, then two without it."""
    return torch.randn(2 * CLIPS, 6, 24, generator=torch.Generator().manual_seed(2))


def guidance(folder, **keys):
    usual = {
        "pretrained_model_name_or_path": str(folder),
        "guidance_scale": SCALE,
        "width": 32,
        "height": 16,
    }
    return threestudio.find(CLASS)({**usual, **keys})


def distil(g, clips, text, **keys):
    keys = {"num_frames": FRAMES, "text_embeddings": text, **ANGLES, **keys}
    return g(clips, None, **keys)


def encode_by_hand(g, clips):
    """The posterior's mean of each clip, channel by channel (z - mean) / std."""
    latents = []
    for clip in clips.split(FRAMES):
        images = clip.permute(3, 0, 1, 2)[None] * 2 - 1
        z = g.vae.encode(images).latent_dist.mean[0]
        statistics = zip(z, TINY_WAN_VAE["latents_mean"], TINY_WAN_VAE["latents_std"])
        latents.append(torch.stack([(channel - mean) / std for channel, mean, std in statistics]))
    return torch.stack(latents)


def velocities(g, latents, text):
    """Yield (s, noise, noisy latents, guided velocity) of each clip; one text at a time."""
    noise = g.draw_noise("video-noise", tuple(latents.shape))
    for clip, timestep in enumerate(g.draw_timesteps("video-timestep", CLIPS, shared=False)):
        s = timestep / 1000
        noisy = (1 - s) * latents[clip] + s * noise[clip]
        cond, uncond = (
            g.transformer(noisy[None], timestep[None], words[None]).sample[0]
            for words in (text[clip], text[CLIPS + clip])
        )
        yield s, noise[clip], noisy, uncond + SCALE * (cond - uncond)


def forms_by_hand(g, latents, text):
    """The gradient in its three forms, by the two models' identities of the noise and the clip."""
    forms = {"uniform": [], "epsilon": [], "reconstruction": []}
    for clip, (s, noise, noisy, v) in zip(latents, velocities(g, latents, text)):
        forms["uniform"].append(v - (noise - clip))
        forms["epsilon"].append((noisy + (1 - s) * v) - noise)
        forms["reconstruction"].append(clip - (noisy - s * v))
    return {name: torch.stack(rows) for name, rows in forms.items()}


@pytest.mark.parametrize("strategy", ["uniform", "epsilon", "reconstruction"])
def test_gradient_of_the_frames_against_the_formulas(folder, clips, text, strategy):
    g = guidance(folder, weighting_strategy=strategy)
    g.update_step(0, 11)
    again = clips.clone().requires_grad_()
    out = distil(g, clips.requires_grad_(), text)
    out["loss_sds_video"].backward()
    latents = encode_by_hand(g, again)
    assert latents.shape == (CLIPS, 4, 2, 2, 4)
    with torch.no_grad():
        expected = forms_by_hand(g, latents, text)[strategy]
    (latents * expected / CLIPS).sum().backward()
    # Batched calls against single ones, times the scale of the guidance: fp32 rounding.
    torch.testing.assert_close(clips.grad, again.grad, rtol=1e-3, atol=1e-5)
    assert out["loss_sds_video"].item() == pytest.approx(
        0.5 * expected.square().sum().item() / CLIPS, rel=1e-4
    )
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)


def test_reconstruction_of_the_clean_latents_is_weight_s(folder, clips, text):
    weighted = distil(guidance(folder, weighting_strategy="reconstruction"), clips, text)
    rebuilt = distil(guidance(folder, recon_loss=True), clips, text)
    torch.testing.assert_close(rebuilt["loss_sds_video"], weighted["loss_sds_video"])


def test_gradients_pass_through_the_whole_causal_encoder(folder, clips):
    g = guidance(folder)
    clip = clips[:FRAMES].requires_grad_()
    latents = g.encode_clips(clip, FRAMES)

    def frames_that_matter(latent_frame):
        (gradient,) = torch.autograd.grad(
            latents[:, :, latent_frame].sum(), clip, retain_graph=True
        )
        return (gradient.flatten(1).norm(dim=1) > 0).tolist()

    assert frames_that_matter(0) == [True, False, False, False, False]
    assert frames_that_matter(1) == [True] * FRAMES


def test_motion_is_amplified_between_latent_frames(folder, clips, text):
    plain = guidance(folder)
    latents = plain.encode_clips(clips, FRAMES)
    inputs = (latents, torch.randn_like(latents), torch.tensor([300.0, 800.0]), text)
    cameras = plain.clip_cameras(CLIPS, FRAMES, None, None, None)
    gradient = plain.gradient(*inputs, cameras)
    mean = gradient.mean(2, keepdim=True)
    amplified = guidance(folder, motion_amp_scale=10.0).gradient(*inputs, cameras)
    torch.testing.assert_close(amplified, mean + 10 * (gradient - mean), rtol=1e-4, atol=1e-4)


def test_noise_levels_are_shifted_and_told_times_a_thousand(folder, clips, text):
    plain, own = guidance(folder), guidance(folder, shift=None)
    assert (plain.shift, own.shift) == (1.0, 3.0)
    u = plain.draw_timesteps("video-timestep", CLIPS, shared=False) / 1000
    shifted = own.draw_timesteps("video-timestep", CLIPS, shared=False)
    torch.testing.assert_close(shifted, 1000 * 3 * u / (1 + 2 * u))
    told = []
    own.transformer.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    distil(own, clips, text)
    assert torch.equal(told[0], shifted.repeat(2))
    distil(own, clips, text, timestep=250)
    assert told[1].tolist() == [250] * 4
    signal, noise = own.scales(torch.tensor([250]))
    assert (signal.item(), noise.item()) == (0.75, 0.25)


def test_range_of_noise_levels_and_same_bits(folder, clips, text):
    keys = {"min_step_percent": 0.3, "max_step_percent": [0, 0.9, 0.4, 100]}
    g, used = guidance(folder, **keys), guidance(folder, **keys)
    used.update_step(0, 100)
    assert (used.min_step, used.max_step) == (300, 400)
    drawn = torch.cat([g.draw_timesteps(f"role {i}", 4, shared=False) for i in range(50)])
    assert 300 <= drawn.min() < 330 and 870 < drawn.max() <= 900
    used.update_step(0, 0)
    losses = [distil(x, clips, text)["loss_sds_video"] for x in (g, used)]
    assert torch.equal(*losses)


def test_latents_may_be_given_instead_of_frames(folder, clips, text):
    g = guidance(folder)
    latents = g.encode_clips(clips, FRAMES).detach()
    usual = distil(g, clips, text)["loss_sds_video"]
    rows = latents.transpose(1, 2).flatten(0, 1).permute(0, 2, 3, 1)
    given = distil(g, rows, text, num_frames=2, rgb_as_latents=True)["loss_sds_video"]
    torch.testing.assert_close(given, usual)


def test_half_precision_is_bf16_off_the_cpu(folder):
    g = guidance(folder)
    assert g.weights_dtype == torch.float32
    assert g.weights_dtype_for(torch.device("meta")) == torch.bfloat16


@pytest.mark.parametrize("frames, near", [(4, "1 or 5"), (16, "13 or 17")])
def test_clips_of_other_lengths_are_refused(folder, text, frames, near):
    message = rf"A clip has {frames} frames; expected 4 k \+ 1, .*num_frames to {near}\."
    with pytest.raises(ValueError, match=message):
        distil(guidance(folder), torch.rand(frames, 16, 32, 3), text[::CLIPS], num_frames=frames)


def test_words_of_another_model_are_refused(folder, clips, text):
    with pytest.raises(
        ValueError, match="12 wide; expected 24. Set prompt_processor_type_video: w"
    ):
        distil(guidance(folder), clips, text[..., :12])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"weighting_strategy": "sds"}, "weighting_strategy is 'sds'; expected one of 'uniform'"),
        ({"low_ram_vae": 4}, "low_ram_vae is 4; expected -1, since wan-guidance has no such form"),
        ({"use_sjc": True}, "use_sjc is True; expected false, since wan-guidance has no such form"),
        ({"shift": 0.0}, "shift is 0.0; expected a positive number, or null"),
        ({"width": 24}, "width is 24 and height 16; expected multiples of 16 and 16"),
    ],
)
def test_keys_that_ask_for_what_is_not_there_are_refused(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        guidance(folder, **keys)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"prediction_type": "epsilon"}, "prediction_type 'epsilon'; expected a flow-matching one"),
        ({"index": {"boundary_ratio": 0.875}}, "Wan 2.2 with two transformers or a timestep per"),
        ({"index": {"expand_timesteps": True}}, "Wan 2.2 with two transformers or a timestep per"),
        ({"transformer": {"in_channels": 8}}, "reads 8 channels and its autoencoder gives 4; expe"),
    ],
)
def test_models_that_do_not_serve_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        guidance(write_wan_folder(tmp_path, **changes))


def test_models_that_are_not_there_or_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ModelUnavailableError, match="does not exist; give an existing diffusers"):
        guidance(tmp_path / "nowhere")
    sd = write_stable_diffusion_folder(tmp_path / "sd")
    with pytest.raises(ModelUnavailableError, match="lacks transformer/config.json"):
        guidance(sd)
    (sd / "unet").rename(sd / "transformer")
    with pytest.raises(
        ValueError, match="holds a UNet2DConditionModel and a AutoencoderKL; expect"
    ):
        guidance(sd)


def test_required_models_are_known_without_building():
    (model,) = threestudio.find(CLASS).required_models({"revision": "abc"})
    assert (model, model.revision) == ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "abc")
    assert model.components == ("transformer", "vae", "scheduler")
