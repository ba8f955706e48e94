import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from custom.fourd.diffusion import ldm_conversion as conversion
from tests.fixtures.model_folders import (
    FULL_UNET,
    FULL_VAE,
    camera_unet_keys,
    ldm_autoencoder_shapes,
    ldm_multiview_state,
    ldm_unet_shapes,
)


def meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def test_every_tensor_of_mvdream_has_its_place_in_diffusers():
    # The published counts: 690 tensors of the U-Net, 248 of the autoencoder.
    state = meta(ldm_unet_shapes())
    assert len(state) == 690
    with torch.device("meta"):
        model = UNet2DConditionModel(**{**FULL_UNET, **camera_unet_keys(sample_size=32)})
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(867.6e6, rel=1e-4)
    assert shapes_of(conversion.convert_unet(state)) == shapes_of(model.state_dict())


def test_every_tensor_of_the_autoencoder_has_its_place():
    state = meta(ldm_autoencoder_shapes())
    assert len(state) == 248
    with torch.device("meta"):
        model = AutoencoderKL(**FULL_VAE)
    assert shapes_of(conversion.convert_autoencoder(state)) == shapes_of(model.state_dict())


def test_configurations_are_read_off_the_full_layout():
    found = conversion.unet_config(meta(ldm_unet_shapes()))
    for key, value in {**FULL_UNET, **camera_unet_keys(sample_size=32)}.items():
        assert found[key] == (tuple(value) if isinstance(value, list) else value), key
    found = conversion.autoencoder_config(meta(ldm_autoencoder_shapes()))
    for key in ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor"):
        value = FULL_VAE[key]
        assert found[key] == (tuple(value) if isinstance(value, list) else value), key


def test_a_model_without_cameras_has_no_class_embedding():
    config = conversion.unet_config(meta(ldm_unet_shapes(camera=None)))
    assert "class_embed_type" not in config


def test_prefixes_are_removed_and_other_parts_left_out():
    state = ldm_multiview_state()
    unet = conversion.convert_unet(state)
    bare = conversion.convert_unet(conversion.without_prefix(state, conversion.UNET_PREFIX))
    assert unet.keys() == bare.keys()
    assert not any("ln_final" in name or "betas" in name for name in unet)


@pytest.mark.parametrize(
    "ldm, diffusers",
    [
        ("input_blocks.3.0.op.weight", "down_blocks.0.downsamplers.0.conv.weight"),
        ("input_blocks.11.0.out_layers.3.bias", "down_blocks.3.resnets.1.conv2.bias"),
        (
            "middle_block.1.transformer_blocks.0.attn2.to_out.0.bias",
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias",
        ),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
        ("output_blocks.9.1.proj_in.weight", "up_blocks.3.attentions.0.proj_in.weight"),
        ("output_blocks.9.0.skip_connection.weight", "up_blocks.3.resnets.0.conv_shortcut.weight"),
        ("camera_embed.2.bias", "class_embedding.linear_2.bias"),
    ],
)
def test_names_of_the_published_table(ldm, diffusers):
    assert conversion.unet_key(ldm) == diffusers


@pytest.mark.parametrize(
    "ldm, diffusers",
    [
        ("decoder.up.3.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight"),
        ("decoder.up.0.block.2.norm1.bias", "decoder.up_blocks.3.resnets.2.norm1.bias"),
        ("encoder.mid.attn_1.q.weight", "encoder.mid_block.attentions.0.to_q.weight"),
        ("encoder.mid.block_2.conv1.bias", "encoder.mid_block.resnets.1.conv1.bias"),
        (
            "encoder.down.1.block.0.nin_shortcut.weight",
            "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
        ),
        ("decoder.norm_out.weight", "decoder.conv_norm_out.weight"),
        ("quant_conv.weight", "quant_conv.weight"),
    ],
)
def test_names_of_the_autoencoder(ldm, diffusers):
    assert conversion.autoencoder_key(ldm) == diffusers


def test_what_is_no_ldm_checkpoint_is_refused():
    with pytest.raises(ValueError, match="'conv_in.weight' is no name of an ldm U-Net"):
        conversion.unet_key("conv_in.weight")
    with pytest.raises(ValueError, match="holds no U-Net in ldm layout"):
        conversion.convert_unet({"conv_in.weight": torch.zeros(1)})


def test_two_tensors_in_one_place_are_refused():
    state = ldm_multiview_state()
    copied = {**state, "model.diffusion_model.time_embedding": torch.zeros(1)}
    with pytest.raises(ValueError, match="'time_embedding' is no name of an ldm U-Net"):
        conversion.convert_unet(copied)
    with pytest.raises(ValueError, match="Two tensors of the checkpoint become 'same'"):
        conversion.renamed({"a": torch.zeros(1), "b": torch.zeros(1)}, lambda name: "same")
