"""The maths that all video guidances share, on the tiny folders of two of them."""

import pytest
import threestudio
import torch
from threestudio.models.guidance import base as base_module
from threestudio.models.guidance.noise_schedule import noise_schedule
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.models.prompt_processors.view_directions import view_directions

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.guidance import video_guidance
from custom.fourd.guidance.video_guidance import (
    ClipCameras,
    VideoDiffusionGuidance,
    require_schedule,
    use_channels_last,
)

SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}


class LinearGuidance(VideoDiffusionGuidance):
    """A model that can be written down: text times the noisy latents; frames are their latents."""

    def configure(self) -> None:
        self.weights_dtype = torch.float32
        self.frame_size = (2, 2)
        self.setup_schedule(noise_schedule(SCHEDULE))

    def encode_clips(self, rgb, num_frames, rgb_as_latents=False):
        return rgb.permute(0, 3, 1, 2).unflatten(0, (-1, num_frames)).transpose(1, 2)

    def predict(self, noisy, timesteps, text, cameras):
        self.rows = len(noisy)
        return text[:, :1, :1, None, None] * noisy


@pytest.fixture
def clips():
    """Two clips of three frames of 2 x 2 pixels, latents by `LinearGuidance`."""
    return torch.rand(6, 2, 2, 3, generator=torch.Generator().manual_seed(1))


ANGLES = {key: torch.zeros(6) for key in ("elevation", "azimuth", "camera_distances")}
TEXT = torch.tensor([2.0, 3.0, 0.5, 0.25]).view(4, 1, 1)
"""What the model multiplies the noisy clips by: two with the prompt, two without it."""


def distil(g, clips, **keys):
    keys = {"text_embeddings": TEXT, "num_frames": 3, **ANGLES, **keys}
    return g(clips, None, **keys)


def by_hand(g, clips, clip, scale, weight):
    """w (eps_hat - eps) of one clip, with eps_hat = c + s (c - u) or u + s (c - u)."""
    latents = g.encode_clips(clips, 3)[clip]
    noise = g.draw_noise("video-noise", (2, 3, 3, 2, 2))[clip]
    timestep = g.draw_timesteps("video-timestep", 2, shared=False)[clip]
    abar = g.schedule.alphas_cumprod[timestep]
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    cond, uncond = TEXT[clip].item() * noisy, TEXT[2 + clip].item() * noisy
    base = cond if g.guidance_convention == "threestudio" else uncond
    return weight(abar) * (base + scale * (cond - uncond) - noise)


WEIGHTS = {
    "sds": lambda abar: 1 - abar,
    "uniform": lambda abar: 1.0,
    "fantasia3d": lambda abar: abar.sqrt() * (1 - abar),
}


@pytest.mark.parametrize("convention", ["standard", "threestudio"])
@pytest.mark.parametrize("strategy", WEIGHTS)
def test_each_clip_has_the_gradient_of_the_formula(clips, convention, strategy):
    g = LinearGuidance({"guidance_scale": 4.0, "weighting_strategy": strategy})
    g.guidance_convention = convention
    g.update_step(0, 7)
    clips.requires_grad_()
    out = distil(g, clips)
    out["loss_sds_video"].backward()
    gradients = clips.grad.permute(0, 3, 1, 2).unflatten(0, (2, 3)).transpose(1, 2)
    timesteps = g.draw_timesteps("video-timestep", 2, shared=False)
    # Two clips, two timesteps: a weight that broadcasts along the frames would be seen.
    assert timesteps[0] != timesteps[1]
    expected = torch.stack([by_hand(g, clips, i, 4.0, WEIGHTS[strategy]) for i in (0, 1)])
    torch.testing.assert_close(gradients, expected / 2)
    loss = 0.5 * expected.square().sum() / 2
    torch.testing.assert_close(out["loss_sds_video"], loss)
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item())
    assert (out["min_step"], out["max_step"]) == (20, 980)


def test_as_many_clips_as_frames_or_channels_are_no_special_case():
    """The published weight has four dimensions against the latents' five: it works for one clip."""
    g = LinearGuidance({"guidance_scale": 4.0})
    three = torch.rand(9, 2, 2, 3)
    latents = g.encode_clips(three, 3)
    noise, timesteps = torch.randn_like(latents), torch.tensor([100, 500, 900])
    text = torch.rand(6, 1, 1)
    together = g.gradient(latents, noise, timesteps, text, ClipCameras(None, None, None))
    for clip in range(3):
        rows = slice(clip, clip + 1)
        alone = g.gradient(
            latents[rows], noise[rows], timesteps[rows], text[clip::3], ClipCameras(*[None] * 3)
        )
        torch.testing.assert_close(together[rows], alone)


def test_reconstruction_is_sds_with_weight_sigma_over_alpha(clips):
    """MVDream's identity: at rescale 0, z - x0 = (sigma / alpha) (eps_hat - eps)."""
    g = LinearGuidance({"guidance_scale": 4.0, "recon_loss": True})
    expected = torch.stack(
        [by_hand(g, clips, i, 4.0, lambda abar: ((1 - abar) / abar).sqrt()) for i in (0, 1)]
    )
    assert distil(g, clips)["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-5)


def test_contrast_is_restored_over_all_frames_of_a_clip(clips):
    g = LinearGuidance({"guidance_scale": 4.0, "recon_loss": True, "recon_std_rescale": 0.5})
    latents = g.encode_clips(clips, 3)
    noise = g.draw_noise("video-noise", tuple(latents.shape))
    timesteps = torch.tensor([300, 700])
    got = g.gradient(latents, noise, timesteps, TEXT, ClipCameras(None, None, None))
    for clip in range(2):
        abar = g.schedule.alphas_cumprod[timesteps[clip]]
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        noisy = alpha * latents[clip] + sigma * noise[clip]
        cond, uncond = (TEXT[i].item() * noisy for i in (clip, 2 + clip))
        clean_cond, clean = (
            (noisy - sigma * prediction) / alpha
            for prediction in (cond, uncond + 4.0 * (cond - uncond))
        )
        target = 0.5 * clean * clean_cond.std() / clean.std() + 0.5 * clean
        torch.testing.assert_close(got[clip], latents[clip] - target, rtol=1e-4, atol=1e-5)


def test_motion_is_amplified_around_the_mean_of_the_frames():
    """By hand: residuals 1, 2, 6 of three frames, mean 3; twice the deviation is -1, 1, 9."""

    class Given(LinearGuidance):
        def predict(self, noisy, timesteps, text, cameras):
            return noisy * 0 + torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1, 1)

    keys = {"guidance_scale": 1.0, "weighting_strategy": "uniform"}
    zeros = torch.zeros(1, 3, 3, 2, 2)
    arguments = (zeros, zeros, torch.tensor([500]), TEXT[:2], ClipCameras(None, None, None))
    plain = Given(keys).gradient(*arguments)
    assert plain[0, 0, :, 0, 0].tolist() == [1.0, 2.0, 6.0]
    amplified = Given({**keys, "motion_amp_scale": 2.0}).gradient(*arguments)
    assert amplified[0, 0, :, 0, 0].tolist() == [-1.0, 1.0, 9.0]
    # The weight of the timestep multiplies both parts.
    weighted = Given({"guidance_scale": 1.0, "motion_amp_scale": 2.0}).gradient(*arguments)
    abar = noise_schedule(SCHEDULE).alphas_cumprod[500]
    torch.testing.assert_close(weighted, (1 - abar) * amplified)


def test_score_jacobian_chaining_is_uniform_and_may_keep_the_noise(clips):
    def norm(**keys):
        return distil(LinearGuidance({"guidance_scale": 4.0, **keys}), clips)["grad_norm"]

    torch.testing.assert_close(norm(use_sjc=True), norm(weighting_strategy="uniform"))
    g = LinearGuidance({"guidance_scale": 4.0, "use_sjc": True, "var_red": False})
    noise = g.draw_noise("video-noise", (2, 3, 3, 2, 2))
    expected = torch.stack([by_hand(g, clips, i, 4.0, lambda abar: 1.0) for i in (0, 1)]) + noise
    torch.testing.assert_close(distil(g, clips)["grad_norm"], expected.norm())


def test_predictions_that_are_no_numbers_move_nothing(clips):
    class Broken(LinearGuidance):
        def predict(self, noisy, timesteps, text, cameras):
            prediction = super().predict(noisy, timesteps, text, cameras)
            prediction[:, :, 0] = torch.nan
            return prediction

    clips.requires_grad_()
    out = distil(Broken({"guidance_scale": 4.0}), clips)
    out["loss_sds_video"].backward()
    assert torch.isfinite(out["loss_sds_video"]) and torch.isfinite(out["grad_norm"])
    assert not clips.grad[[0, 3]].any() and clips.grad[[1, 2, 4, 5]].all()


@pytest.mark.parametrize(
    "convention, scale, rows", [("standard", 1.0, 2), ("standard", 0.0, 2), ("threestudio", 0.0, 2),
                                ("standard", 4.0, 4), ("threestudio", 1.0, 4)],
)  # fmt: skip
def test_a_half_that_nobody_reads_is_not_computed(clips, convention, scale, rows):
    g = LinearGuidance({"guidance_scale": scale})
    g.guidance_convention = convention
    out = distil(g, clips)
    assert g.rows == rows
    expected = torch.stack([by_hand(g, clips, i, scale, WEIGHTS["sds"]) for i in (0, 1)])
    torch.testing.assert_close(out["grad_norm"], expected.norm())


def test_one_timestep_per_clip_whatever_the_ranks(monkeypatch):
    g = LinearGuidance({"min_step_percent": 0.1, "max_step_percent": 0.3})
    seen = []
    for step in range(100):
        g.update_step(0, step)
        seen.append(g.draw_timesteps("video-timestep", 2, shared=False))
    seen = torch.stack(seen)
    assert seen.min() >= 100 and seen.max() <= 300 and (seen[:, 0] != seen[:, 1]).any()
    noise = g.draw_noise("video-noise", (2, 3, 3, 2, 2))
    frames = g_frames(low_ram_vae=1).frames_with_gradient(2, 9)
    for module in (base_module, video_guidance):
        monkeypatch.setattr(module, "get_rank", lambda: 1)
    assert torch.equal(g.draw_timesteps("video-timestep", 1, shared=False), seen[-1, 1:])
    assert torch.equal(g.draw_noise("video-noise", (1, 3, 3, 2, 2)), noise[1:])
    assert torch.equal(g_frames(low_ram_vae=1).frames_with_gradient(1, 9), frames[1:])


def g_frames(**keys):
    return LinearGuidance(keys)


def test_frames_with_a_gradient_are_as_many_as_asked_and_change_with_the_step():
    g = g_frames(low_ram_vae=2)
    visited = torch.zeros(5, dtype=torch.bool)
    for step in range(30):
        g.update_step(0, step)
        chosen = g.frames_with_gradient(3, 5)
        assert chosen.sum(1).tolist() == [2, 2, 2]
        assert torch.equal(chosen, g.frames_with_gradient(3, 5))
        visited |= chosen.any(0)
    assert visited.all()


def test_a_value_may_be_given_per_clip_or_per_frame(clips):
    g = LinearGuidance({})
    times = torch.tensor([0.0, 0.5, 1.0])
    c2w = torch.eye(4).repeat(2, 1, 1)
    c2w[1, 0, 3] = 2.0
    per_clip = g.clip_cameras(2, 3, c2w, torch.tensor([0.5, 0.7]), times)
    per_frame = g.clip_cameras(
        2,
        3,
        c2w.repeat_interleave(3, 0),
        torch.tensor([0.5, 0.7]).repeat_interleave(3),
        times.repeat(2),
    )
    for name, shape in (("c2w", (2, 3, 4, 4)), ("fovy", (2, 3)), ("frame_times", (2, 3))):
        assert getattr(per_clip, name).shape == shape
        assert torch.equal(getattr(per_clip, name), getattr(per_frame, name))
    assert per_clip.repeat(2).fovy[:, 0].tolist() == pytest.approx([0.5, 0.7, 0.5, 0.7])
    assert per_clip.repeat(1) is per_clip
    assert g.clip_cameras(2, 3, None, None, None).repeat(2).c2w is None
    message = r"fovy has shape \(5,\); expected one row for each of 2 clips, or for each of their 6"
    with pytest.raises(ValueError, match=message):
        g.clip_cameras(2, 3, None, torch.zeros(5), None)


def test_words_name_the_view_of_a_clips_first_frame(clips):
    directions = view_directions(45.0, 45.0, 60.0)
    words = PromptProcessorOutput(
        text_embeddings=torch.full((1, 1, 1), 9.0),
        uncond_text_embeddings=torch.full((1, 1, 1), 9.0),
        # Side, front, back, overhead; `TEXT` is front for the first clip and side for the second.
        text_embeddings_vd=torch.tensor([3.0, 2.0, 9.0, 9.0]).view(4, 1, 1),
        uncond_text_embeddings_vd=torch.tensor([0.25, 0.5, 9.0, 9.0]).view(4, 1, 1),
        directions=directions,
        direction2idx={d.name: i for i, d in enumerate(directions)},
        use_perp_neg=False,
    )
    g = LinearGuidance({"guidance_scale": 4.0})
    angles = {
        "elevation": torch.tensor([10.0, 20.0]),
        "azimuth": torch.tensor([0.0, 40.0, 80.0, 90.0, 120.0, 150.0]),
        "camera_distances": torch.full((6,), 2.5),
    }
    out = g(clips, words, **angles, num_frames=3, height=2, is_video=True)
    torch.testing.assert_close(out["loss_sds_video"], distil(g, clips)["loss_sds_video"])
    g = LinearGuidance({"guidance_scale": 4.0, "view_dependent_prompting": False})
    plain = g(clips, words, **angles, num_frames=3)["loss_sds_video"]
    assert not torch.isclose(plain, out["loss_sds_video"])
    words.use_perp_neg = True
    with pytest.raises(ValueError, match="use_perp_neg is true; expected false, since video"):
        g(clips, words, **angles, num_frames=3)


def test_frames_that_are_no_whole_clips_are_refused(clips):
    g = LinearGuidance({})
    with pytest.raises(ValueError, match="holds 6 frames; expected a multiple of num_frames=4"):
        distil(g, clips, num_frames=4)
    with pytest.raises(ValueError, match="expected a multiple of num_frames=0"):
        distil(g, clips, num_frames=0)
    # Without a number, all frames are one clip.
    distil(g, clips, num_frames=None, text_embeddings=TEXT[:2])


def test_schedules_depend_on_the_step_alone():
    g = LinearGuidance(
        {
            "max_step_percent": [0, 0.98, 0.5, 5000],
            "guidance_scale": [0, 50.0, 10.0, 100],
            "grad_clip": [0, 2.0, 4.0, 100],
            "anneal_start_step": 6000,
            "max_step_percent_annealed": 0.3,
        }
    )
    for step, high in ((7000, 300), (0, 980), (6000, 500), (2500, 740), (6001, 300), (0, 980)):
        g.update_step(0, step)
        assert (g.min_step, g.max_step) == (20, high)
    g.update_step(0, 50)
    assert (g.guidance_scale, g.grad_clip_val) == (30.0, 3.0)


def test_gradients_are_clipped(clips):
    out = distil(LinearGuidance({"guidance_scale": 4.0, "grad_clip": 0.01}), clips)
    assert 0 < out["grad_norm"].item() <= 0.01 * 72**0.5 * 1.001


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"token_merging": True}, "token_merging is true; expected false"),
        ({"low_ram_vae": "half"}, "low_ram_vae is 'half'; expected how many frames of a clip"),
        ({"enable_sequential_cpu_offload": True}, "enable_sequential_cpu_offload is true"),
    ],
)
def test_keys_that_ask_for_what_is_not_there_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        LinearGuidance(keys)


def test_unknown_weights_are_refused_when_they_are_needed(clips):
    with pytest.raises(ValueError, match="weighting_strategy is 'flat'; expected one of 'sds'"):
        distil(LinearGuidance({"weighting_strategy": "flat"}), clips)


def test_a_subclass_must_say_what_its_model_is(clips):
    with pytest.raises(NotImplementedError, match="VideoDiffusionGuidance defines no configure"):
        VideoDiffusionGuidance({})

    class Mute(LinearGuidance):
        predict = VideoDiffusionGuidance.predict

    with pytest.raises(NotImplementedError, match="Mute defines no predict"):
        distil(Mute({}), clips)


def test_the_schedule_of_the_family_is_required():
    require_schedule(noise_schedule(SCHEDULE), "a/b")
    require_schedule(noise_schedule({**SCHEDULE, "beta_schedule": "linear"}), "a/b", "linear")
    for wrong, named in (
        ({"beta_end": 0.02}, r"predicts 'epsilon' and ends at alphas_cumprod=0\.000\d+; expected"),
        ({"prediction_type": "v_prediction"}, "predicts 'v_prediction'"),
        ({"num_train_timesteps": 100}, "'a/b' has 100 steps"),
        ({"beta_schedule": "linear"}, r"\(scaled_linear betas from 0.00085 to 0.012\). Correct"),
    ):
        with pytest.raises(ValueError, match=named):
            require_schedule(noise_schedule({**SCHEDULE, **wrong}), "a/b")


def test_channels_last_is_for_image_convolutions():
    model = torch.nn.ModuleList([torch.nn.Conv2d(2, 3, 3), torch.nn.Conv3d(2, 3, (3, 1, 1))])
    before = [parameter.clone() for parameter in model.parameters()]
    use_channels_last(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_nothing_of_a_frozen_prior_is_to_be_trained():
    assert threestudio.find("zeroscope-guidance").trainable_parameters(LinearGuidance({})) == {}
