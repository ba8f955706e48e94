import pytest
import threestudio
import torch
from diffusers import UNet3DConditionModel

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.video_models import write_videocrafter_folder

CLASS = "videocrafter-guidance"
FRAMES, SCALE = 3, 5.0
ANGLES = {key: torch.zeros(1) for key in ("elevation", "azimuth", "camera_distances")}
# 4D-fy's stage 3 with VideoCrafter2.
PUBLISHED = {
    "fps": 8,
    "motion_amp_scale": 30.0,
    "min_step_percent": [0, 0.02, 0.02, 5000],
    "max_step_percent": [0, 0.98, 0.5, 5000],
    "width_vid": 128,
    "height_vid": 80,
    "use_hifa": False,
    "config": "inference_t2v_512_v2.0.yaml",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videocrafter_folder(tmp_path_factory.mktemp("priors") / "videocrafter")


@pytest.fixture
def clip():
    return torch.rand(FRAMES, 8, 16, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def text():
    return torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2))


def guidance(folder, **keys):
    usual = {
        "pretrained_model_name_or_path": str(folder),
        "guidance_scale": SCALE,
        "width": 16,
        "height": 8,
    }
    return threestudio.find(CLASS)({**usual, **keys})


def distil(g, clip, text):
    return g(clip, None, num_frames=FRAMES, text_embeddings=text, **ANGLES)


def by_hand(g, clip, text, end=1.0):
    """w times (eps_hat - eps), whose change over the frames is amplified; one text at a time."""
    latents = g.encode_clips(clip, FRAMES)
    noise = g.draw_noise("video-noise", tuple(latents.shape))
    timestep = g.draw_timesteps("video-timestep", 1, shared=False)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - betas).cumprod(0)[timestep.item()].float()
    shrink = torch.cat([torch.linspace(1, end, 400), torch.full((600,), end)])[timestep.item()]
    noisy = abar.sqrt() * shrink * latents + (1 - abar).sqrt() * noise
    fps = torch.tensor([g.cfg.fps])
    cond, uncond = (g.unet(noisy, timestep, words[None], fps).sample for words in text)
    score = cond + SCALE * (cond - uncond) - noise
    mean = score.mean(2, keepdim=True)
    return (1 - abar) * (mean + g.cfg.motion_amp_scale * (score - mean))


@pytest.mark.parametrize("end, step", [(1.0, 3), (0.7, 3), (0.7, 0)])
@torch.no_grad()
def test_gradient_against_the_formulas(folder, clip, text, end, step):
    g = guidance(folder, **PUBLISHED, signal_scale_end=end)
    g.update_step(0, step)
    expected = by_hand(g, clip, text, end)
    out = distil(g, clip, text)
    # One batched call against two, times guidance and amplification: fp32 rounding.
    assert out["grad_norm"].item() == pytest.approx(expected.norm().item(), rel=1e-4)
    assert out["loss_sds_video"].item() == pytest.approx(
        0.5 * expected.square().sum().item(), rel=1e-4
    )


def test_timesteps_of_that_test_lie_on_both_sides_of_the_last_scaled_one(folder):
    g = guidance(folder, **PUBLISHED)
    drawn = []
    for step in (3, 0):
        g.update_step(0, step)
        drawn.append(g.draw_timesteps("video-timestep", 1, shared=False).item())
    assert min(drawn) < 399 < max(drawn)


def test_the_gradient_reaches_every_frame(folder, clip, text):
    distil(guidance(folder), clip.requires_grad_(), text)["loss_sds_video"].backward()
    assert (clip.grad.flatten(1).norm(dim=1) > 0).all()


def test_the_frame_rate_matters_and_the_defaults_are_the_published_ones(folder, clip, text):
    g = guidance(folder)
    assert (g.cfg.fps, g.cfg.motion_amp_scale, g.cfg.signal_scale_end) == (8, 30.0, 1.0)
    defaults = threestudio.find(CLASS).Config
    assert (defaults.width, defaults.height, defaults.guidance_scale) == (512, 320, 100.0)
    usual = distil(g, clip, text)["loss_sds_video"].item()
    g.cfg.fps = 24
    other = distil(g, clip, text)["loss_sds_video"].item()
    assert abs(other - usual) > 1e-2 * usual


def test_the_published_range_of_timesteps_falls_with_the_step_alone(folder):
    g = guidance(folder, **PUBLISHED)
    for step, highest in ((5000, 500), (0, 980), (2500, 740), (90_000, 500), (0, 980)):
        g.update_step(0, step)
        assert (g.min_step, g.max_step) == (20, highest)


def test_same_step_same_bits(folder, clip, text):
    losses = []
    for step in (7, 400, 7):
        g = guidance(folder)
        g.update_step(0, step)
        losses.append(distil(g, clip, text)["loss_sds_video"])
    assert torch.equal(losses[0], losses[2]) and not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"use_hifa": True}, "use_hifa is true; expected false"),
        ({"fps": 0}, "fps is 0 and signal_scale_end 1.0; expected fps >= 1 and 0 <"),
        ({"signal_scale_end": 0.0}, "signal_scale_end 0.0; expected fps >= 1 and 0 <"),
    ],
)
def test_keys_that_ask_for_what_is_not_there_are_refused(folder, keys, message):
    with pytest.raises(ValueError, match=message):
        guidance(folder, **keys)


def test_other_models_are_refused(tmp_path):
    plain = write_videocrafter_folder(tmp_path / "plain", UNet3DConditionModel)
    with pytest.raises(
        ValueError, match="is a UNet3DConditionModel, which knows no frame rate; ex"
    ):
        guidance(plain)
    other = write_videocrafter_folder(tmp_path / "other", prediction_type="v_prediction")
    with pytest.raises(
        ValueError, match="predicts 'v_prediction' and ends .*expected 1000, 'epsil"
    ):
        guidance(other)


def test_the_originals_id_stands_for_a_diffusers_folder():
    cls = threestudio.find(CLASS)
    published = {"pretrained_model_name_or_path": "VideoCrafter/VideoCrafter2"}
    assert cls.required_models(published) == cls.required_models({})
    assert cls.required_models({}) == ["adamdad/videocrafterv2_diffusers"]
    assert cls.required_models({"pretrained_model_name_or_path": "a/b"}) == ["a/b"]
