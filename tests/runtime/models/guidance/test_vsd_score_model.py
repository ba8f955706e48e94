import pytest
import torch
from diffusers import UNet2DConditionModel
from threestudio.models.guidance.vsd_score_model import (
    FrozenScore,
    TunedScore,
    camera_condition,
)
from threestudio.utils.diffusers_folder import load_model

from tests.fixtures.model_folders import FULL_UNET, TINY_UNET

CPU = torch.device("cpu")
ANGLES = (torch.tensor([90.0, 0.0]), torch.tensor([0.0, 90.0]), torch.tensor([2.0, 3.0]))


@pytest.fixture
def frozen(sd_folder):
    return FrozenScore(load_model(sd_folder, "unet", CPU), "epsilon")


@pytest.fixture
def frozen_multiview(multiview_folder):
    return FrozenScore(load_model(multiview_folder, "unet", CPU), "epsilon")


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(2, 4, 8, 8, generator=g)
    text = torch.randn(2, 7, 24, generator=g)
    return noisy, torch.tensor([100, 800]), text


def make_it_learned(score):
    """Give every parameter a value, as training would."""
    g = torch.Generator().manual_seed(8)
    for module in (score.lora_layers, score.camera_embedding):
        for p in module.parameters():
            p.data.normal_(std=0.3, generator=g)


def test_camera_conditions_by_hand():
    matrix = torch.arange(32.0).view(2, 4, 4)
    extrinsics = camera_condition("extrinsics", matrix, None, ANGLES)
    assert torch.equal(extrinsics, torch.arange(32.0).view(2, 16))
    assert torch.equal(camera_condition("mvp", None, matrix, ANGLES), extrinsics)
    half_turn = torch.pi / 2
    expected = torch.tensor([[half_turn, 0.0, 1.0, 2.0], [0.0, 1.0, 0.0, 3.0]])
    torch.testing.assert_close(camera_condition("spherical", None, None, ANGLES), expected)


def test_bad_camera_conditions():
    with pytest.raises(ValueError, match="camera_condition_type is 'pose'; expected one of 'extr"):
        camera_condition("pose", None, None, ANGLES)
    with pytest.raises(ValueError, match="'extrinsics', but the batch holds no c2w"):
        camera_condition("extrinsics", None, torch.zeros(2, 4, 4), ANGLES)
    with pytest.raises(ValueError, match="'mvp', but the batch holds no mvp_mtx"):
        camera_condition("mvp", torch.zeros(2, 4, 4), None, ANGLES)


@pytest.mark.parametrize("kind", ["frozen", "frozen_multiview"])
def test_an_untrained_tuned_score_is_the_frozen_one(kind, inputs, request):
    frozen = request.getfixturevalue(kind)
    tuned = TunedScore(frozen, camera_size=16)
    with torch.no_grad():
        assert torch.equal(tuned.predict(*inputs, camera=torch.randn(2, 16)),
                           frozen.predict(*inputs))


def test_a_tuned_score_is_lora_and_camera_by_hand(frozen, inputs):
    tuned = TunedScore(frozen, camera_size=16)
    make_it_learned(tuned)
    camera = torch.randn(2, 16)
    with torch.no_grad():
        actual = tuned.predict(*inputs, camera=camera)
        before = frozen.predict(*inputs)
        # A U-Net of its own, with B A added to each weight and the camera to the time embedding.
        plain = UNet2DConditionModel(**TINY_UNET).eval()
        plain.load_state_dict(frozen.unet.state_dict())
        state = plain.state_dict()
        factors = dict(tuned.lora_layers.named_parameters())
        for name in {key.rpartition(".lora_")[0] for key in factors}:
            down, up = (factors[f"{name}.lora_{side}.weight"] for side in "AB")
            assert down.shape[0] == up.shape[1] == 4
            state[f"{name}.weight"] += up @ down
        plain.time_embedding.register_forward_hook(
            lambda module, args, out: out + tuned.camera_embedding(camera)
        )
        expected = plain(inputs[0], inputs[1], encoder_hidden_states=inputs[2]).sample
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
        assert (actual - before).abs().max() > 0.05
        assert torch.equal(frozen.predict(*inputs), before)


def test_both_scores_hold_the_same_frozen_tensors(frozen):
    tuned = TunedScore(frozen, camera_size=16)
    ours = {p.data_ptr() for p in frozen.unet.parameters()}
    theirs = {p.data_ptr() for p in tuned.unet.parameters()}
    trained = [*tuned.lora_layers.parameters(), *tuned.camera_embedding.parameters()]
    assert ours < theirs and theirs - ours == {p.data_ptr() for p in trained}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in trained)
    assert not any(p.requires_grad for p in frozen.unet.parameters())
    assert frozen.unet.class_embedding is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_tuned_in_full_precision(dtype, sd_folder, inputs):
    gradients = []
    for precision in (torch.float32, dtype):
        frozen = FrozenScore(load_model(sd_folder, "unet", CPU, precision), "epsilon")
        tuned = TunedScore(frozen, camera_size=16)
        make_it_learned(tuned)
        trained = [*tuned.lora_layers.parameters(), *tuned.camera_embedding.parameters()]
        assert tuned.weights_dtype == precision and {p.dtype for p in trained} == {torch.float32}
        prediction = tuned.predict(*inputs, camera=inputs[0].flatten(1)[:, :16])
        assert prediction.dtype == torch.float32
        # Errors of the size that they have in the mean over a latent of 4 x 64 x 64.
        (1e-5 * inputs[0] * prediction).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    expected, actual = gradients
    # fp16 resolves 1e-3; without the factor the error is 0.1. bf16 resolves 1e-2 at any size.
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    assert (actual - expected).norm() < tolerance * expected.norm()


def test_the_initial_values_leave_the_global_generator_alone(frozen):
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    first = TunedScore(frozen, camera_size=16)
    assert torch.equal(torch.rand(3), expected)
    second = TunedScore(frozen, camera_size=16)
    pairs = zip(first.lora_layers.parameters(), second.lora_layers.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    down = first.lora_layers.get_parameter(
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.lora_A.weight"
    )
    # Standard deviation 1 / rank, of 4 * 32 draws.
    assert down.std().item() == pytest.approx(0.25, rel=0.2)


def test_guidance_is_uncond_plus_scaled_difference(frozen, inputs):
    noisy, timesteps, text = inputs
    uncond_text = torch.randn(2, 7, 24)
    scales = (torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]))
    tuned = TunedScore(frozen, camera_size=16)
    tuned.prediction_type = "v_prediction"
    make_it_learned(tuned)
    camera = torch.randn(2, 16)
    both = torch.cat([text, uncond_text])
    with torch.no_grad():
        cond = tuned.predict(noisy, timesteps, text, camera=camera)
        uncond = tuned.predict(noisy, timesteps, uncond_text, camera=torch.zeros(2, 16))
    for scale in (1.0, 3.0):
        velocity = uncond + scale * (cond - uncond)
        signal, noise_scale = (x.view(2, 1, 1, 1) for x in scales)
        actual = tuned.guided_noise(noisy, timesteps, scales, both, scale, camera=camera)
        torch.testing.assert_close(actual, noise_scale * noisy + signal * velocity,
                                   rtol=1e-4, atol=1e-5)
        assert not actual.requires_grad and not actual.is_inference()


def test_a_multiview_model_sees_a_single_image_as_the_zero_vector(frozen_multiview, inputs):
    assert frozen_multiview.class_vector_size == 32
    with torch.no_grad():
        alone = frozen_multiview.predict(*inputs)
        assert torch.equal(alone, frozen_multiview.predict(*inputs, torch.zeros(2, 32)))
        assert not torch.equal(alone, frozen_multiview.predict(*inputs, torch.ones(2, 32)))


def test_other_class_embeddings_are_refused():
    unet = UNet2DConditionModel(**TINY_UNET, class_embed_type="timestep")
    with pytest.raises(ValueError, match="class_embed_type is 'timestep'.*expected no class emb"):
        FrozenScore(unet, "epsilon")
    with pytest.raises(ValueError, match="num_class_embeds 5"):
        FrozenScore(UNet2DConditionModel(**TINY_UNET, num_class_embeds=5), "epsilon")


def test_a_tuned_score_needs_its_camera(frozen, inputs):
    with pytest.raises(ValueError, match="camera is None; expected the camera condition"):
        TunedScore(frozen, camera_size=16).predict(*inputs)


@pytest.mark.slow
def test_sizes_for_stable_diffusion_2_1():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FULL_UNET).requires_grad_(False)
        tuned = TunedScore(FrozenScore(unet, "v_prediction"), camera_size=16)
    assert sum(p.numel() for p in tuned.lora_layers.parameters()) == 829_952
    assert sum(p.numel() for p in tuned.camera_embedding.parameters()) == 1_661_440
