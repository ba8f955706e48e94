"""The noise schedule that a prior was trained with, read from its scheduler's configuration.

Distillation and our samplers need three facts of a scheduler and none of its stepping code, so any
diffusers scheduler with betas serves, whatever sampler its folder happens to name. Flow matching
needs two, see `flow_schedule`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from .score_distillation import PREDICTION_TYPES, check_schedule


@dataclass(frozen=True)
class NoiseSchedule:
    """Facts of a discrete diffusion schedule; see `noise_schedule`."""

    alphas_cumprod: Float[Tensor, "t"]
    """Cumulative product abar in [0, 1], fp32 on the CPU, index 0 the least noisy step."""
    prediction_type: str
    """What the model predicts: "epsilon" or "v_prediction"."""

    @property
    def num_train_timesteps(self) -> int:
        """Number of training steps, the length of ``alphas_cumprod``."""
        return len(self.alphas_cumprod)


@dataclass(frozen=True)
class FlowSchedule:
    """Facts of flow matching, noisy = (1 - s) clean + s noise; see `flow_schedule`."""

    num_train_timesteps: int
    """What the model is told at noise level s is this number times s."""
    shift: float
    """k of `shift_noise_levels` with which the folder's own sampler spaces its noise levels."""
    prediction_type: str = "flow"
    """The model predicts noise - clean."""


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """Read the schedule of a diffusers scheduler, or of the mapping in its configuration file.

    Args:
        scheduler: an object with ``config``, or that configuration itself.

    Raises:
        ValueError: if it describes no beta schedule, predicts something that is not understood, or
            cannot be inverted (an epsilon prediction with zero terminal SNR).
    """
    if isinstance(scheduler, NoiseSchedule):
        return scheduler
    config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
    if "beta_schedule" not in config and config.get("trained_betas") is None:
        raise ValueError(
            f"The scheduler {config.get('_class_name', 'configuration')!r} names no beta_schedule; "
            "expected a diffusion schedule such as that of DDIMScheduler."
        )
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"The scheduler's prediction_type is {prediction_type!r}; expected 'epsilon' or "
            "'v_prediction'."
        )
    alphas_cumprod = _alphas_cumprod(config)
    check_schedule(alphas_cumprod, prediction_type)
    return NoiseSchedule(alphas_cumprod, prediction_type)


def flow_schedule(scheduler: Any) -> FlowSchedule:
    """Read the schedule of a flow-matching scheduler, or of its configuration file's mapping.

    Understood are ``FlowMatchEulerDiscreteScheduler`` (``shift``) and every sampler with
    ``prediction_type: flow_prediction`` (``flow_shift``), such as Wan's UniPC.

    Raises:
        ValueError: if it describes a diffusion by betas, or noise levels that run backwards.
    """
    config = dict(scheduler if isinstance(scheduler, Mapping) else scheduler.config)
    name = config.get("_class_name", type(scheduler).__name__)
    is_flow_match = str(name).startswith("FlowMatch")
    if not is_flow_match and config.get("prediction_type") != "flow_prediction":
        raise ValueError(
            f"The scheduler {name!r} has prediction_type {config.get('prediction_type')!r}; "
            "expected a flow-matching one: FlowMatchEulerDiscreteScheduler, or "
            "prediction_type 'flow_prediction'. Choose the guidance of that model's family."
        )
    if config.get("invert_sigmas"):
        raise ValueError(
            f"The scheduler {name!r} has invert_sigmas; expected noise level 1 to be pure noise."
        )
    shift = config.get("shift" if is_flow_match else "flow_shift")
    steps = config.get("num_train_timesteps") or 1000
    return FlowSchedule(int(steps), 1.0 if shift is None else float(shift))


def _alphas_cumprod(config: dict[str, Any]) -> Tensor:
    from diffusers import DDIMScheduler

    # DDIM understands every key that shapes betas; the keys of other samplers are dropped here
    # because `from_config` would warn about each of them.
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    known = {name: config[name] for name in names if config.get(name) is not None}
    known["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr", False))
    return DDIMScheduler(**known).alphas_cumprod.float()
