"""Whole checkpoints: at full size by names and shapes alone, small ones by what they compute."""

import json
import os

import pytest
import torch

from custom.fourd.diffusion import checkpoint_conversion as conversion
from tests.fixtures import original_layouts as layouts
from tests.fixtures.ldm_reference import LdmUnet, autoencoder_mean
from tests.fixtures.original_references import FixedHeadsLdmUnet

# Layout, the kind that the command has for it, and the tensors of U-Net and text encoder: those of
# the published files, of which the text's last block, projection and temperature are not used.
FULL = [
    ("stable-diffusion", "stable-diffusion", 686, 23 * 16 + 4),
    ("stable-diffusion-1", "stable-diffusion", 686, 12 * 16 + 4),
    ("mvdream", "mvdream", 690, 23 * 16 + 4),
    ("modelscope-video", "modelscope-video", 1480, 23 * 16 + 4),
    ("videocrafter", "videocrafter", 1484, 23 * 16 + 4),
]


@pytest.mark.parametrize(("layout", "kind", "n_unet", "n_text"), FULL, ids=[f[0] for f in FULL])
def test_every_tensor_of_the_published_size_has_its_place(layout, kind, n_unet, n_text):
    """No name is missing or left over, and none of another shape; nothing is allocated."""
    state = layouts.meta_state(layouts.checkpoint_shapes(layout))
    parts = {part.name: part for part in conversion.convert_checkpoint(kind, state)}
    assert {name: len(part.state) for name, part in parts.items()} == {
        "unet": n_unet, "vae": 248, "text_encoder": n_text,
    }  # fmt: skip
    values = [value for part in parts.values() for value in part.state.values()]
    assert {value.device.type for value in values} == {"meta"}
    used = sum(len(layouts.below(state, p)) for p in (layouts.UNET, layouts.AUTOENCODER))
    assert used == n_unet + 248, "a tensor of U-Net and autoencoder stays one tensor"


@pytest.mark.parametrize(
    ("layout", "millions"),
    [("stable-diffusion", 865.9), ("stable-diffusion-1", 859.5), ("mvdream", 867.6),
     ("modelscope-video", 1411.2), ("videocrafter", 1413.3)],
)  # fmt: skip
def test_the_full_size_is_the_published_one(layout, millions):
    shapes = layouts.below(layouts.checkpoint_shapes(layout), layouts.UNET)
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)


def tiny(layout, seed=0):
    return layouts.random_state(layouts.checkpoint_shapes(layout, tiny=True), seed)


def parts_of(kind, state):
    return {part.name: part for part in conversion.convert_checkpoint(kind, state)}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 7, 24, generator=g)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "reference"),
    [("stable-diffusion", LdmUnet), ("stable-diffusion-1", FixedHeadsLdmUnet)],
)
def test_a_converted_image_model_computes_what_the_original_does(layout, reference, inputs):
    noisy, text = inputs
    state = tiny(layout)
    parts = parts_of("stable-diffusion", state)
    unet = conversion.assembled(parts["unet"])
    original = layouts.below(state, layouts.UNET)
    slow = reference(original, num_views=1) if reference is LdmUnet else reference(original)
    steps = torch.tensor([10, 700])
    expected = (
        slow(noisy, steps, text, None)
        if reference is LdmUnet
        else slow(noisy, steps, text, camera=None)
    )
    got = unet(noisy, steps, text).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    vae, images = conversion.assembled(parts["vae"]), noisy[:, :3].repeat(1, 1, 2, 2)
    mean = autoencoder_mean(layouts.below(state, layouts.AUTOENCODER), images)
    torch.testing.assert_close(vae.encode(images).latent_dist.mean, mean, rtol=1e-4, atol=1e-4)


def test_what_belongs_nowhere_is_named():
    state = {**tiny("stable-diffusion"), "control_model.x": torch.zeros(1), "y": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"2 tensors are no part of a stable-diffusion checkpoint: "
                       r"control_model\.x, y; expected a file such as v2-1_512"):  # fmt: skip
        conversion.convert_checkpoint("stable-diffusion", state)


def test_what_is_missing_left_over_or_of_another_shape_is_named():
    state = tiny("stable-diffusion")
    del state[f"{layouts.UNET}time_embed.0.bias"]
    state[f"{layouts.UNET}time_embed.2.bias"] = torch.zeros(3)
    state[f"{layouts.UNET}middle_block.0.in_layers.0.scale"] = torch.zeros(3)
    with pytest.raises(ValueError, match=(
        r"does not fit UNet2DConditionModel: it lacks time_embedding\.linear_1\.bias; has no place "
        r"for mid_block\.resnets\.0\.norm1\.scale; has other shapes of "
        r"time_embedding\.linear_2\.bias \(3,\) instead of \(128,\)"
    )):  # fmt: skip
        conversion.convert_checkpoint("stable-diffusion", state)


def test_a_checkpoint_of_another_kind_is_told_from_it():
    with pytest.raises(ValueError, match="The U-Net has a camera embedding; expected --kind mvdr"):
        conversion.convert_checkpoint("stable-diffusion", tiny("mvdream"))
    with pytest.raises(ValueError, match="has no camera embedding; expected --kind stable-diff"):
        conversion.convert_checkpoint("mvdream", tiny("stable-diffusion"))
    with pytest.raises(ValueError, match="holds no U-Net of a text-to-video model"):
        conversion.convert_checkpoint("videocrafter", tiny("stable-diffusion"))
    with pytest.raises(ValueError, match="kind is 'sdxl'; expected one of stable-diffusion, mvdr"):
        conversion.convert_checkpoint("sdxl", {})
    with pytest.raises(ValueError, match="holds no tensor below 'model.diffusion_model.'"):
        conversion.convert_checkpoint("mvdream", {"betas": torch.zeros(2)})


# ModelScope's three files


def test_modelscope_s_files_are_one_checkpoint(tmp_path):
    state = tiny("modelscope-video")
    torch.save(layouts.below(state, layouts.UNET), tmp_path / "text2video_pytorch_model.pth")
    image_model = {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(3)}
    vae = {k: v for k, v in state.items() if k.startswith(layouts.AUTOENCODER)}
    torch.save({"state_dict": {**vae, **image_model}}, tmp_path / "VQGAN_autoencoder.pth")
    text = layouts.below(state, layouts.OPEN_CLIP)
    text["visual.conv1.weight"] = torch.zeros(2)
    torch.save(text, tmp_path / "open_clip_pytorch_model.bin")
    read = conversion.read_original("modelscope-video", tmp_path)
    assert set(read) == {*state, "cond_stage_model.model.visual.conv1.weight"}
    assert all(torch.equal(read[name], value) for name, value in state.items())
    alone = conversion.read_original("modelscope-video", tmp_path / "text2video_pytorch_model.pth")
    assert {name.split(".")[0] for name in alone} == {"model"}
    os.remove(tmp_path / "text2video_pytorch_model.pth")
    with pytest.raises(FileNotFoundError, match="holds no text2video_pytorch_model.pth; expected"):
        conversion.read_original("modelscope-video", tmp_path)


# Folders of pickles


@pytest.fixture
def pickled_folder(tmp_path):
    """A diffusers folder as of 2023: ``.bin`` files, the autoencoder's attention by old names."""
    parts = parts_of("modelscope-video", tiny("modelscope-video"))
    for part in parts.values():
        folder = tmp_path / part.name
        folder.mkdir()
        is_text = part.name == "text_encoder"
        own = {"architectures": [part.class_name]} if is_text else {"_class_name": part.class_name}
        (folder / "config.json").write_text(json.dumps({**part.config, **own}))
        state = {_old(k) if part.name == "vae" else k: v for k, v in part.state.items()}
        if is_text:
            state = {f"text_model.{name}": value for name, value in state.items()}
            state["text_model.embeddings.position_ids"] = torch.arange(12)[None]
        torch.save(state, folder / "model.bin")
    return tmp_path, parts


def _old(name):
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                     ("to_out.0", "proj_attn")):  # fmt: skip
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
    return name


def test_a_folder_of_pickles_is_read_whole(pickled_folder):
    folder, parts = pickled_folder
    read = {part.name: part for part in conversion.read_pickled_folder(folder)}
    assert read.keys() == parts.keys()
    for name, part in parts.items():
        assert read[name].state.keys() == part.state.keys()
        assert all(torch.equal(read[name].state[k], v) for k, v in part.state.items())


def test_a_folder_of_pickles_that_lacks_a_tensor_is_refused(pickled_folder):
    folder, _ = pickled_folder
    state = torch.load(folder / "unet" / "model.bin", weights_only=True)
    del state["conv_in.bias"]
    torch.save(state, folder / "unet" / "model.bin")
    with pytest.raises(ValueError, match="fit UNet3DConditionModel: it lacks conv_in.bias"):
        conversion.read_pickled_folder(folder)
    (folder / "unet" / "config.json").write_text('{"_class_name": "Evil"}')
    with pytest.raises(ValueError, match="names the class 'Evil'; expected one of AutoencoderKL"):
        conversion.read_pickled_folder(folder)


def test_a_folder_without_pickles_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no component with pickled weights"):
        conversion.read_pickled_folder(tmp_path)
