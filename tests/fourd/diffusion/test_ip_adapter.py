"""IP-Adapters from state dicts: against diffusers' own pipeline door, and what is refused."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import IPAdapterMixin
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from custom.fourd.diffusion.ip_adapter import (
    clip_pixels,
    image_arguments,
    image_features,
    ip_adapter_kind,
    load_ip_adapter,
    set_ip_adapter_scale,
    without_image,
)
from tests.fixtures.ip_adapters import PLUS_TOKENS, image_prompt, ip_adapter_weights
from tests.fixtures.model_folders import TINY_UNET


@pytest.fixture(scope="module")
def made():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_UNET).eval().requires_grad_(False)


@pytest.fixture
def unet(made):
    return copy.deepcopy(made)


def draws(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def predict(unet, **image):
    text = draws(2, 6, 24, seed=2)
    with torch.no_grad():
        return unet(draws(2, 4, 8, 8), 400, encoder_hidden_states=text, **image).sample


@pytest.mark.parametrize("kind, n_tokens", [("base", 4), ("plus", PLUS_TOKENS)])
def test_the_adapter_is_loaded_at_its_scale(unet, kind, n_tokens):
    weights = ip_adapter_weights(unet, kind)
    kept = {part: dict(state) for part, state in weights.items()}
    plain = predict(unet)

    class Pipeline(IPAdapterMixin):
        unet_name = "unet"

    theirs = Pipeline()
    theirs.unet = copy.deepcopy(unet)
    theirs.load_ip_adapter(copy.deepcopy(weights), "", None, image_encoder_folder=None)
    theirs.set_ip_adapter_scale(0.5)
    load_ip_adapter(unet, weights)
    image = image_arguments(image_prompt(kind, 2))
    assert torch.equal(predict(unet, **image), predict(theirs.unet, **image))
    assert ip_adapter_kind(unet) == kind
    tokens = unet.encoder_hid_proj(image["added_cond_kwargs"]["image_embeds"])[0]
    assert tokens.shape == (2, 1, n_tokens, 24)
    assert not any(parameter.requires_grad for parameter in unet.parameters())
    set_ip_adapter_scale(unet, 0.0)
    torch.testing.assert_close(predict(unet, **image), plain)
    assert all(weights[part].keys() == kept[part].keys() for part in kept)


def test_the_middle_has_the_last_number_of_the_file(unet):
    """The files number cross-attentions as the library lists them, not as they run."""
    weights = ip_adapter_weights(unet, "base")
    load_ip_adapter(unet, weights)
    last = max(int(key.split(".")[0]) for key in weights["ip_adapter"])
    middle = unet.mid_block.attentions[0].transformer_blocks[0].attn2.processor
    assert torch.equal(middle.to_k_ip[0].weight, weights["ip_adapter"][f"{last}.to_k_ip.weight"])


def test_a_folder_is_read_as_safetensors(unet, tmp_path):
    weights = ip_adapter_weights(unet, "base")
    flat = {f"{part}.{key}": v for part, state in weights.items() for key, v in state.items()}
    save_file(flat, tmp_path / "ip-adapter.safetensors")
    other = copy.deepcopy(unet)
    load_ip_adapter(unet, weights)
    load_ip_adapter(other, str(tmp_path), weight_name="ip-adapter.safetensors")
    image = image_arguments(image_prompt("base", 2))
    assert torch.equal(predict(unet, **image), predict(other, **image))


def test_features_of_images():
    torch.manual_seed(0)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=20, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
            image_size=16, patch_size=8, projection_dim=12,
        )
    ).eval()  # fmt: skip
    pixels = draws(2, 3, 16, 16)
    with torch.no_grad():
        states = encoder(pixels, output_hidden_states=True)
        black = encoder(torch.zeros_like(pixels), output_hidden_states=True)
    # One state more than layers: the one before the last layer's output.
    assert len(states.hidden_states) == 4
    assert torch.equal(image_features(encoder, pixels, "plus"), states.hidden_states[2])
    assert torch.equal(image_features(encoder, pixels, "base"), states.image_embeds)
    assert torch.equal(without_image(encoder, pixels, "plus"), black.hidden_states[2])
    assert torch.equal(without_image(encoder, pixels, "base"), torch.zeros(2, 12))


def test_what_does_not_fit_is_refused(unet):
    assert ip_adapter_kind(unet) is None
    with pytest.raises(ValueError, match=r"keys \['image_proj'\]; expected image_proj and ip_ad"):
        load_ip_adapter(unet, {"image_proj": {}})
    for name in ("ip-adapter.bin", None):
        with pytest.raises(ValueError, match="expected a .safetensors file. Pickled weights"):
            load_ip_adapter(unet, "folder", weight_name=name)
    load_ip_adapter(unet, ip_adapter_weights(unet, "base"))
    unet.encoder_hid_proj.image_projection_layers[0] = torch.nn.Identity()
    with pytest.raises(ValueError, match="projects images by Identity; expected ImageProjection"):
        ip_adapter_kind(unet)


def test_pixels_for_clip_are_the_middle_square():
    """A wide picture: left third red, middle third grey, right third blue."""
    rgb = torch.zeros(1, 8, 24, 3)
    rgb[:, :, :8, 0], rgb[:, :, 8:16], rgb[:, :, 16:, 2] = 1, 0.5, 1
    pixels = clip_pixels(rgb, 4)
    # CLIP's published mean and deviation of each channel.
    expected = [(0.5 - 0.48145466) / 0.26862954, (0.5 - 0.4578275) / 0.26130258]
    expected.append((0.5 - 0.40821073) / 0.27577711)
    torch.testing.assert_close(pixels, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 4, 4))
