"""`configs/models.yaml`: sizes that follow from the published layouts, and commands that exist."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from custom.fourd.diffusion.checkpoint_conversion import KINDS
from custom.fourd.scripts.convert_checkpoint import FOLDER_KIND
from tests.fixtures import original_layouts as layouts
from tests.fixtures.launched import ROOT

MODELS = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "models.yaml"))["models"]
# Layout of each model and bytes of a number: fp32, or fp16 where the published folder is.
COUNTED = {
    "stable_diffusion_2_1_base": ("stable-diffusion", 4),
    "stable_diffusion_2_1": ("stable-diffusion", 4),
    "stable_diffusion_1_5": ("stable-diffusion-1", 4),
    "mvdream": ("mvdream", 2),
    "zeroscope": ("modelscope-video", 2),
    "videocrafter2": ("videocrafter", 4),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_how_large_it_is_and_what_is_unverified(name):
    model = MODELS[name]
    assert model["licence"] and model["id"] and model["used_by"]
    assert model["size_gb"] == pytest.approx(sum(model["files_gb"].values()), abs=0.06)
    if not model["id"].startswith("embedded://"):
        assert model["unverified"] == ["revision", "size_gb", "files_gb"]
        assert model["revision"] is None


def test_every_embedded_model_that_a_config_names_is_in_the_table():
    """Their folders, and nothing else: what a config asks for is told and can be had."""
    named = {
        model
        for path in (ROOT / "custom" / "configs").glob("*.yaml")
        for model in re.findall(r"embedded://(\w+)", path.read_text(encoding="utf-8"))
    }
    listed = {name.removeprefix("embedded_") for name in MODELS if name.startswith("embedded_")}
    assert {f"embedded://{name}" for name in listed} == {
        model["id"] for model in MODELS.values() if model["id"].startswith("embedded://")
    }
    assert named <= listed


@pytest.mark.parametrize("name", COUNTED)
def test_sizes_are_those_of_the_layout(name):
    layout, width = COUNTED[name]
    shapes = layouts.checkpoint_shapes(layout)
    prefixes = {"unet": layouts.UNET, "vae": layouts.AUTOENCODER}
    for part, prefix in prefixes.items():
        numbers = sum(torch.Size(s).numel() for k, s in shapes.items() if k.startswith(prefix))
        expected = numbers * width / 1e9
        assert MODELS[name]["files_gb"][part] == pytest.approx(expected, abs=0.006), part


@pytest.mark.parametrize("name", [name for name in MODELS if "original" in MODELS[name]])
def test_originals_name_a_kind_of_the_command(name):
    original = MODELS[name]["original"]
    assert original["kind"] in (*KINDS, FOLDER_KIND) and original["file"]
