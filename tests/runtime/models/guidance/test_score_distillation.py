import pytest
import torch
from threestudio.models.guidance import score_distillation as sd


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stable_diffusion_alphas():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def test_published_weights_of_stable_diffusion():
    # Numbers of the specification: sigma / alpha and 1 - abar at three timesteps.
    signal, noise = sd.diffusion_scales(stable_diffusion_alphas(), torch.tensor([20, 500, 980]))
    assert (noise / signal).tolist() == pytest.approx([0.138, 1.62, 13.0], rel=5e-3)
    assert sd.sds_weight("sds", signal, noise).tolist() == pytest.approx(
        [0.019, 0.72, 0.994], rel=2e-2
    )


def test_weights_by_hand():
    signal, noise = torch.tensor([0.6]), torch.tensor([0.8])
    assert sd.sds_weight("sds", signal, noise).item() == pytest.approx(0.64)
    assert sd.sds_weight("uniform", signal, noise).item() == 1.0
    assert sd.sds_weight("fantasia3d", signal, noise).item() == pytest.approx(0.6 * 0.64)


@pytest.mark.parametrize(
    "kind, prediction",
    [
        ("epsilon", lambda clean, noise, a, s: noise),
        ("v_prediction", lambda clean, noise, a, s: a * noise - s * clean),
        ("flow", lambda clean, noise, a, s: noise - clean),
    ],
)
def test_a_perfect_prediction_gives_back_what_was_mixed(kind, prediction):
    clean, noise = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    scale = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64)
    other = 1 - scale if kind == "flow" else (1 - scale**2).sqrt()
    a, s = scale.view(-1, 1, 1, 1), other.view(-1, 1, 1, 1)
    noisy = sd.add_noise(clean, noise, scale, other)
    denoised, noise_pred = sd.split_prediction(
        prediction(clean, noise, a, s), noisy, scale, other, kind
    )
    torch.testing.assert_close(denoised, clean)
    torch.testing.assert_close(noise_pred, noise)
    target = sd.prediction_target(clean, noise, scale, other, kind)
    torch.testing.assert_close(target, prediction(clean, noise, a, s))


def test_no_signal_left_is_fine_for_v_prediction():
    # abar = 0: the noisy latent is the noise, and v = -clean.
    clean, noise = draw(1, 2, 3, 3), draw(1, 2, 3, 3, seed=1)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert torch.equal(sd.add_noise(clean, noise, zero, one), noise)
    denoised, noise_pred = sd.split_prediction(-clean, noise, zero, one, "v_prediction")
    assert torch.equal(denoised, clean)
    assert torch.equal(noise_pred, noise)
    sd.check_schedule(torch.tensor([0.9, 0.0]), "v_prediction")


def test_no_signal_left_is_refused_for_epsilon():
    with pytest.raises(ValueError, match="zero signal .* expected prediction_type 'v_prediction'"):
        sd.check_schedule(torch.tensor([0.9, 0.0]), "epsilon")


def test_guidance_conventions_differ_by_one():
    cond, uncond = torch.tensor([[3.0]]), torch.tensor([[1.0]])
    assert sd.classifier_free_guidance(cond, uncond, 7.5).item() == 1 + 7.5 * 2
    assert sd.classifier_free_guidance(cond, uncond, 100.0, "threestudio").item() == 3 + 100 * 2
    torch.testing.assert_close(
        sd.classifier_free_guidance(cond, uncond, 4.0, "threestudio"),
        sd.classifier_free_guidance(cond, uncond, 5.0),
    )


def test_perp_neg_by_hand():
    # Positive direction (2, 0): of the negative (1, 3) only (0, 3) is perpendicular.
    uncond = torch.tensor([[10.0, 10.0]])
    cond = uncond + torch.tensor([[2.0, 0.0]])
    negatives = uncond.unsqueeze(1) + torch.tensor([[[1.0, 3.0], [5.0, 0.0]]])
    weights = torch.tensor([[-0.5, -7.0]])
    got = sd.perp_neg_guidance(cond, uncond, negatives, weights, scale=2.0)
    torch.testing.assert_close(got, torch.tensor([[10 + 2 * 2.0, 10 + 2 * -1.5]]))


def test_perp_neg_with_no_positive_direction_stays_finite():
    uncond = draw(2, 3, 4, 4)
    got = sd.perp_neg_guidance(uncond, uncond, uncond.unsqueeze(1) + 1, torch.ones(2, 1), 5.0)
    torch.testing.assert_close(got, uncond + 5.0)


def test_mvdream_gradient_without_rescale_is_sds_with_weight_sigma_over_alpha():
    alphas = stable_diffusion_alphas()
    latents, noise, noise_pred = (
        draw(4, 4, 3, 3),
        draw(4, 4, 3, 3, seed=1),
        draw(4, 4, 3, 3, seed=2),
    )
    signal, sigma = sd.diffusion_scales(alphas, torch.tensor([20, 300, 700, 980]))
    noisy = sd.add_noise(latents, noise, signal, sigma)
    denoised, _ = sd.split_prediction(noise_pred, noisy, signal, sigma, "epsilon")
    expected = sd.weighted_residual(noise_pred, noise, sigma / signal)
    torch.testing.assert_close(latents - denoised, expected)


def test_named_flow_weights_give_the_noise_form_and_the_reconstruction_form():
    clean, noise, velocity = draw(2, 4, 3, 5, 5), draw(2, 4, 3, 5, 5, seed=1), draw(2, 4, 3, 5, 5)
    signal, level = sd.flow_scales(torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert signal.tolist() == [0.75, 0.25] and level.tolist() == [0.25, 0.75]
    noisy = sd.add_noise(clean, noise, signal, level)
    denoised, noise_pred = sd.split_prediction(velocity, noisy, signal, level, "flow")

    def gradient(strategy):
        weight = sd.flow_weight(strategy, signal, level)
        return sd.weighted_residual(velocity, noise - clean, weight)

    torch.testing.assert_close(gradient("epsilon"), noise_pred - noise)
    torch.testing.assert_close(gradient("reconstruction"), clean - denoised)
    torch.testing.assert_close(gradient("uniform"), velocity - (noise - clean))


def test_shifted_noise_levels_by_hand_and_by_their_laws():
    # 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the ends stay.
    assert sd.shift_noise_levels(torch.tensor([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    levels = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(sd.shift_noise_levels(levels, 1.0), levels)
    there_and_back = sd.shift_noise_levels(sd.shift_noise_levels(levels, 5.0), 0.2)
    torch.testing.assert_close(there_and_back, levels)


def test_rescale_against_a_loop_over_groups():
    denoised, cond = 3 * draw(8, 4, 5, 5), draw(8, 4, 5, 5, seed=1)
    got = sd.rescale_denoised(denoised, cond, group_size=4, factor=0.5)
    for group in (slice(0, 4), slice(4, 8)):
        ratio = (cond[group].std() + 1e-8) / (denoised[group].std() + 1e-8)
        expected = 0.5 * ratio * denoised[group] + 0.5 * denoised[group]
        torch.testing.assert_close(got[group], expected)


def test_full_rescale_gives_the_conditional_contrast():
    denoised, cond = 3 * draw(4, 2, 5, 5), draw(4, 2, 5, 5, seed=1)
    got = sd.rescale_denoised(denoised, cond, group_size=4, factor=1.0)
    assert got.std().item() == pytest.approx(cond.std().item(), rel=1e-6)
    assert sd.rescale_denoised(denoised, cond, 4, 0.0) is denoised


def test_rescale_refuses_incomplete_groups():
    with pytest.raises(ValueError, match="holds 6 views; expected a multiple of 4"):
        sd.rescale_denoised(draw(6, 1, 2, 2), draw(6, 1, 2, 2), 4, 0.5)


def test_motion_amplification_by_hand():
    # Two frames 1 and 3: mean 2, differences -1 and 1.
    residual = torch.tensor([1.0, 3.0]).view(1, 1, 2, 1, 1)
    assert sd.amplify_motion(residual, 30.0).flatten().tolist() == [-28.0, 32.0]
    torch.testing.assert_close(sd.amplify_motion(residual, 1.0), residual)
    assert sd.amplify_motion(residual.transpose(1, 2), 30.0, frame_dim=1).flatten().tolist() == [
        -28.0,
        32.0,
    ]


def test_loss_has_exactly_the_gradient_over_the_batch():
    latents = (1e4 * draw(4, 4, 2, 2)).float().requires_grad_()
    gradient = (1e-4 * draw(4, 4, 2, 2, seed=1)).float()
    loss, used = sd.score_distillation_loss(latents, gradient)
    loss.backward()
    # Bit for bit, although the latents are 1e8 times larger than the gradient; a batch of 4
    # divides without rounding.
    assert torch.equal(latents.grad, gradient / 4)
    assert loss.item() == pytest.approx(0.5 * gradient.square().sum().item() / 4, rel=1e-6)
    assert torch.equal(used, gradient)


def test_reconstruction_is_the_same_loss_with_another_gradient():
    latents, target = draw(2, 3, 2, 2).requires_grad_(), draw(2, 3, 2, 2, seed=1)
    loss, _ = sd.score_distillation_loss(latents, latents - target)
    expected = 0.5 * (latents - target).square().sum() / 2
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, latents)[0], torch.autograd.grad(expected, latents)[0]
    )


def test_bad_values_are_replaced_and_the_rest_clamped():
    latents = torch.zeros(1, 4, requires_grad=True)
    gradient = torch.tensor([[float("nan"), float("inf"), -3.0, 0.25]])
    loss, used = sd.score_distillation_loss(latents, gradient, grad_clip=1.0)
    loss.backward()
    assert used.tolist() == [[0.0, 1.0, -1.0, 0.25]]
    assert latents.grad.tolist() == [[0.0, 1.0, -1.0, 0.25]]


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x, one: sd.split_prediction(x, x, one, one, "eps"),
            "prediction_type is 'eps'; expected one of 'epsilon', 'v_prediction', 'flow'",
        ),
        (
            lambda x, one: sd.prediction_target(x, x, one, one, "eps"),
            "prediction_type is 'eps'; expected one of 'epsilon', 'v_prediction', 'flow'",
        ),
        (
            lambda x, one: sd.sds_weight("dreamfusion", one, one),
            "weighting_strategy is 'dreamfusion'; expected one of 'sds'",
        ),
        (
            lambda x, one: sd.flow_weight("sds", one, one),
            "weighting_strategy is 'sds'; expected one of 'uniform', 'epsilon', 'reconstruction'",
        ),
        (
            lambda x, one: sd.classifier_free_guidance(x, x, 1.0, "diffusers"),
            "convention is 'diffusers'; expected one of 'standard', 'threestudio'",
        ),
    ],
)
def test_unknown_choices_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2), torch.ones(1))
