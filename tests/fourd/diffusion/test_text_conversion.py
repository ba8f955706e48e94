"""Text encoders of checkpoints against a slow OpenCLIP by its original names."""

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from custom.fourd.diffusion import text_conversion as conversion
from tests.fixtures import original_layouts as layouts
from tests.fixtures.original_references import open_clip_text

TINY = {"width": 128, "layers": 3, "words": 40, "length": 12}


@torch.no_grad()
def test_the_penultimate_layer_is_the_converted_model_s_output():
    state = layouts.random_state(layouts.open_clip_shapes(**TINY))
    config = conversion.open_clip_config(state)
    model = CLIPTextModel(CLIPTextConfig(**config)).eval()
    model.load_state_dict(conversion.convert_open_clip(state))
    tokens = torch.tensor([[38, 3, 7, 39, 0, 0, 0, 0, 0, 0, 0, 0]])
    expected = open_clip_text(state, tokens, heads=2)
    assert config["num_hidden_layers"] == 2 and config["num_attention_heads"] == 2
    torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_full_size_configurations():
    config = conversion.open_clip_config(layouts.meta_state(layouts.open_clip_shapes()))
    assert config["num_hidden_layers"] == 23 and config["hidden_size"] == 1024
    assert config["num_attention_heads"] == 16 and config["hidden_act"] == "gelu"
    config = conversion.clip_config(layouts.meta_state(layouts.clip_shapes()))
    assert config["num_hidden_layers"] == 12 and config["num_attention_heads"] == 12
    assert config["hidden_act"] == "quick_gelu" and config["intermediate_size"] == 3072


def test_what_is_not_used_is_exactly_this():
    state = layouts.meta_state(layouts.open_clip_shapes(**TINY))
    unused = {name for name in state if conversion.is_unused_by_text(name, 3)}
    last = {name for name in state if name.startswith("transformer.resblocks.2.")}
    assert unused == last | {"logit_scale", "text_projection"} and len(last) == 12


def test_positions_of_sd_1_are_computed_not_stored():
    state = layouts.meta_state(layouts.clip_shapes())
    converted = conversion.convert_clip(state)
    assert len(state) - len(converted) == 1
    assert not any("position_ids" in name or name.startswith("text_model") for name in converted)


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="'transformer.resblocks.0.attn.bias' is no name of an O"):
        conversion.open_clip_key("transformer.resblocks.0.attn.bias")
    with pytest.raises(ValueError, match="holds no OpenCLIP text encoder"):
        conversion.count_blocks({"text_model.x": torch.zeros(1)})
