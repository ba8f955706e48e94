"""Score distillation, once, for every prior: predictions, guidance, weights, targets and the loss.

A guidance calls its model and hands the answer to these pure functions; nothing here knows a model,
a schedule object or a random generator.

Dimensions: ``b`` images (or clips) of the batch; ``...`` the dimensions of one latent, (c, h, w)
for an image and (c, f, h, w) for a clip. Both scales of a noisy latent

    noisy = signal_scale * clean + noise_scale * noise

are given per item and broadcast over ``...``: (sqrt(abar), sqrt(1 - abar)) for diffusion,
(1 - s, s) for flow matching. A schedule whose last step has no signal left (signal_scale = 0) is
valid with "v_prediction" and "flow" everywhere below; only the "epsilon" form divides by it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "flow")
WEIGHTING_STRATEGIES = ("sds", "uniform", "fantasia3d")
FLOW_WEIGHTINGS = ("uniform", "epsilon", "reconstruction")
GUIDANCE_CONVENTIONS = ("standard", "threestudio")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}.")


def _per_item(scale: Tensor, like: Tensor) -> Tensor:
    return scale.reshape(-1, *([1] * (like.ndim - 1)))


def diffusion_scales(
    alphas_cumprod: Float[Tensor, "t"], timesteps: Int[Tensor, "b"]
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Return (signal_scale, noise_scale) = (sqrt(abar), sqrt(1 - abar)) of each item.

    Args:
        alphas_cumprod: cumulative product abar of a schedule, in [0, 1].
        timesteps: integer index into it, one per item.
    """
    abar = alphas_cumprod[timesteps]
    return abar.sqrt(), (1.0 - abar).sqrt()


def flow_scales(
    noise_levels: Float[Tensor, "b"],
) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
    """Return (signal_scale, noise_scale) = (1 - s, s) of each item of a flow-matching model.

    Args:
        noise_levels: s in [0, 1], one per item.
    """
    return 1.0 - noise_levels, noise_levels


def shift_noise_levels(noise_levels: Float[Tensor, "b"], shift: float) -> Float[Tensor, "b"]:
    """Return k s / (1 + (k - 1) s), which moves levels towards the noise for k > 1.

    0 and 1 stay where they are and 1 / k inverts k (Esser et al. 2024, eq. 23).

    Args:
        noise_levels: s in [0, 1].
        shift: k, positive; 1 changes nothing.
    """
    return shift * noise_levels / (1.0 + (shift - 1.0) * noise_levels)


def add_noise(
    latents: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    signal_scale: Float[Tensor, "b"],
    noise_scale: Float[Tensor, "b"],
) -> Float[Tensor, "b ..."]:
    """Return the noisy latents, signal_scale * latents + noise_scale * noise."""
    return _per_item(signal_scale, latents) * latents + _per_item(noise_scale, latents) * noise


def check_schedule(alphas_cumprod: Float[Tensor, "t"], prediction_type: str) -> None:
    """Refuse a schedule that the model's kind of prediction cannot invert.

    Raises:
        ValueError: if the prediction is "epsilon" and some step holds no signal, since the clean
            latent would need a division by zero; or if ``prediction_type`` is unknown.
    """
    _one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon" and bool((alphas_cumprod <= 0).any()):
        raise ValueError(
            "The schedule reaches zero signal (alphas_cumprod = 0), which an 'epsilon' prediction "
            "cannot be inverted at; expected prediction_type 'v_prediction', or a schedule without "
            "rescale_betas_zero_snr. Correct scheduler/scheduler_config.json of the model."
        )


def split_prediction(
    prediction: Float[Tensor, "b ..."],
    noisy: Float[Tensor, "b ..."],
    signal_scale: Float[Tensor, "b"],
    noise_scale: Float[Tensor, "b"],
    prediction_type: str,
) -> tuple[Float[Tensor, "b ..."], Float[Tensor, "b ..."]]:
    """Turn a model's prediction into (denoised, noise_pred), its clean latent and its noise.

    With a = signal_scale and s = noise_scale: "epsilon" predicts the noise; "v_prediction" predicts
    v = a * noise - s * clean (Salimans and Ho 2022, appendix D); "flow" predicts noise - clean.

    Raises:
        ValueError: if ``prediction_type`` is unknown.
    """
    _one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    signal, noise = _per_item(signal_scale, noisy), _per_item(noise_scale, noisy)
    if prediction_type == "epsilon":
        return (noisy - noise * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * noisy - noise * prediction, noise * noisy + signal * prediction
    return noisy - noise * prediction, noisy + signal * prediction


def prediction_target(
    latents: Float[Tensor, "b ..."],
    noise: Float[Tensor, "b ..."],
    signal_scale: Float[Tensor, "b"],
    noise_scale: Float[Tensor, "b"],
    prediction_type: str,
) -> Float[Tensor, "b ..."]:
    """Return what a perfect model would predict, the target of its training; see
    `split_prediction`, which inverts it.

    Raises:
        ValueError: if ``prediction_type`` is unknown.
    """
    _one_of("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow":
        return noise - latents
    return _per_item(signal_scale, noise) * noise - _per_item(noise_scale, latents) * latents


def classifier_free_guidance(
    cond: Float[Tensor, "b ..."],
    uncond: Float[Tensor, "b ..."],
    scale: float,
    convention: str = "standard",
) -> Float[Tensor, "b ..."]:
    """Combine a conditional and an unconditional prediction (Ho and Salimans 2022).

    Args:
        cond: prediction with the prompt.
        uncond: prediction with the negative prompt.
        scale: guidance scale.
        convention: "standard" is uncond + scale * (cond - uncond); "threestudio" is
            cond + scale * (cond - uncond), that is the standard form at scale + 1.

    Raises:
        ValueError: if ``convention`` is unknown.
    """
    _one_of("convention", convention, GUIDANCE_CONVENTIONS)
    base = uncond if convention == "standard" else cond
    return base + scale * (cond - uncond)


def perp_neg_guidance(
    cond: Float[Tensor, "b ..."],
    uncond: Float[Tensor, "b ..."],
    negatives: Float[Tensor, "b k ..."],
    weights: Float[Tensor, "b k"],
    scale: float,
) -> Float[Tensor, "b ..."]:
    """Guide away from ``k`` negative prompts, perpendicular to the positive one (Perp-Neg).

    With e = prediction - uncond: uncond + scale * (e_pos + sum_i w_i * (e_i - proj_{e_pos} e_i)),
    the projection being taken over all of one latent's dimensions (Armandpour et al. 2023, eq. 7).

    Args:
        weights: one weight per negative, usually negative numbers.
    """
    positive = cond - uncond
    others = negatives - uncond.unsqueeze(1)
    flat_positive, flat_others = positive.flatten(1).unsqueeze(1), others.flatten(2)
    squared = (flat_positive * flat_positive).sum(-1, keepdim=True)
    tiny = torch.finfo(squared.dtype).tiny
    along = (flat_others * flat_positive).sum(-1, keepdim=True) / squared.clamp_min(tiny)
    perpendicular = flat_others - along * flat_positive
    pushed = (weights.unsqueeze(-1) * perpendicular).sum(1).reshape(positive.shape)
    return uncond + scale * (positive + pushed)


def sds_weight(
    strategy: str, signal_scale: Float[Tensor, "b"], noise_scale: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """Return the weight w of the score distillation gradient w * (noise_pred - noise).

    "sds" is noise_scale^2 = 1 - abar (DreamFusion), "uniform" is 1, "fantasia3d" is
    signal_scale * noise_scale^2 = sqrt(abar) * (1 - abar).

    Raises:
        ValueError: if ``strategy`` is unknown.
    """
    _one_of("weighting_strategy", strategy, WEIGHTING_STRATEGIES)
    if strategy == "uniform":
        return torch.ones_like(noise_scale)
    weight = noise_scale**2
    return signal_scale * weight if strategy == "fantasia3d" else weight


def flow_weight(
    strategy: str, signal_scale: Float[Tensor, "b"], noise_scale: Float[Tensor, "b"]
) -> Float[Tensor, "b"]:
    """Return the weight w of the flow-matching gradient w * (velocity_pred - (noise - clean)).

    With noise level s: "uniform" is 1; "epsilon" is 1 - s, which gives noise_pred - noise with
    weight 1; "reconstruction" is s, which gives clean - denoised.

    Raises:
        ValueError: if ``strategy`` is unknown.
    """
    _one_of("weighting_strategy", strategy, FLOW_WEIGHTINGS)
    if strategy == "uniform":
        return torch.ones_like(noise_scale)
    return signal_scale if strategy == "epsilon" else noise_scale


def weighted_residual(
    prediction: Float[Tensor, "b ..."],
    reference: Float[Tensor, "b ..."],
    weight: Float[Tensor, "b"],
) -> Float[Tensor, "b ..."]:
    """Return w * (prediction - reference), the gradient with respect to the latents.

    The reference is the drawn noise for SDS (DreamFusion, eq. 3) and the noise that the second,
    tuned score predicts for VSD (ProlificDreamer, eq. 9); with flow velocities in both places it is
    the flow-matching form, whose weight noise_scale equals the x0-reconstruction loss and whose
    weight signal_scale equals the noise form with weight 1.
    """
    return _per_item(weight, prediction) * (prediction - reference)


def amplify_motion(
    residual: Float[Tensor, "b ..."], scale: float, frame_dim: int = 2
) -> Float[Tensor, "b ..."]:
    """Scale how a clip's residual differs from its mean over the frames (Align Your Gaussians).

    mean + scale * (residual - mean); 1 changes nothing, larger values ask for more motion.

    Args:
        residual: noise_pred - noise of a clip.
        scale: factor of the part that changes over time.
        frame_dim: which dimension counts the frames, 2 for (b, c, f, h, w).
    """
    mean = residual.mean(dim=frame_dim, keepdim=True)
    return mean + scale * (residual - mean)


def rescale_denoised(
    denoised: Float[Tensor, "b ..."],
    denoised_cond: Float[Tensor, "b ..."],
    group_size: int,
    factor: float,
) -> Float[Tensor, "b ..."]:
    """Pull the contrast of a guided clean latent towards the unguided conditional one.

    factor * f * denoised + (1 - factor) * denoised, f = std(denoised_cond) / std(denoised) over all
    views, channels and pixels of a group (Lin et al. 2023, eq. 15-16; per group as in MVDream).

    Args:
        denoised: clean latents after classifier-free guidance, groups contiguous.
        denoised_cond: clean latents of the conditional prediction alone.
        group_size: number of views (or frames) that share one factor.
        factor: strength in [0, 1]; 0 returns ``denoised``.

    Raises:
        ValueError: if the batch is no multiple of ``group_size``.
    """
    if denoised.shape[0] % group_size:
        raise ValueError(
            f"The batch holds {denoised.shape[0]} views; expected a multiple of {group_size}. "
            "Pass whole view groups, the views of one object next to each other."
        )
    if factor == 0:
        return denoised
    # The offset keeps 0/0 finite and is the published one.
    std_cond = denoised_cond.reshape(-1, group_size, *denoised.shape[1:]).flatten(1).std(1) + 1e-8
    std = denoised.reshape(-1, group_size, *denoised.shape[1:]).flatten(1).std(1) + 1e-8
    ratio = (std_cond / std).repeat_interleave(group_size)
    return denoised * _per_item(factor * ratio + (1.0 - factor), denoised)


def score_distillation_loss(
    latents: Float[Tensor, "b ..."],
    gradient: Float[Tensor, "b ..."],
    grad_clip: float | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "b ..."]]:
    """Return (loss, gradient as used), with d loss / d latents = gradient / b exactly.

    loss = 0.5 * ||latents - sg(latents - gradient)||^2 / b. The x0-reconstruction loss is the same
    call with gradient = latents - target. NaN becomes 0 and infinities the largest finite numbers,
    then values are clamped to [-grad_clip, grad_clip]. Not differentiable in ``gradient``.
    """
    used = torch.nan_to_num(gradient.detach())
    if grad_clip is not None:
        used = used.clamp(-grad_clip, grad_clip)
    # Squaring `latents - target` would round a small gradient away where the latents are large;
    # the second term is zero and carries the derivative, which so is `used` to the last bit.
    carrier = ((latents - latents.detach()) * used).sum()
    return (0.5 * (used * used).sum() + carrier) / latents.shape[0], used
