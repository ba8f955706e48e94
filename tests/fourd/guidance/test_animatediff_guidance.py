import pytest
import threestudio
import torch
from threestudio.models.guidance.latent_images import encode_images
from threestudio.utils.diffusers_folder import load_model
from threestudio.utils.pretrained import ModelUnavailableError

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.guidance.video_guidance import ClipCameras
from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.video_models import (
    MOTION_LENGTH,
    write_motion_adapter,
    write_motion_model_folder,
    write_wan_folder,
)

CLASS = "animatediff-guidance"
CLIPS, FRAMES, SCALE = 2, 3, 5.0
ANGLES = {key: torch.zeros(1) for key in ("elevation", "azimuth", "camera_distances")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("priors") / "sd")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_motion_adapter(tmp_path_factory.mktemp("priors") / "adapter")


@pytest.fixture(scope="module")
def shared(folder, adapter):
    """One guidance for the tests that change nothing of it but the step."""
    return guidance(folder, adapter)


@pytest.fixture
def clips():
    return torch.rand(CLIPS * FRAMES, 6, 6, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text():
    """Two clips with the prompt, then two without it."""
    return torch.randn(2 * CLIPS, 7, 24, generator=torch.Generator().manual_seed(2))


def guidance(folder, adapter, **keys):
    usual = {
        "pretrained_model_name_or_path": str(folder),
        "motion_adapter_name_or_path": str(adapter) if adapter else None,
        "guidance_scale": SCALE,
        "width": 8,
        "height": 8,
    }
    return threestudio.find(CLASS)({**usual, **keys})


def distil(g, clips, text, **keys):
    keys = {"num_frames": FRAMES, "text_embeddings": text, **ANGLES, **keys}
    return g(clips, None, **keys)


def by_hand(g, latents, text, clip):
    """(1 - abar) (eps_hat - eps) of one clip; one call of the network for each text."""
    noise = g.draw_noise("video-noise", tuple(latents.shape))[clip]
    timestep = g.draw_timesteps("video-timestep", CLIPS, shared=False)[clip]
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)
    abar = (1 - betas).cumprod(0)[timestep].float()
    noisy = abar.sqrt() * latents[clip] + (1 - abar).sqrt() * noise
    cond, uncond = (
        g.unet(noisy[None], timestep, encoder_hidden_states=words.repeat(FRAMES, 1, 1)).sample[0]
        for words in (text[clip], text[CLIPS + clip])
    )
    return (1 - abar) * (cond + SCALE * (cond - uncond) - noise)


def test_gradient_of_the_frames_against_the_formulas(shared, clips, text):
    shared.update_step(0, 11)
    again = clips.clone().requires_grad_()
    out = distil(shared, clips.requires_grad_(), text)
    out["loss_sds_video"].backward()
    images = torch.nn.functional.interpolate(again.permute(0, 3, 1, 2), (8, 8), mode="bilinear")
    posterior = shared.draw_noise("video-posterior", (CLIPS, FRAMES, 4, 4, 4)).flatten(0, 1)
    frames = encode_images(shared.vae, images, lambda shape: posterior)
    latents = frames.unflatten(0, (CLIPS, FRAMES)).transpose(1, 2)
    with torch.no_grad():
        expected = torch.stack([by_hand(shared, latents, text, i) for i in range(CLIPS)])
    (latents * expected / CLIPS).sum().backward()
    # One batched call against four, times the scale of the guidance: fp32 rounding.
    torch.testing.assert_close(clips.grad, again.grad, rtol=1e-3, atol=1e-4)
    assert out["loss_sds_video"].item() == pytest.approx(
        0.5 * expected.square().sum().item() / CLIPS, rel=1e-4
    )
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_an_adapter_that_adds_nothing_leaves_stable_diffusion_frame_by_frame(folder, adapter, text):
    g = guidance(folder, adapter)
    trained = load_model(adapter, ".", torch.device("cpu")).up_blocks[0].state_dict()
    joined = g.unet.up_blocks[0].state_dict()
    assert all(torch.equal(joined[name], value) for name, value in trained.items())
    noisy = torch.randn(1, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(3))
    timesteps = torch.tensor([500])

    def predict(clip):
        with torch.no_grad():
            return g.predict(clip, timesteps, text[:1], ClipCameras(None, None, None))

    other = noisy.clone()
    other[:, :, -1] += 1.0
    # Frames see each other through the motion modules ...
    assert not torch.allclose(predict(noisy)[:, :, 0], predict(other)[:, :, 0], atol=1e-3)
    for name, parameter in g.unet.named_parameters():
        if "motion_modules" in name and ".proj_out." in name:
            parameter.zero_()
    # ... and without their output each frame is that of the image model.
    image_unet = load_model(folder, "unet", torch.device("cpu"))
    words = text[:1].expand(FRAMES, -1, -1)
    with torch.no_grad():
        alone = image_unet(noisy[0].transpose(0, 1), 500, encoder_hidden_states=words).sample
    torch.testing.assert_close(predict(noisy)[0].transpose(0, 1), alone, rtol=1e-4, atol=1e-5)


def test_amplification_keeps_the_mean_frame_and_scales_the_motion(shared, clips, text):
    cameras = shared.clip_cameras(CLIPS, FRAMES, None, None, None)
    shared.update_step(0, 0)
    latents = torch.randn(CLIPS, 4, FRAMES, 4, 4, generator=torch.Generator().manual_seed(4))
    inputs = (latents, torch.randn_like(latents), torch.tensor([300, 800]), text, cameras)
    plain = shared.gradient(*inputs)
    shared.cfg.motion_amp_scale = 30.0
    amplified = shared.gradient(*inputs)
    shared.cfg.motion_amp_scale = 1.0
    mean = plain.mean(2, keepdim=True)
    torch.testing.assert_close(amplified, mean + 30 * (plain - mean), rtol=1e-4, atol=1e-3)


def test_same_step_same_bits_whatever_was_done_before(shared, folder, adapter, clips, text):
    fresh = guidance(folder, adapter)
    losses = {}
    for g, step in ((shared, 900), (shared, 5), (fresh, 5), (fresh, 6)):
        g.update_step(0, step)
        losses[id(g), step] = distil(g, clips, text)["loss_sds_video"]
    assert torch.equal(losses[id(shared), 5], losses[id(fresh), 5])
    assert not torch.equal(losses[id(fresh), 5], losses[id(fresh), 6])


def test_an_adapter_beside_the_unet_serves_as_a_named_one_does(shared, clips, text, tmp_path):
    write_stable_diffusion_folder(tmp_path)
    write_motion_adapter(tmp_path / "motion_adapter")
    shared.update_step(0, 0)
    inside = distil(guidance(tmp_path, None), clips, text)["loss_sds_video"]
    assert torch.equal(inside, distil(shared, clips, text)["loss_sds_video"])


def test_a_unet_with_its_own_motion_modules(clips, text, tmp_path, adapter):
    write_motion_model_folder(tmp_path)
    g = guidance(tmp_path, None, enable_channels_last_format=True)
    assert torch.isfinite(distil(g, clips, text)["loss_sds_video"])
    assert not any(p.requires_grad for p in [*g.unet.parameters(), *g.vae.parameters()])
    with pytest.raises(ValueError, match="already holds motion modules; expected one of the two"):
        guidance(tmp_path, adapter)


def test_betas_are_those_of_the_motion_modules(shared, folder, adapter, capfd):
    linear = (1 - torch.linspace(0.00085, 0.012, 1000)).cumprod(0)
    torch.testing.assert_close(shared.alphas_cumprod, linear, rtol=1e-3, atol=1e-5)
    other = guidance(folder, adapter, beta_schedule="scaled_linear")
    assert other.alphas_cumprod[500] > 1.1 * linear[500]
    assert "float32" not in capfd.readouterr().err


def test_clips_longer_than_the_motion_modules_count_are_refused(shared, text):
    clip = torch.rand(MOTION_LENGTH + 1, 8, 8, 3)
    with pytest.raises(ValueError, match="A clip has 7 frames; expected at most 6, the positions"):
        distil(shared, clip, text[::CLIPS], num_frames=None)


def test_models_that_do_not_fit_are_refused(folder, tmp_path, adapter):
    with pytest.raises(ValueError, match="neither motion modules nor a folder motion_adapter"):
        guidance(folder, None)
    wide = write_motion_adapter(tmp_path / "wide", block_out_channels=[16, 16])
    with pytest.raises(ValueError, match=r"has block_out_channels \[16, 16\]; expected \[16, 32\]"):
        guidance(folder, wide)
    deep = write_motion_adapter(tmp_path / "deep", motion_layers_per_block=2)
    with pytest.raises(
        ValueError, match="adapter has layers_per_block 2; expected 1, as the U-Net"
    ):
        guidance(folder, deep)
    v = write_stable_diffusion_folder(tmp_path / "v", prediction_type="v_prediction")
    with pytest.raises(
        ValueError, match=r"predicts 'v_prediction' and ends .*expected 1000, 'epsi"
    ):
        guidance(v, adapter)
    wan = write_wan_folder(tmp_path / "wan")
    with pytest.raises(ModelUnavailableError, match="lacks unet/config.json"):
        guidance(wan, adapter)


def test_a_missing_adapter_is_one_sentence(folder, tmp_path):
    with pytest.raises(ModelUnavailableError, match="does not exist; give an existing diffusers"):
        guidance(folder, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelUnavailableError, match="lacks ./config.json"):
        guidance(folder, tmp_path / "empty")


def test_required_models_are_known_without_building():
    cls = threestudio.find(CLASS)
    model, adapter = cls.required_models({"motion_adapter_revision": "abc"})
    assert (model, adapter.revision) == ("stable-diffusion-v1-5/stable-diffusion-v1-5", "abc")
    assert adapter.components == (".",)
    assert cls.required_models({"motion_adapter_name_or_path": None}) == [model]
