"""IP-Adapter files of our own: they begin without influence, and the ordinary loader reads them."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from custom.fourd.diffusion.ip_adapter import image_arguments, ip_adapter_kind, load_ip_adapter
from custom.fourd.diffusion.layer_contexts import set_layer_contexts
from custom.fourd.scripts.adapter_weights import (
    adapter_weights,
    flat_names,
    fresh_adapter_weights,
    weights_without_adapter,
)
from tests.fixtures.ip_adapters import VISION_WIDTH, ip_adapter_weights
from tests.fixtures.model_folders import TINY_UNET


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**TINY_UNET).eval()


def predict(unet, **image):
    g = torch.Generator().manual_seed(1)
    noisy, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 6, 24, generator=g)
    with torch.no_grad():
        return unet(noisy, 400, encoder_hidden_states=text, **image).sample


def prompt_of(seed):
    states = torch.randn(2, 7, VISION_WIDTH, generator=torch.Generator().manual_seed(seed))
    return image_arguments(states)


def test_it_begins_without_influence_and_learns(unet):
    plain = predict(unet)
    load_ip_adapter(unet, fresh_adapter_weights(unet, VISION_WIDTH, 32, num_tokens=3), 1.0)
    assert ip_adapter_kind(unet) == "plus"
    torch.testing.assert_close(predict(unet, **prompt_of(0)), plain)
    tokens = unet.encoder_hid_proj(prompt_of(0)["added_cond_kwargs"]["image_embeds"])[0]
    assert tokens.shape == (2, 1, 3, 24)
    unet.requires_grad_(True)
    text = torch.randn(2, 6, 24, generator=torch.Generator().manual_seed(2))
    unet(torch.ones(2, 4, 8, 8), 400, text, **prompt_of(0)).sample.square().sum().backward()
    values = [p for name, p in unet.named_parameters() if "to_v_ip" in name]
    assert values and all(float(p.grad.abs().max()) > 0 for p in values)


def test_weights_come_back_under_the_published_names(unet):
    """Against weights written by hand under the names of the published files."""
    given = ip_adapter_weights(unet, "plus")
    own = {key: value.clone() for key, value in unet.state_dict().items()}
    load_ip_adapter(unet, given)
    set_layer_contexts(unet)
    back = adapter_weights(unet)
    for part, state in given.items():
        assert back[part].keys() == state.keys(), part
        for key, value in state.items():
            assert torch.equal(back[part][key], value), key
    plain = weights_without_adapter(unet)
    assert plain.keys() == own.keys()
    assert all(torch.equal(plain[key], own[key]) for key in own)


def test_a_file_is_read_by_the_ordinary_loader(unet, tmp_path):
    weights = fresh_adapter_weights(unet, VISION_WIDTH, 32)
    for key in weights["ip_adapter"]:
        torch.nn.init.normal_(weights["ip_adapter"][key], std=0.3)
    save_file(flat_names(weights), tmp_path / "adapter.safetensors")
    load_ip_adapter(unet, str(tmp_path), 1.0, weight_name="adapter.safetensors")
    from_file = predict(unet, **prompt_of(3))
    load_ip_adapter(unet, weights, 1.0)
    assert torch.equal(predict(unet, **prompt_of(3)), from_file)
    assert (predict(unet, **prompt_of(4)) - from_file).abs().max() > 1e-3
