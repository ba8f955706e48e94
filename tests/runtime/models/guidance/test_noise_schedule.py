import pytest
import torch
from threestudio.models.guidance.noise_schedule import flow_schedule, noise_schedule

STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "trained_betas": None,
}


def test_stable_diffusion_by_its_formula():
    schedule = noise_schedule(STABLE_DIFFUSION)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    # fp32 products of a thousand factors: 1e-5 relative.
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-6
    )
    assert schedule.prediction_type == "epsilon"
    assert schedule.num_train_timesteps == 1000


def test_zero_terminal_snr_ends_without_signal_and_starts_unchanged():
    config = {**STABLE_DIFFUSION, "prediction_type": "v_prediction"}
    plain = noise_schedule(config)
    rescaled = noise_schedule({**config, "rescale_betas_zero_snr": True})
    assert rescaled.alphas_cumprod[-1] == 0.0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), 1e-5)
    assert (rescaled.alphas_cumprod.diff() < 0).all()


def test_a_scheduler_object_reads_like_its_config():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    schedule = noise_schedule(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod)
    assert schedule.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "config, message",
    [
        ({"_class_name": "FlowMatchEuler"}, "'FlowMatchEuler' names no beta_schedule"),
        ({**STABLE_DIFFUSION, "prediction_type": "sample"}, "prediction_type is 'sample'"),
        ({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}, "cannot be inverted"),
    ],
)
def test_schedules_that_do_not_serve_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        noise_schedule(config)


WAN = {
    "_class_name": "UniPCMultistepScheduler",
    "beta_schedule": "linear",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
    "num_train_timesteps": 1000,
}


def test_flow_schedules_of_both_kinds_of_sampler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = flow_schedule(WAN)
    assert (schedule.num_train_timesteps, schedule.shift) == (1000, 3.0)
    assert schedule.prediction_type == "flow"
    assert flow_schedule(FlowMatchEulerDiscreteScheduler(shift=5.0)).shift == 5.0
    assert flow_schedule({"_class_name": "FlowMatchEulerDiscreteScheduler"}).shift == 1.0


@pytest.mark.parametrize(
    "config, message",
    [
        (STABLE_DIFFUSION, "'PNDMScheduler' has prediction_type None; expected a flow-matching"),
        ({**WAN, "prediction_type": "epsilon"}, "prediction_type 'epsilon'; expected a flow"),
        ({**WAN, "invert_sigmas": True}, "has invert_sigmas; expected noise level 1"),
    ],
)
def test_schedules_that_are_no_flow_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        flow_schedule(config)


def test_a_flow_schedule_is_no_diffusion_schedule():
    with pytest.raises(ValueError, match="prediction_type is 'flow_prediction'; expected"):
        noise_schedule(WAN)
