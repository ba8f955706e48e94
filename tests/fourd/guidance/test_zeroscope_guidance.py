import json
import shutil

import pytest
import threestudio
import torch
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.models.prompt_processors.view_directions import view_directions
from threestudio.utils.pretrained import ModelUnavailableError, models_available

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.video_folders import write_zeroscope_folder

FRAMES = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Zeroscope: frames of 16 x 8 pixels, latents of 8 x 4."""
    return write_zeroscope_folder(tmp_path_factory.mktemp("priors") / "zeroscope")


def guidance(folder, **keys):
    cls = threestudio.find("zeroscope-guidance")
    keys = {"width": 16, "height": 8, "guidance_scale": 5.0, **keys}
    return cls({"pretrained_model_name_or_path": str(folder), **keys})


@pytest.fixture
def batch():
    """Two clips of three frames, smaller than the model's; the keys of a clip batch."""
    g = torch.Generator().manual_seed(3)
    return {
        "rgb": torch.rand(2 * FRAMES, 4, 6, 3, generator=g),
        "elevation": torch.full((2 * FRAMES,), 15.0),
        "azimuth": torch.tensor([0.0, 180.0]).repeat_interleave(FRAMES),
        "camera_distances": torch.full((2 * FRAMES,), 2.5),
        "c2w": torch.eye(4).repeat(2 * FRAMES, 1, 1),
        "fovy": torch.full((2 * FRAMES,), 0.7),
        "frame_times": torch.linspace(0, 1, FRAMES).repeat(2),
        "num_frames": FRAMES,
        "height": 4,
        "is_video": True,
        "train_dynamic_camera": False,
    }


@pytest.fixture
def prompt():
    g = torch.Generator().manual_seed(9)
    text, uncond = torch.randn(2, 1, 7, 24, generator=g)
    directions = view_directions(45.0, 45.0, 60.0)
    return PromptProcessorOutput(
        text_embeddings=text,
        uncond_text_embeddings=uncond,
        text_embeddings_vd=torch.randn(4, 7, 24, generator=g),
        uncond_text_embeddings_vd=uncond.expand(4, -1, -1),
        directions=directions,
        direction2idx={d.name: i for i, d in enumerate(directions)},
        use_perp_neg=False,
    )


@torch.no_grad()
def by_hand(g, batch, prompt, scale):
    """(1 - abar) (c + s (c - u) - eps), one clip and one half of the guidance at a time."""
    latents = g.encode_clips(batch["rgb"], FRAMES)
    noise = g.draw_noise("video-noise", tuple(latents.shape))
    timesteps = g.draw_timesteps("video-timestep", 2, shared=False)
    gradients = []
    for clip, view in ((0, 1), (1, 2)):
        abar = g.schedule.alphas_cumprod[timesteps[clip]]
        noisy = abar.sqrt() * latents[clip] + (1 - abar).sqrt() * noise[clip]
        cond, uncond = (
            g.unet(noisy[None], timesteps[clip], encoder_hidden_states=text).sample[0]
            for text in (prompt.text_embeddings_vd[view][None], prompt.uncond_text_embeddings)
        )
        gradients.append((1 - abar) * (cond + scale * (cond - uncond) - noise[clip]))
    return torch.stack(gradients)


def test_gradient_against_the_formula_through_the_real_network(folder, batch, prompt):
    g = guidance(folder)
    g.update_step(0, 11)
    expected = by_hand(g, batch, prompt, 5.0)
    rgb = batch["rgb"].requires_grad_()
    out = g(**batch, prompt_utils=prompt)
    # One batched U-Net call against four: fp32 rounding, times the guidance scale.
    loss = 0.5 * expected.square().sum().item() / 2
    assert out["loss_sds_video"].item() == pytest.approx(loss, rel=1e-3)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-3)
    out["loss_sds_video"].backward()
    again = batch["rgb"].detach().requires_grad_()
    (g.encode_clips(again, FRAMES) * expected / 2).sum().backward()
    torch.testing.assert_close(rgb.grad, again.grad, rtol=1e-2, atol=1e-4)
    assert expected.shape == (2, 4, FRAMES, 4, 8)


def test_the_published_convention_and_scale(folder, batch, prompt):
    """Its scale s is s + 1 of the standard form, so s = 0 is the conditional prediction."""
    assert threestudio.find("zeroscope-guidance").Config.guidance_scale == 100.0
    g = guidance(folder, guidance_scale=0.0)
    expected = by_hand(g, batch, prompt, 0.0)
    norm = g(**batch, prompt_utils=prompt)["grad_norm"].item()
    assert norm == pytest.approx(expected.norm().item(), rel=1e-4)


def test_same_step_same_bits_whatever_was_done_before(folder, batch, prompt):
    def loss_at(g, step):
        g.update_step(0, step)
        return g(**batch, prompt_utils=prompt)["loss_sds_video"]

    fresh, used = guidance(folder), guidance(folder)
    loss_at(used, 900)
    at_five = loss_at(used, 5)
    assert torch.equal(at_five, loss_at(fresh, 5))
    assert not torch.equal(at_five, loss_at(fresh, 6))


def test_only_the_chosen_frames_have_a_gradient_and_nothing_else_changes(folder, batch, prompt):
    full, frugal = guidance(folder), guidance(folder, low_ram_vae=1)
    for g in (full, frugal):
        g.update_step(0, 4)
    rgb = batch.pop("rgb")
    everywhere, chosen_only = (rgb.clone().requires_grad_() for _ in range(2))
    loss = full(rgb=everywhere, **batch, prompt_utils=prompt)["loss_sds_video"]
    sparse = frugal(rgb=chosen_only, **batch, prompt_utils=prompt)["loss_sds_video"]
    # The same latents in other batches: fp32 rounding.
    torch.testing.assert_close(loss, sparse, rtol=1e-4, atol=1e-4)
    loss.backward()
    sparse.backward()
    chosen = frugal.frames_with_gradient(2, FRAMES).flatten()
    assert chosen.unflatten(0, (2, FRAMES)).sum(1).tolist() == [1, 1]
    assert not chosen_only.grad[~chosen].any()
    torch.testing.assert_close(
        chosen_only.grad[chosen], everywhere.grad[chosen], rtol=1e-3, atol=1e-3
    )
    assert everywhere.grad[~chosen].abs().amax() > 0
    # Upstream's extension writes `true`, which counts as one frame there.
    also = guidance(folder, low_ram_vae=True)
    also.update_step(0, 4)
    assert torch.equal(also(rgb=rgb, **batch, prompt_utils=prompt)["loss_sds_video"], sparse)


def test_as_many_frames_as_there_are_is_all_of_them(folder, batch, prompt):
    usual = guidance(folder)(**batch, prompt_utils=prompt)["loss_sds_video"]
    every = guidance(folder, low_ram_vae=FRAMES)(**batch, prompt_utils=prompt)["loss_sds_video"]
    assert torch.equal(usual, every)


def test_renders_are_resized_to_the_size_of_the_model(folder):
    defaults = threestudio.find("zeroscope-guidance").Config
    assert (defaults.width, defaults.height, defaults.low_ram_vae) == (576, 320, -1)
    g = guidance(folder, width=20, height=12)
    rgb = torch.rand(4, 5, 9, 3)
    assert g.encode_clips(rgb, 2).shape == (2, 4, 2, 6, 10)
    latents = torch.rand(4, 5, 9, 4)
    assert g.encode_clips(latents, 2, rgb_as_latents=True).shape == (2, 4, 2, 6, 10)


def test_latents_may_be_given_instead_of_frames(folder, batch, prompt):
    g = guidance(folder)
    expected = g(**batch, prompt_utils=prompt)["loss_sds_video"]
    latents = g.encode_clips(batch["rgb"], FRAMES).detach()
    batch["rgb"] = latents.transpose(1, 2).flatten(0, 1).permute(0, 2, 3, 1)
    got = g(**batch, prompt_utils=prompt, rgb_as_latents=True)["loss_sds_video"]
    torch.testing.assert_close(got, expected)


def test_distillation_moves_frames_towards_what_the_model_predicts(folder, batch, prompt):
    """End to end: descending the loss at one fixed step lowers the distance to its target."""
    g = guidance(folder, guidance_scale=0.0, recon_loss=True)
    rgb = batch.pop("rgb").requires_grad_()
    losses = []
    for _ in range(3):
        loss = g(rgb=rgb, **batch, prompt_utils=prompt, timestep=400)["loss_sds_video"]
        (slope,) = torch.autograd.grad(loss, rgb)
        rgb = (rgb - 0.05 * slope / slope.norm()).detach().requires_grad_()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


def test_channels_last_changes_the_layout_only(folder, batch, prompt):
    usual = guidance(folder)(**batch, prompt_utils=prompt)["loss_sds_video"]
    other = guidance(folder, enable_channels_last_format=True)
    assert other.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        other(**batch, prompt_utils=prompt)["loss_sds_video"], usual, rtol=1e-4, atol=1e-4
    )


def test_the_model_is_frozen_and_in_no_module(folder):
    g = guidance(folder)
    assert not isinstance(g, torch.nn.Module)
    for model in (g.unet, g.vae):
        assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_another_schedule_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    path = copy / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "beta_schedule": "linear"}))
    with pytest.raises(ValueError, match="ends at alphas_cumprod=.* Correct scheduler/scheduler_c"):
        guidance(copy)


def test_an_image_model_is_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((copy / "unet" / "config.json").read_text())
    config["_class_name"] = "UNet2DConditionModel"
    (copy / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; expected UNet3DConditionMod"):
        guidance(copy)


def test_pickled_weights_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "model")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = r"lacks unet/\*\.safetensors and holds the pickle diffusion_pytorch_model\.bin, which"
    with pytest.raises(ModelUnavailableError, match=message):
        guidance(copy)


def test_required_models_are_known_without_building(folder):
    cls = threestudio.find("zeroscope-guidance")
    assert cls.required_models({}) == ["cerspense/zeroscope_v2_576w"]
    (required,) = cls.required_models({"pretrained_model_name_or_path": str(folder)})
    assert required.components == ("unet", "vae", "scheduler")
    assert models_available([required]) == {str(folder): True}


def test_the_extensions_name_finds_the_same_class():
    assert threestudio.find("4dfy-zeroscope-guidance") is threestudio.find("zeroscope-guidance")


@pytest.mark.slow
def test_the_full_architecture_on_random_weights(tmp_path):
    """1411 M parameters in half precision on disk; a short and small clip, frames of 64 x 64."""
    g = guidance(write_zeroscope_folder(tmp_path / "full", full=True), width=64, height=64)
    assert sum(p.numel() for p in g.unet.parameters()) == pytest.approx(1411e6, rel=1e-3)
    rgb = torch.rand(2, 8, 8, 3, requires_grad=True)
    out = g(rgb, None, *[torch.zeros(2)] * 3, text_embeddings=torch.randn(2, 77, 1024))
    out["loss_sds_video"].backward()
    assert torch.isfinite(out["loss_sds_video"]) and rgb.grad.any()
