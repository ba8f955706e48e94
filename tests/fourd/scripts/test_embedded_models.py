"""Fresh models fit the family; the committed ones are what their manifest says."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from custom.fourd.scripts import embedded_models
from custom.fourd.scripts.embedded_models import (
    EDIT_FACTS,
    IMAGE_FACTS,
    MULTIVIEW_FACTS,
    VIDEO_FACTS,
    build_image_unet,
    build_multiview_unet,
    build_scheduler,
    build_text_encoder,
    build_vision_encoder,
    write_manifest_entry,
)
from custom.fourd.scripts.make_family import ASSETS, family, make_tokenizer


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return build_multiview_unet().eval()


def bytes_at_half_precision(model):
    return 2 * sum(parameter.numel() for parameter in model.parameters())


def test_the_text_encoder_fits_the_tokenizer_and_the_unet(unet):
    encoder, tokenizer = build_text_encoder(), make_tokenizer()
    tokens = tokenizer(["a red cube", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(tokens).last_hidden_state
    assert states.shape == (2, 77, unet.config.cross_attention_dim)
    assert encoder.config.vocab_size == len(tokenizer)
    for name in ("pad", "bos", "eos"):
        token = f"{name}_token_id"
        assert getattr(encoder.config, token) == getattr(tokenizer, token)
    assert bytes_at_half_precision(encoder) < 1e6


def test_the_unet_maps_latents_text_and_cameras_to_latents(unet):
    g = torch.Generator().manual_seed(0)
    latents, text = torch.randn(4, 16, 4, 4, generator=g), torch.randn(4, 77, 128, generator=g)
    cameras = torch.randn(4, 32, generator=g)
    with torch.no_grad():
        first = unet(latents, 500, text, class_labels=cameras).sample
        other_text = unet(latents, 500, text.flip(0), class_labels=cameras).sample
        other_camera = unet(latents, 500, text, class_labels=-cameras).sample
        other_time = unet(latents, 10, text, class_labels=cameras).sample
    assert first.shape == latents.shape
    for other in (other_text, other_camera, other_time):
        assert (other - first).abs().max() > 1e-5
    assert bytes_at_half_precision(unet) < 11e6


def test_the_vision_encoder_sees_patches():
    torch.manual_seed(0)
    vision = build_vision_encoder().eval()
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[1, :, 8:16, 24:32] = 1
    with torch.no_grad():
        embedded = vision.vision_model.embeddings(pixels)
        states = vision(pixels, output_hidden_states=True).hidden_states
    # One class token and 8 x 8 patches of 8 pixels: the second row's fourth is another.
    assert states[-2].shape == (2, 65, 96) and len(states) == 4
    changed = (embedded[0] != embedded[1]).any(dim=-1).nonzero().flatten().tolist()
    assert changed == [1 + 8 + 3]
    assert bytes_at_half_precision(vision) < 0.6e6


def test_the_image_unet_takes_text_alone():
    unet = build_image_unet()
    assert unet.class_embedding is None and unet.config.in_channels == 16
    names = [name for name in unet.attn_processors if name.endswith("attn2.processor")]
    assert len(names) == 7, "where a mapper can speak"


def test_the_schedule_ends_in_pure_noise():
    """Zero terminal SNR: nothing of the image is left at the last step; by its formula."""
    alphas = build_scheduler().alphas_cumprod.double()
    # diffusers computes betas in single precision and rescales sqrt(alpha-bar) to end at zero.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).double() ** 2
    root = torch.cumprod(1 - betas, 0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    torch.testing.assert_close(alphas, expected, atol=1e-5, rtol=0)
    assert alphas[-1] == 0 and (alphas[1:] <= alphas[:-1]).all()


def test_manifest_entries_hold_hash_size_and_recipe(tmp_path):
    (tmp_path / "thing" / "unet").mkdir(parents=True)
    (tmp_path / "thing" / "unet" / "a.bin").write_bytes(b"abc")
    (tmp_path / "MANIFEST.json").write_text('{"other": {"steps": 1}}')
    write_manifest_entry("thing", {"seed": 3, "steps": 7, "loss": 0.5}, tmp_path)
    manifest = json.loads((tmp_path / "MANIFEST.json").read_text())
    assert manifest["other"] == {"steps": 1}
    entry = manifest["thing"]
    assert entry["files"] == {
        "unet/a.bin": {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}
    }
    assert entry["family"] == embedded_models.load_family()["hash"]
    assert (entry["seed"], entry["steps"], entry["loss"]) == (3, 7, 0.5)


# The committed assets


@pytest.fixture(scope="module")
def manifest():
    path = ASSETS / "MANIFEST.json"
    if not path.exists():
        pytest.skip("no asset has been made yet; see custom/fourd/scripts")
    return json.loads(path.read_text())


def test_every_asset_is_what_its_manifest_says(manifest):
    total = 0
    for name, entry in manifest.items():
        assert entry["family"] == embedded_models.load_family()["hash"], name
        files = {
            path.relative_to(ASSETS / name).as_posix(): path
            for path in (ASSETS / name).rglob("*")
            if path.is_file()
        }
        assert files.keys() == entry["files"].keys()
        for relative, path in files.items():
            content = path.read_bytes()
            assert hashlib.sha256(content).hexdigest() == entry["files"][relative]["sha256"]
            assert len(content) == entry["files"][relative]["bytes"]
        assert sum(fact["bytes"] for fact in entry["files"].values()) < 12e6, name
        total += sum(fact["bytes"] for fact in entry["files"].values())
        assert {"script", "seed", "steps", "loss"} <= entry.keys()
    assert total < 60e6
    folders = {path.name for path in ASSETS.iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == set(manifest)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("multiview", MULTIVIEW_FACTS),
        ("video", VIDEO_FACTS),
        ("edit", EDIT_FACTS),
        ("image", IMAGE_FACTS),
    ],
)
def test_every_asset_is_of_the_family(manifest, name, facts):
    from safetensors import safe_open

    folder = asset(name)
    assert name in manifest
    assert json.loads((folder / f"{name}.json").read_text()) == facts
    schedule = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    for key, value in family()["schedule"].items():
        assert schedule["_class_name" if key == "class" else key] == value
    vocabulary = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary, key=vocabulary.get) == family()["tokenizer"]["words"]
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}
    # What latents mean is fixed once for all models.
    vae = Path("vae", "diffusion_pytorch_model.safetensors")
    assert (folder / vae).read_bytes() == (ASSETS / "multiview" / vae).read_bytes()


def asset(name):
    """The folder of a committed model; the test is skipped where it was not made yet."""
    folder = ASSETS / name
    if not folder.is_dir():
        pytest.skip(f"custom/fourd/assets/{name} is absent; see custom/fourd/scripts to make it")
    return folder


def test_the_edit_asset_follows_an_instruction():
    """Loaded by name, it makes a red cube green: nearer to the truth than the image before."""
    from transformers import CLIPTextModel

    from custom.fourd.diffusion.edit_denoiser import EditDenoiser, EditInputs
    from custom.fourd.diffusion.instruct_pix2pix import condition_latents, load_edit_prior
    from custom.fourd.diffusion.samplers import trailing_timesteps
    from custom.fourd.metrics.image_quality import psnr
    from custom.fourd.ops.camera import camera_from_orbit
    from custom.fourd.world.edits import EditedScene, parse_instruction
    from custom.fourd.world.grammar import parse_caption

    folder = asset("edit")
    scene, text = parse_caption("a large red cube"), "make it green"
    camera = camera_from_orbit(*(torch.tensor([value]) for value in (15.0, 20.0, 3.0)))
    (answer,) = parse_instruction(text).answers(scene)
    before, truth = (
        world.render(camera, torch.tensor([0.7]), 64, 64).rgb
        for world in (EditedScene(scene), answer)
    )
    prior = load_edit_prior("embedded://edit")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").float().eval()
    tokens = make_tokenizer()([text, "", ""], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = encoder(tokens).last_hidden_state
    conditions = condition_latents(prior.autoencoder, before.movedim(-1, 1))
    noise = torch.randn(conditions.shape, generator=torch.Generator().manual_seed(0))
    denoiser = EditDenoiser(prior.unet, prior.schedule, prior.final_alpha_cumprod)
    inputs = EditInputs(noise, conditions, states)
    latents = denoiser.denoise(inputs, trailing_timesteps(1000, 6), (1.5, 1.0), 3)
    edited = (prior.autoencoder.decode(latents).sample.movedim(1, -1) * 0.5 + 0.5).clamp(0, 1)
    assert float(psnr(edited, truth)) > float(psnr(before, truth)) + 3


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_image_asset_sees_its_image_prompt(scale):
    """Nothing but the prompt image tells the background: that of a dark one is darker."""
    from custom.fourd.diffusion.image_prior import load_image_prior
    from custom.fourd.mappers.control_sampling import SamplingOptions, sample_controlled
    from custom.fourd.mappers.controlled_prior import ControlledPrior
    from custom.fourd.ops.camera import camera_from_orbit
    from custom.fourd.world.grammar import parse_caption
    from custom.fourd.world.render import render

    asset("image")
    caption, greys = "a large red cube", torch.tensor([1.0, 0.3, 1.0, 0.3])
    pose = camera_from_orbit(*(torch.tensor([value]) for value in (15.0, 20.0, 3.0)))
    shown = render(parse_caption(caption), pose, torch.tensor([0.7]), 64, 64)
    images = shown.rgb.repeat(4, 1, 1, 1)
    images[:, (shown.rgb[0] == 1).all(dim=-1)] = greys.view(4, 1, 1)
    adapter = {
        "weights": "embedded://image/ip_adapter/ip-adapter-plus.safetensors",
        "image_encoder": "embedded://image",
        "scale": scale,
    }
    model = ControlledPrior(load_image_prior("embedded://image"), adapter)
    noise = torch.randn((2, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    noise = noise.repeat_interleave(2, dim=0)
    batch = {"cond_rgb": images, "camera_a": None}
    options = SamplingOptions(4, 1.0, 1.0)
    made = sample_controlled(model, batch, [caption] * 4, noise, None, options=options)
    corners = made[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(dim=(1, 2))
    assert (corners[greys == 1] > 0.85).all(), corners
    assert (corners[greys == 1] - corners[greys < 1] > 0.25).all(), corners
    red = made[:, 26:38, 26:38].mean(dim=(1, 2))
    assert (red[:, 0] > 2 * red[:, 1:].amax(dim=1)).all(), red
