"""Latents and vision features against the models that make them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import custom.fourd  # noqa: F401 - registers the classes
from custom.fourd.data.frame_encoders import (
    CLIP_MEAN,
    CLIP_STD,
    LatentEncoder,
    VisionEncoder,
    features_identity,
    latents_identity,
)
from tests.fixtures.frame_encoders import write_encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_encoders(tmp_path_factory.mktemp("encoders")))


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(1))


def test_latents_are_the_mode_shifted_and_scaled(folder, images):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder + "/vae").eval()
    with torch.no_grad():
        mean = vae.encode(images.permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    latents = LatentEncoder(folder).encode(images)
    assert latents.shape == (2, 4, 8, 8)
    assert torch.allclose(latents, (mean - 0.25) * 0.5, atol=1e-6)


def test_latents_of_the_embedded_autoencoder_decode_to_the_picture():
    encoder = LatentEncoder("embedded://multiview")
    grey = torch.full((1, 16, 16, 3), 0.6)
    latents = encoder.encode(grey)
    picture = encoder._vae.decode(latents).sample / 2 + 0.5
    assert latents.shape == (1, 16, 4, 4) and (picture - 0.6).abs().max() < 0.05


@pytest.mark.parametrize("kind, shape", [("plus", (2, 5, 16)), ("base", (2, 12))])
def test_features_are_those_of_the_vision_model(folder, images, kind, shape):
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection.from_pretrained(folder + "/image_encoder").eval()
    pixels = (images - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    with torch.no_grad():
        out = model(pixel_values=pixels.permute(0, 3, 1, 2), output_hidden_states=True)
    expected = out.image_embeds if kind == "base" else out.hidden_states[-2]
    features = VisionEncoder(folder, kind).encode(images)
    assert features.shape == shape and torch.allclose(features, expected, atol=1e-5)


def test_pictures_are_resized_as_clip_s_own_processor_does(folder):
    """Bicubic with edges smoothed, of the middle square: PIL's resize is an independent judge."""
    wide = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    square = Image.fromarray(wide[:, 10:50]).resize((16, 16), Image.Resampling.BICUBIC)
    by_hand = torch.from_numpy(np.asarray(square).copy()).float()[None] / 255
    encoder = VisionEncoder(folder, "base")
    ours = encoder.encode(torch.from_numpy(wide).float()[None] / 255)
    # PIL rounds to 8 bits on its way.
    assert torch.allclose(ours, encoder.encode(by_hand), atol=2e-2)
    squashed = Image.fromarray(wide).resize((16, 16), Image.Resampling.BICUBIC)
    other = encoder.encode(torch.from_numpy(np.asarray(squashed).copy()).float()[None] / 255)
    assert not torch.allclose(ours, other, atol=2e-2)


def test_identities_are_of_weights_and_not_of_places(folder, tmp_path):
    same, other = write_encoders(tmp_path / "a"), write_encoders(tmp_path / "b", seed=1)
    ours = latents_identity(folder)
    assert latents_identity(str(same))["fingerprint"] == ours["fingerprint"]
    assert latents_identity(str(other))["fingerprint"] != ours["fingerprint"]
    assert features_identity(folder)["fingerprint"] != ours["fingerprint"]
    assert features_identity(folder, "base")["output"] == "base"
    assert LatentEncoder(folder).identity == ours


def test_a_vision_encoder_may_lie_deeper_in_its_model(folder, images, tmp_path):
    """As in the published IP-Adapter repository."""
    shutil.copytree(folder + "/image_encoder", tmp_path / "models" / "image_encoder")
    deep = VisionEncoder(str(tmp_path), "base", folder="models/image_encoder")
    assert torch.equal(deep.encode(images), VisionEncoder(folder, "base").encode(images))
    assert deep.identity["part"] == "models/image_encoder"


def test_other_kinds_are_refused(folder):
    with pytest.raises(ValueError, match="'faces'; expected one of plus, base"):
        VisionEncoder(folder, "faces")


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        latents_identity(str(tmp_path / "nowhere"))
