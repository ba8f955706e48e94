"""The frozen model with its image prompt: cached features, scene codes, refusals."""

import pytest
import torch

from custom.fourd.diffusion.image_prior import load_image_prior
from custom.fourd.diffusion.ip_adapter import clip_pixels
from custom.fourd.mappers.controlled_prior import ControlledPrior, ImagePromptConfig
from custom.fourd.mappers.mapper import Mapper, MapperConfig
from tests.fixtures.controlled_models import adapter_of, pair_of_images, write_controlled_folder
from tests.fixtures.ip_adapters import PROJECTED_WIDTH, VISION_WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_controlled_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return ControlledPrior(load_image_prior(str(folder)), adapter_of(folder))


def coded(model, width):
    config = MapperConfig("time", model.injection.width, len(model.table), (16,),
                          scene_features=width)  # fmt: skip
    return {"time": Mapper(config, 0.4)}


def test_features_are_the_vision_encoders_own(model):
    batch = pair_of_images(2)
    pixels = clip_pixels(batch["cond_rgb"], 16)
    with torch.no_grad():
        states = model.vision(pixels, output_hidden_states=True).hidden_states[-2]
        pooled = model.vision(pixels).image_embeds
        black = model.vision(torch.zeros_like(pixels), output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.image_features(batch), states)
    torch.testing.assert_close(model.pooled_features(batch["cond_rgb"]), pooled)
    some = model.image_features(batch, torch.tensor([True, False]))
    torch.testing.assert_close(some, torch.stack([states[0], black[1]]))


def test_cached_features_are_taken_as_they_are(model):
    batch = pair_of_images(2)
    cached = torch.rand(2, 5, VISION_WIDTH)
    assert torch.equal(model.image_features({**batch, "cond_features": cached}), cached)
    with pytest.raises(ValueError, match="IP-Adapter is of kind 'plus'; set data.cond_features_k"):
        model.image_features({**batch, "cond_features": torch.rand(2, VISION_WIDTH)})


def test_scene_codes_are_pooled_features_of_the_condition(model):
    batch, mappers = pair_of_images(2), coded(model, PROJECTED_WIDTH)
    told = model.with_scene_features(batch, mappers)
    assert torch.equal(told["scene_features"], model.pooled_features(batch["cond_rgb"]))
    torch.nn.init.normal_(mappers["time"].scene_code.weight)
    levels = torch.tensor([0.5, 0.5])
    words = model.words(mappers, told, levels)["<time>"]
    other = model.with_scene_features({**batch, "cond_rgb": 1 - batch["cond_rgb"]}, mappers)
    assert not torch.equal(words.base, model.words(mappers, other, levels)["<time>"].base)
    assert "scene_features" not in model.with_scene_features(batch, coded(model, 0))


def test_scene_codes_of_another_width_are_refused(model):
    with pytest.raises(ValueError, match=r"want \[7\] scene_features and the vision encoder gives"):
        model.with_scene_features(pair_of_images(2), coded(model, 7))


def test_features_without_an_encoder_are_refused(folder):
    bare = ControlledPrior(load_image_prior(str(folder)))
    assert bare.image_prompt(pair_of_images(2)) == {}
    with pytest.raises(ValueError, match="no ip_adapter is loaded; expected one"):
        bare.with_scene_features(pair_of_images(2), coded(bare, PROJECTED_WIDTH))


def test_adapters_of_a_config_are_checked():
    given = {"weights": "a/b.safetensors", "image_encoder": "a"}
    assert ImagePromptConfig.of(given).scale == 0.5
    assert ImagePromptConfig.of(None) is ImagePromptConfig.of({}) is None
    with pytest.raises(ValueError, match="unknown or empty key 'colour'; expected weights and"):
        ImagePromptConfig.of({**given, "colour": 1})
    with pytest.raises(ValueError, match="unknown or empty key 'image_encoder'"):
        ImagePromptConfig.of({"weights": "a/b.safetensors"})
    named = ImagePromptConfig(**given, image_encoder_folder="models/image_encoder")
    assert named.required_models()[1].components == ("models/image_encoder",)
