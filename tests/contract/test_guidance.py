"""The call of a guidance and the gradients of Stable Diffusion's: section 4.11.

The prior is a tiny Stable Diffusion of random weights. What its U-Net was asked and answered is
recorded, and the formulas of the contract are worked out from the record alone.
"""

import pytest
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.models.prompt_processors.base import PromptProcessorOutput
from threestudio.utils.base import BaseModule, BaseObject

from tests.fixtures.model_folders import write_stable_diffusion_folder

VIEWS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("contract") / "sd")


@pytest.fixture(scope="module")
def prompt_utils():
    processor = threestudio.find("dummy-prompt-processor")({"prompt": "a cube"})
    empty = processor()
    g = torch.Generator().manual_seed(1)
    fields = {name: torch.randn(n, 5, 24, generator=g) for name, n in (
        ("text_embeddings", 1), ("uncond_text_embeddings", 1), ("text_embeddings_vd", 4),
        ("uncond_text_embeddings_vd", 4))}  # fmt: skip
    return PromptProcessorOutput(
        **fields, directions=empty.directions, direction2idx=empty.direction2idx,
        use_perp_neg=False,
    )  # fmt: skip


@pytest.fixture
def batch():
    """Latents as images, and all that a camera batch holds besides."""
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(VIEWS, 8, 8, 4, generator=g).requires_grad_()
    return {
        "rgb": latents, "rgb_as_latents": True, "elevation": torch.tensor([0.0, 10.0]),
        "azimuth": torch.tensor([0.0, 100.0]), "camera_distances": torch.ones(VIEWS),
        "c2w": torch.eye(4).expand(VIEWS, 4, 4), "mvp_mtx": torch.eye(4).expand(VIEWS, 4, 4),
        "fovy": torch.ones(VIEWS), "rays_o": torch.zeros(VIEWS, 2, 2, 3), "height": 8, "width": 8,
        "light_positions": torch.zeros(VIEWS, 3), "a_key_of_somebody_else": "tolerated",
    }  # fmt: skip


class Recorded:
    """A guidance whose U-Net is watched."""

    def __init__(self, folder, name="stable-diffusion-guidance", **cfg):
        self.guidance = threestudio.find(name)(
            {"pretrained_model_name_or_path": str(folder), "image_size": 16, **cfg}
        )
        self.calls = []
        self.guidance.unet.register_forward_hook(
            lambda module, args, kwargs, out: self.calls.append((args, kwargs, out.sample)),
            with_kwargs=True,
        )

    def __call__(self, prompt_utils, batch):
        self.calls.clear()
        out = self.guidance(prompt_utils=prompt_utils, **batch)
        ((args, kwargs, answer),) = self.calls
        self.noisy, self.timesteps = args[0][:VIEWS], args[1][:VIEWS]
        self.text = kwargs["encoder_hidden_states"]
        self.cond, self.uncond = answer[:VIEWS], answer[VIEWS : 2 * VIEWS]
        self.rest = answer[2 * VIEWS :]
        return out


def scaled_linear_abar():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def drawn_noise(recorded, batch):
    """(abar, epsilon) by inverting noisy = sqrt(abar) z + sqrt(1 - abar) epsilon."""
    abar = scaled_linear_abar()[recorded.timesteps].float().view(-1, 1, 1, 1)
    latents = batch["rgb"].detach().permute(0, 3, 1, 2)
    return abar, (recorded.noisy - abar.sqrt() * latents) / (1 - abar).sqrt()


def gradient_of(out, batch):
    batch["rgb"].grad = None
    out["loss_sds"].backward()
    return batch["rgb"].grad.permute(0, 3, 1, 2)


WEIGHTS = {
    "sds": lambda abar: 1 - abar,
    "uniform": lambda abar: torch.ones_like(abar),
    "fantasia3d": lambda abar: abar.sqrt() * (1 - abar),
}


@pytest.mark.parametrize("strategy", WEIGHTS)
def test_gradient_of_score_distillation(folder, prompt_utils, batch, strategy):
    recorded = Recorded(folder, guidance_scale=7.0, weighting_strategy=strategy)
    out = recorded(prompt_utils, batch)
    abar, noise = drawn_noise(recorded, batch)
    guided = recorded.cond + 7.0 * (recorded.cond - recorded.uncond)
    expected = WEIGHTS[strategy](abar) * (guided - noise)
    assert torch.allclose(gradient_of(out, batch), expected / VIEWS, rtol=1e-3, atol=1e-4)
    # Half the squared gradient, divided by the batch; its norm is reported beside.
    assert out["loss_sds"].item() == pytest.approx(expected.square().sum().item() / 2 / VIEWS, 1e-3)
    assert float(out["grad_norm"]) == pytest.approx(expected.norm().item(), rel=1e-3)
    # The text of each camera's direction, conditional rows first.
    text = prompt_utils.get_text_embeddings(
        batch["elevation"], batch["azimuth"], batch["camera_distances"], True
    )
    assert torch.equal(recorded.text, text)


def test_perp_neg_combines_four_predictions(folder, prompt_utils, batch):
    recorded = Recorded(folder, guidance_scale=3.0, weighting_strategy="uniform")
    with_negatives = PromptProcessorOutput(**{**vars(prompt_utils), "use_perp_neg": True})
    out = recorded(with_negatives, batch)
    _, weights = with_negatives.get_text_embeddings_perp_neg(
        batch["elevation"], batch["azimuth"], batch["camera_distances"], True
    )
    _, noise = drawn_noise(recorded, batch)
    positive = recorded.cond - recorded.uncond
    rows = []
    for item in range(VIEWS):
        pushed = positive[item].clone()
        for k in range(2):
            other = recorded.rest[2 * item + k] - recorded.uncond[item]
            along = (other * positive[item]).sum() / positive[item].square().sum()
            pushed += weights[item, k] * (other - along * positive[item])
        rows.append(recorded.uncond[item] + 3.0 * pushed)
    expected = torch.stack(rows) - noise
    assert torch.allclose(gradient_of(out, batch), expected / VIEWS, rtol=1e-3, atol=1e-3)


def test_images_are_encoded_and_carry_the_gradient(folder, prompt_utils, batch):
    recorded = Recorded(folder)
    rgb = torch.rand(VIEWS, 12, 20, 3).requires_grad_()
    out = recorded(prompt_utils, {**batch, "rgb": rgb, "rgb_as_latents": False})
    out["loss_sds"].backward()
    assert rgb.grad.abs().sum() > 0 and out["loss_sds"].ndim == 0
    assert {"loss_sds", "grad_norm", "min_step", "max_step"} <= set(out)
    assert isinstance(recorded.guidance, BaseObject)
    assert not isinstance(recorded.guidance, torch.nn.Module)


def test_schedules_follow_the_step(folder, prompt_utils, batch):
    recorded = Recorded(
        folder,
        min_step_percent=OmegaConf.create([0, 0.9, 0.02, 100]),
        max_step_percent=OmegaConf.create([0, 0.98, 0.5, 100]),
        grad_clip=OmegaConf.create([0, 0.5, 0.001, 100]),
        weighting_strategy="uniform",
    )
    guidance = recorded.guidance
    for step, (low, high, clip) in {0: (900, 980, 0.5), 50: (460, 740, 0.2505),
                                    100: (20, 500, 0.001)}.items():  # fmt: skip
        guidance.do_update_step(0, step)
        out = recorded(prompt_utils, batch)
        assert (out["min_step"], out["max_step"]) == (low, high)
        assert (recorded.timesteps >= low).all() and (recorded.timesteps <= high).all()
        assert gradient_of(out, batch).abs().max().item() == pytest.approx(clip / VIEWS, rel=1e-3)


def test_a_gradient_that_is_not_a_number_does_no_harm(folder, prompt_utils, batch):
    recorded = Recorded(folder)
    recorded.guidance.unet.register_forward_hook(
        lambda module, args, out: setattr(out, "sample", out.sample * float("nan"))
    )
    assert gradient_of(recorded(prompt_utils, batch), batch).abs().max() == 0


def test_variational_guidance_is_a_module_that_stores_what_it_trains(folder, prompt_utils, batch):
    recorded = Recorded(
        folder, "stable-diffusion-vsd-guidance", pretrained_model_name_or_path_lora=str(folder)
    )
    guidance = recorded.guidance
    assert isinstance(guidance, BaseModule)
    out = guidance(prompt_utils=prompt_utils, **batch)
    assert {"loss_vsd", "loss_lora", "grad_norm"} <= set(out)
    (out["loss_vsd"] + out["loss_lora"]).backward()
    assert batch["rgb"].grad.abs().sum() > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in guidance.parameters())
    roots = {key.split(".")[0] for key in guidance.state_dict()}
    assert roots == {"camera_embedding", "lora_layers"}
    embedding = {k: v.shape for k, v in guidance.state_dict().items() if k.startswith("camera")}
    assert embedding["camera_embedding.linear_1.weight"][1] == 16  # a flattened 4 x 4 matrix
