"""Names of text-to-video U-Nets, and small ones against a slow reference by original names."""

import pytest
import torch

from custom.fourd.diffusion import checkpoint_conversion
from custom.fourd.diffusion import video_unet_conversion as conversion
from tests.fixtures import original_layouts as layouts
from tests.fixtures.original_references import VideoLdmUnet


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("input_blocks.0.0.weight", "conv_in.weight"),
        ("input_blocks.0.1.proj_in.bias", "transformer_in.proj_in.bias"),
        ("init_attn.0.norm.weight", "transformer_in.norm.weight"),
        ("fps_embedding.2.bias", "fps_embedding.linear_2.bias"),
        ("input_blocks.3.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        (
            "input_blocks.2.0.temopral_conv.conv1.2.weight",
            "down_blocks.0.temp_convs.1.conv1.2.weight",
        ),
        ("input_blocks.5.2.proj_out.bias", "down_blocks.1.temp_attentions.1.proj_out.bias"),
        ("middle_block.0.temopral_conv.conv4.3.bias", "mid_block.temp_convs.0.conv4.3.bias"),
        ("middle_block.3.temopral_conv.conv4.3.bias", "mid_block.temp_convs.1.conv4.3.bias"),
        ("middle_block.2.norm.weight", "mid_block.temp_attentions.0.norm.weight"),
        ("middle_block.3.out_layers.3.bias", "mid_block.resnets.1.conv2.bias"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.5.3.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("output_blocks.8.2.norm.bias", "up_blocks.2.temp_attentions.2.norm.bias"),
    ],
)
def test_names_by_hand(original, diffusers):
    assert conversion.video_unet_key(original) == diffusers


def test_what_is_no_video_model_is_refused():
    with pytest.raises(ValueError, match="holds no U-Net of a text-to-video model"):
        conversion.convert_video_unet({"input_blocks.3.0.op.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="'conv_in.weight' is no name of an ldm U-Net"):
        conversion.video_unet_key("conv_in.weight")


@pytest.mark.parametrize("kind", ["modelscope-video", "videocrafter"])
def test_configurations_are_read_off_the_full_layout(kind):
    shapes = layouts.below(layouts.checkpoint_shapes(kind), layouts.UNET)
    config = conversion.video_unet_config(layouts.meta_state(shapes))
    assert config["block_out_channels"] == (320, 640, 1280, 1280)
    assert config["attention_head_dim"] == 64 and config["cross_attention_dim"] == 1024
    assert config["layers_per_block"] == 2 and config["norm_num_groups"] == 32
    assert config["down_block_types"] == (*["CrossAttnDownBlock3D"] * 3, "DownBlock3D")
    assert config["up_block_types"] == ("UpBlock3D", *["CrossAttnUpBlock3D"] * 3)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["modelscope-video", "videocrafter"])
def test_a_converted_model_computes_what_the_original_does(kind):
    shapes = layouts.checkpoint_shapes(kind, tiny=True)
    state = layouts.random_state(shapes)
    parts = {p.name: p for p in checkpoint_conversion.convert_checkpoint(kind, state)}
    unet = checkpoint_conversion.assembled(parts["unet"])
    g = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(2, 4, 3, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)
    steps, rates = torch.tensor([10, 700]), torch.tensor([8, 24])
    with_rate = kind == "videocrafter"
    slow = VideoLdmUnet(layouts.below(state, layouts.UNET), 3, layouts.TINY_HEAD)
    expected = slow(noisy, steps, text, rates if with_rate else None)
    got = unet(noisy, steps, text, **({"fps": rates} if with_rate else {})).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)
    # The reference would notice a clip whose frames do not see each other.
    lone = VideoLdmUnet(slow.state, 1, layouts.TINY_HEAD)
    first = lone(noisy[:, :, :1], steps, text, rates if with_rate else None)
    assert (first - expected[:, :, :1]).abs().max() > 0.01
