"""Image priors from folders: latents, cameras of multi-view models, and what is refused."""

import json
import shutil

import pytest
import torch

from custom.fourd.diffusion.camera_vector import camera_vector
from custom.fourd.diffusion.image_prior import load_image_prior
from custom.fourd.ops.camera import camera_from_orbit
from tests.fixtures.launched import need_embedded_model
from tests.fixtures.model_folders import write_stable_diffusion_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("model"))


def edited(folder, tmp_path, **changes):
    root = tmp_path / "model"
    shutil.copytree(folder, root)
    path = root / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(root)


def test_latents_are_scaled_and_frozen(folder):
    prior = load_image_prior(str(folder))
    rgb = torch.rand(2, 16, 16, 3, generator=torch.Generator().manual_seed(0))
    latents = prior.encode(rgb)
    images = 2 * rgb.permute(0, 3, 1, 2) - 1
    with torch.no_grad():
        mode = prior.autoencoder.encode(images).latent_dist.mean
        decoded = prior.autoencoder.decode(mode).sample / 2 + 0.5
    torch.testing.assert_close(latents, 0.18215 * mode)
    torch.testing.assert_close(
        prior.decode(latents), decoded.clamp(0, 1).permute(0, 2, 3, 1), atol=1e-5, rtol=1e-4
    )
    parts = (prior.unet, prior.autoencoder, prior.text_encoder)
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert prior.camera_arguments({}) == {} and prior.schedule.prediction_type == "epsilon"


def test_a_multiview_model_is_told_the_camera_of_the_image_prompt():
    need_embedded_model()
    prior = load_image_prior("embedded://multiview")
    angles = torch.tensor([10.0, 20.0])
    c2w = camera_from_orbit(angles, 3 * angles, torch.tensor([3.0, 3.0]))
    fovy = torch.tensor([0.7, 0.8])
    (labels,) = prior.camera_arguments({"c2w": c2w, "fovy": fovy}).values()
    torch.testing.assert_close(labels, camera_vector(c2w, fovy, "embedded"))


def test_other_models_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="takes 9 channels; expected 4, the noisy latents alone"):
        load_image_prior(edited(folder, tmp_path / "a", in_channels=9))
    with pytest.raises(ValueError, match=r"takes a class vector \(projection\), and no multiview"):
        load_image_prior(edited(folder, tmp_path / "b", class_embed_type="projection"))
