"""Loading the embedded video prior from a folder."""

import json

import pytest
import torch

from custom.fourd.diffusion.cross_view_attention import cross_view_attention_size
from custom.fourd.diffusion.patch_autoencoder import PatchAutoencoder
from custom.fourd.diffusion.video_prior import load_video_prior, read_video_facts
from custom.fourd.scripts.embedded_models import (
    VIDEO_FACTS,
    build_multiview_unet,
    build_scheduler,
    build_video_unet,
)


def write_folder(root, unet, facts=None):
    unet.save_pretrained(root / "unet")
    PatchAutoencoder().save_pretrained(root / "vae")
    build_scheduler().save_pretrained(root / "scheduler")
    if facts is not None:
        (root / "video.json").write_text(json.dumps(facts))
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    return write_folder(tmp_path_factory.mktemp("video"), build_video_unet(), VIDEO_FACTS)


def test_a_folder_loads_frozen_and_joins_nothing(folder):
    prior = load_video_prior(str(folder))
    assert prior.facts.num_frames == 16 and prior.facts.image_size == 64
    assert not any(parameter.requires_grad for parameter in prior.unet.parameters())
    assert not prior.unet.training and cross_view_attention_size(prior.unet) == 1
    assert prior.schedule.prediction_type == "v_prediction"
    assert float(prior.schedule.alphas_cumprod[-1]) == 0


def test_a_folder_without_facts_is_no_embedded_prior(tmp_path):
    with pytest.raises(ValueError, match=r"holds no video\.json; .* zeroscope-guidance"):
        read_video_facts(tmp_path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"frames": 3}, r"holds frames=3; expected the keys num_frames \(int\)"),
        ({"num_frames": "16"}, r"holds num_frames='16'; expected"),
        ({"class_vector": "mvdream"}, r"class vector 'mvdream'; expected 'embedded-spin'"),
    ],
)
def test_wrong_facts_are_named(tmp_path, facts, message):
    (tmp_path / "video.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=message):
        read_video_facts(tmp_path)


def test_a_multiview_unet_is_refused(tmp_path):
    write_folder(tmp_path, build_multiview_unet(), VIDEO_FACTS)
    with pytest.raises(ValueError, match=r"class vector of 32 numbers; expected 355 .*train_video"):
        load_video_prior(str(tmp_path))
