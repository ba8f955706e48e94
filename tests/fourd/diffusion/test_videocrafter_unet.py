import math

import pytest
import torch
from diffusers import UNet3DConditionModel
from threestudio.utils.diffusers_folder import load_model

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.diffusion.videocrafter_unet import VideoCrafterUNet
from tests.fixtures.model_folders import _write_json, ldm_unet_shapes
from tests.fixtures.video_models import TINY_VIDEOCRAFTER, write_videocrafter_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_videocrafter_folder(tmp_path_factory.mktemp("priors") / "videocrafter")


@pytest.fixture(scope="module")
def unet(folder):
    return load_model(folder, "unet", CPU)


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 3, 4, 6, generator=g), torch.randn(2, 7, 24, generator=g)


@torch.no_grad()
def test_without_the_rate_it_is_the_network_of_zeroscope(unet, inputs):
    noisy, text = inputs
    plain = UNet3DConditionModel(**TINY_VIDEOCRAFTER).eval()
    weights = {k: v for k, v in unet.state_dict().items() if not k.startswith("fps_embedding")}
    plain.load_state_dict(weights)
    expected = plain(noisy, torch.tensor([10, 700]), text).sample
    silent = VideoCrafterUNet(**TINY_VIDEOCRAFTER).eval()
    silent.load_state_dict(unet.state_dict())
    silent.fps_embedding.linear_2.weight.zero_()
    silent.fps_embedding.linear_2.bias.zero_()
    got, told = (
        model(noisy, torch.tensor([10, 700]), text, fps=8).sample for model in (silent, unet)
    )
    # Weights at other addresses of memory may take another path through the same sums.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (told - expected).abs().max() > 1e-2


def mlp(module, sinusoid):
    hidden = sinusoid @ module.linear_1.weight.T + module.linear_1.bias
    return torch.nn.functional.silu(hidden) @ module.linear_2.weight.T + module.linear_2.bias


def sinusoid(number, width=8):
    """Cosines, then sines, of geometrically falling frequencies."""
    angles = [number * 10_000 ** (-i / (width // 2)) for i in range(width // 2)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


@torch.no_grad()
def test_the_embedding_of_the_rate_is_added_to_that_of_the_timestep(unet, inputs):
    noisy, text = inputs
    seen = []
    hook = unet.time_embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    rates = torch.tensor([8, 24])
    out = unet(noisy, torch.tensor([10, 700]), text, rates, return_dict=False)
    hook.remove()
    assert isinstance(out, tuple) and out[0].shape == noisy.shape
    expected = torch.stack(
        [
            mlp(unet.time_embedding, sinusoid(step)) + mlp(unet.fps_embedding, sinusoid(rate))
            for step, rate in ((10, 8), (700, 24))
        ]
    )
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    # A clip's prediction is its own, whatever rate its neighbour has; one rate serves all.
    both = unet(noisy, torch.tensor([10, 700]), text, 24).sample
    torch.testing.assert_close(both[1], out[0][1], rtol=1e-4, atol=1e-5)
    assert (both[0] - out[0][0]).abs().max() > 1e-2


def test_frames_see_each_other(unet, inputs):
    noisy, text = inputs
    noisy.requires_grad_()
    unet(noisy, 500, text, 8).sample[:, :, 0].sum().backward()
    assert (noisy.grad.abs().amax((0, 1, 3, 4)) > 0).all()


def test_the_name_and_the_keys_of_a_public_conversion_are_read(unet, tmp_path):
    folder = write_videocrafter_folder(tmp_path)
    more = {"act_fn": "silu", "norm_eps": 1e-5, "_class_name": "UNet3DVideoCrafterConditionModel"}
    _write_json(folder / "unet" / "config.json", {**TINY_VIDEOCRAFTER, **more})
    again = load_model(folder, "unet", CPU)
    assert type(again) is VideoCrafterUNet
    assert all(torch.equal(value, unet.state_dict()[k]) for k, value in again.state_dict().items())


def original_sizes(channels, attends, text, head=64, layers=2):
    """Numbers in every tensor of the original network, by the order in which its code builds it."""
    sizes = []

    def affine(*shape):
        sizes.extend([math.prod(shape), shape[0]])

    def norm(c):
        affine(c)

    def temporal_convolution(c):
        for _ in range(4):
            norm(c)
            affine(c, c, 3)

    def temporal_transformer(c, inner):
        norm(c)
        affine(inner, c)
        for _ in range(2):
            sizes.extend([inner * inner] * 3)
            affine(inner, inner)
        affine(8 * inner, inner)
        affine(inner, 4 * inner)
        for _ in range(3):
            norm(inner)
        affine(c, inner)

    for shape in ldm_unet_shapes(channels, layers, attends, text, camera=None).values():
        sizes.append(math.prod(shape))
    affine(4 * channels[0], channels[0])
    affine(4 * channels[0], 4 * channels[0])
    temporal_transformer(channels[0], 8 * head)
    for level, width in enumerate(channels):
        for _ in range(2 * layers + 1):
            temporal_convolution(width)
            if attends[level]:
                temporal_transformer(width, width)
    for _ in range(2):
        temporal_convolution(channels[-1])
    temporal_transformer(channels[-1], channels[-1])
    return sorted(sizes)


def test_every_tensor_of_the_original_has_its_place(unet):
    ours = sorted(value.numel() for value in unet.state_dict().values())
    assert ours == original_sizes((8, 16), (True, False), text=24, head=8, layers=1)


@pytest.mark.slow
def test_the_defaults_are_videocrafter2s():
    with torch.device("meta"):
        full = VideoCrafterUNet()
    ours = sorted(value.numel() for value in full.state_dict().values())
    assert ours == original_sizes((320, 640, 1280, 1280), (True, True, True, False), text=1024)
    assert sum(ours) == pytest.approx(1413.3e6, rel=1e-4)
