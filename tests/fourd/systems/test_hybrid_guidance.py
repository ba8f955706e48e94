"""Which priors are built, which of them a step draws, and what the launcher may leave out."""

import pytest
import threestudio
from omegaconf import OmegaConf
from threestudio.launcher.validate import required_models

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.systems.hybrid_guidance import (
    HybridGuidance,
    guidance_kind,
    guidance_shares,
)


@pytest.mark.parametrize(
    ("keys", "shares"),
    [
        ({}, {"single_view": 1.0}),
        ({"prob_multi_view": 1.0}, {"multi_view": 1.0}),
        ({"prob_multi_view": 0.5}, {"multi_view": 0.5, "single_view": 0.5}),
        (
            {"prob_multi_view": 0.5, "prob_single_view_video": 0.5, "simultan": True},
            {"multi_view": 0.5, "video": 0.25, "single_view": 0.25},
        ),
        (
            {"prob_multi_view": 0.75, "prob_single_view_video": 1.0},
            {"multi_view": 0.75, "video": 0.25},
        ),
        ({"prob_single_view_video": 1.0, "simultan": False}, {"single_view": 1.0}),
    ],
)
def test_shares_are_those_of_the_data_module(keys, shares):
    assert guidance_shares(keys) == shares


def test_the_batch_says_the_kind():
    assert guidance_kind({"single_view": True, "is_video": True}) == "video"
    assert guidance_kind({"single_view": True, "is_video": False}) == "single_view"
    assert guidance_kind({"single_view": False, "is_video": False}) == "multi_view"
    assert guidance_kind({}) == "multi_view"


class Drawer(HybridGuidance):
    """The mixin alone; building takes note instead of loading a model."""

    def __init__(self, **keys):
        self.cfg = OmegaConf.create(keys)

    def _add_guidance(self, kind, share):
        setattr(self, f"guidance_{kind}", kind)
        setattr(self, f"prompt_utils_{kind}", f"words of {kind}")


def test_only_drawable_priors_are_built_and_the_alias_is_upstreams():
    drawer = Drawer(prob_multi_view=0.75, prob_single_view_video=1.0)
    assert drawer.guidance is None and drawer.prompt_utils is None
    drawer._build_guidance()
    assert not hasattr(drawer, "guidance_single_view")
    assert drawer.guidance == "multi_view" and drawer.prompt_utils == "words of multi_view"
    assert drawer.drawn_guidance("video") == ("video", "words of video")
    clips_only = Drawer(prob_single_view_video=0.5)
    clips_only._build_guidance()
    assert clips_only.guidance == "video"


class Trainable:
    """Stands where the system's base class does."""

    def configure_optimizers(self):
        return {name: group for name, group in self.cfg.optimizer.params.items() if group}


class Trainer(Drawer, Trainable):
    """The mixin over something that builds an optimizer."""


def test_the_optimizer_group_of_an_undrawn_prior_is_left_out():
    groups = {"geometry": {"lr": 0.1}, "guidance_single_view.lora_layers": {"lr": 0.2}}
    optimizer = {"params": {**groups, "guidance_video": None}}
    with_images = Trainer(prob_multi_view=0.5, optimizer=optimizer)
    with_images._build_guidance()
    assert with_images.configure_optimizers() == groups
    without = Trainer(prob_multi_view=0.5, prob_single_view_video=1.0, optimizer=optimizer)
    without._build_guidance()
    assert list(without.configure_optimizers()) == ["geometry"]


def test_a_draw_that_the_system_does_not_know_is_explained():
    drawer = Drawer(prob_multi_view=1.0)
    drawer._build_guidance()
    with pytest.raises(ValueError, match="drew a video step, but the system has built no such"):
        drawer.drawn_guidance("video")


def test_models_of_undrawn_priors_are_not_required():
    """The seed's way has no VSD, so it must not ask for Stable Diffusion's weights."""
    parts = {
        "guidance_type": "stable-diffusion-vsd-guidance",
        "guidance": {"pretrained_model_name_or_path": "one/image"},
        "guidance_type_multi_view": "multiview-diffusion-guidance",
        "guidance_multi_view": {"pretrained_model_name_or_path": "one/group"},
        "guidance_type_video": "zeroscope-guidance",
        "guidance_video": {"pretrained_model_name_or_path": "one/clip"},
    }
    names = {}
    for keys in ({"prob_multi_view": 0.75, "prob_single_view_video": 1.0}, {}):
        cfg = OmegaConf.create({"system_type": "fourdfy-system", "system": parts | keys})
        names[bool(keys)] = {str(name) for name in required_models(cfg)}
    assert names[True] == {"one/group", "one/clip"}
    assert "one/image" in names[False] and not names[False] & {"one/group", "one/clip"}
    unused = threestudio.find("fourdfy-system").unused_parts({"prob_multi_view": 1.0})
    assert unused == {"guidance", "prompt_processor", "guidance_video", "prompt_processor_video"}
