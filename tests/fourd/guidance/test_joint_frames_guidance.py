import pytest
import threestudio
import torch
from threestudio.utils.pretrained import ModelUnavailableError

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.diffusion.camera_vector import video_class_vector
from custom.fourd.diffusion.cross_view_attention import set_cross_view_attention
from tests.fixtures.video_folders import write_joint_frames_folder

FRAMES = 3
TEXT = torch.randn(4, 7, 24, generator=torch.Generator().manual_seed(5))
"""Two clips' prompts, then their negative prompts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny embedded prior: frames of 16 x 16 pixels, at most four of them."""
    return write_joint_frames_folder(tmp_path_factory.mktemp("priors") / "video")


def guidance(folder, **keys):
    cls = threestudio.find("joint-frames-guidance")
    return cls({"pretrained_model_name_or_path": str(folder), "guidance_scale": 3.0, **keys})


@pytest.fixture
def batch():
    """Two clips of three frames, each seen by a camera of its own."""
    g = torch.Generator().manual_seed(3)
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[:, :3, 3] = torch.randn(2, 3, generator=g)
    return {
        "rgb": torch.rand(2 * FRAMES, 8, 8, 3, generator=g),
        "prompt_utils": None,
        "text_embeddings": TEXT,
        "elevation": torch.zeros(2 * FRAMES),
        "azimuth": torch.zeros(2 * FRAMES),
        "camera_distances": torch.ones(2 * FRAMES),
        "c2w": c2w.repeat_interleave(FRAMES, 0),
        "fovy": torch.tensor([0.5, 0.8]).repeat_interleave(FRAMES),
        "frame_times": torch.tensor([0.1, 0.4, 0.8]).repeat(2),
        "num_frames": FRAMES,
    }


@torch.no_grad()
def by_hand(g, batch, scale):
    """Every formula again, one clip and one half of the guidance at a time."""
    latents = g.encode_frames_of(batch)
    noise = g.draw_noise("video-noise", tuple(latents.shape))
    timesteps = g.draw_timesteps("video-timestep", 2, shared=False)
    set_cross_view_attention(g.unet, FRAMES)
    gradients = []
    for clip in range(2):
        rows = slice(clip * FRAMES, (clip + 1) * FRAMES)
        abar = g.schedule.alphas_cumprod[timesteps[clip]]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        frames = latents[clip].transpose(0, 1)
        noisy = alpha * frames + sigma * noise[clip].transpose(0, 1)
        cameras = (batch["c2w"][rows], batch["fovy"][rows], batch["frame_times"][rows])
        cond, uncond = (
            g.unet(
                noisy,
                timesteps[clip].expand(FRAMES),
                encoder_hidden_states=text,
                class_labels=video_class_vector(*cameras, text),
            ).sample
            for text in (TEXT[row].expand(FRAMES, -1, -1) for row in (clip, 2 + clip))
        )
        guided = uncond + scale * (cond - uncond)
        clean, clean_cond = (alpha * noisy - sigma * v for v in (guided, cond))
        if g.cfg.recon_loss:
            phi = g.cfg.recon_std_rescale
            gradient = frames - (phi * clean_cond.std() / clean.std() + 1 - phi) * clean
        else:
            noise_pred = sigma * noisy + alpha * guided
            gradient = (1 - abar) * (noise_pred - noise[clip].transpose(0, 1))
        gradients.append(gradient.transpose(0, 1))
    return torch.stack(gradients)


@pytest.mark.parametrize("recon_loss", [True, False])
def test_gradient_against_the_formulas(folder, batch, recon_loss):
    g = guidance(folder, recon_loss=recon_loss)
    g.encode_frames_of = lambda batch: g.encode_clips(batch["rgb"], FRAMES)
    g.update_step(0, 11)
    expected = by_hand(g, batch, 3.0)
    rgb = batch["rgb"].requires_grad_()
    out = g(**batch)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    loss = 0.5 * expected.square().sum().item() / 2
    assert out["loss_sds_video"].item() == pytest.approx(loss, rel=1e-4)
    out["loss_sds_video"].backward()
    again = batch["rgb"].detach().requires_grad_()
    (g.encode_clips(again, FRAMES) * expected / 2).sum().backward()
    torch.testing.assert_close(rgb.grad, again.grad, rtol=1e-3, atol=1e-4)


def test_frames_of_a_clip_see_each_other_and_those_of_others_do_not(folder, batch):
    g = guidance(folder)
    cameras = g.clip_cameras(2, FRAMES, batch["c2w"], batch["fovy"], batch["frame_times"])
    noisy = torch.randn(2, 4, FRAMES, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([500, 500])
    usual = g.predict(noisy, timesteps, TEXT[:2], cameras)
    other = noisy.clone()
    other[0, :, 2] += 1.0
    changed = g.predict(other, timesteps, TEXT[:2], cameras)
    assert (changed[0, :, 0] - usual[0, :, 0]).abs().max() > 1e-4
    torch.testing.assert_close(changed[1], usual[1])


@pytest.mark.parametrize("name", ["c2w", "fovy", "frame_times"])
def test_the_model_is_told_camera_and_time_of_each_frame(folder, batch, name):
    g = guidance(folder)
    usual = g(**batch)["loss_sds_video"]
    batch[name] = batch[name] * 0.5 + 0.1
    assert not torch.equal(g(**batch)["loss_sds_video"], usual)
    del batch[name]
    message = f"is told camera and time of each frame; expected the batch to hold {name}. Pass"
    with pytest.raises(ValueError, match=message):
        g(**batch)


def test_clips_of_other_lengths_follow_each_other(folder, batch):
    """The frames that attention joins are those of this clip, whatever came before."""
    g, fresh = guidance(folder), guidance(folder)
    one = {
        key: value[:2] if torch.is_tensor(value) and key != "text_embeddings" else value
        for key, value in batch.items()
    }
    one |= {"num_frames": 2, "text_embeddings": TEXT[::2]}
    first, second = g(**one)["loss_sds_video"], g(**batch)["loss_sds_video"]
    assert torch.equal(g(**one)["loss_sds_video"], first)
    assert torch.equal(fresh(**batch)["loss_sds_video"], second)
    assert torch.equal(fresh(**one)["loss_sds_video"], first)


def test_more_frames_than_the_model_knows_are_refused(folder, batch):
    batch |= {
        key: batch[key][:1].repeat_interleave(5, 0)
        for key in ("rgb", "elevation", "azimuth", "camera_distances", "c2w", "fovy", "frame_times")
    }
    batch |= {"num_frames": 5, "text_embeddings": TEXT[::2]}
    with pytest.raises(ValueError, match="clips hold 5 frames; expected at most 4, .* Lower data"):
        guidance(folder)(**batch)


def test_noise_at_the_end_of_a_zero_snr_schedule_is_finite(folder, batch):
    for recon_loss in (True, False):
        g = guidance(folder, recon_loss=recon_loss, min_step_percent=1.0, max_step_percent=1.0)
        assert g.min_step == g.max_step == 999 and g.alphas_cumprod[999] == 0
        assert torch.isfinite(g(**batch)["loss_sds_video"])


def test_same_step_same_bits(folder, batch):
    g, fresh = guidance(folder), guidance(folder)
    g.update_step(0, 900)
    g(**batch)
    for each in (g, fresh):
        each.update_step(0, 5)
    assert torch.equal(g(**batch)["loss_sds_video"], fresh(**batch)["loss_sds_video"])


def test_size_of_the_frames(folder):
    assert guidance(folder).frame_size == (16, 16)
    assert guidance(folder, image_size=32).frame_size == (32, 32)
    assert guidance(folder, enable_channels_last_format=True).unet.conv_in.weight.is_contiguous(
        memory_format=torch.channels_last
    )


def test_required_models_and_missing_folders(tmp_path):
    cls = threestudio.find("joint-frames-guidance")
    assert cls.required_models({}) == ["embedded://video"]
    assert cls.required_models({})[0].components == ("unet", "vae", "scheduler")
    with pytest.raises(ModelUnavailableError, match="does not exist; give an existing diffusers"):
        guidance(tmp_path / "nowhere")
