"""Prompt processors, directions of views and Perp-Neg: section 4.10, the formulas by hand."""

import hashlib
import json
import math
import os

import pytest
import threestudio
import torch
from threestudio.models.prompt_processors.base import (
    PromptProcessor,
    PromptProcessorOutput,
    hash_prompt,
    shift_azimuth_deg,
)

MODEL = "somebody/some-model"
SIDE, FRONT, BACK, OVERHEAD = range(4)


def embedding(prompt):
    """What the encoder of these tests answers: a random matrix that the text decides."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "big")
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))


class Processor(PromptProcessor):
    """An extension's processor: it encodes in a static function that writes files."""

    encoded = []

    @staticmethod
    def spawn_func(model, prompts, cache_dir):
        Processor.encoded.extend(prompts)
        for prompt in prompts:
            path = os.path.join(cache_dir, f"{hash_prompt(model, prompt)}.pt")
            torch.save(embedding(prompt), path)


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Processor.encoded.clear()
    return lambda **cfg: Processor(
        {"prompt": "a cube", "pretrained_model_name_or_path": MODEL, "spawn": False, **cfg}
    )


def views(*pairs):
    """(elevation, azimuth) in degrees to the arguments of the look-up."""
    elevation, azimuth = torch.tensor(pairs, dtype=torch.float32).unbind(-1)
    return {
        "elevation": elevation, "azimuth": azimuth, "camera_distances": torch.ones_like(azimuth),
    }  # fmt: skip


def test_defaults():
    cfg = Processor.Config()
    assert (cfg.prompt, cfg.negative_prompt) == ("a hamburger", "")
    assert cfg.pretrained_model_name_or_path == "runwayml/stable-diffusion-v1-5"
    assert (cfg.overhead_threshold, cfg.front_threshold, cfg.back_threshold) == (60, 45, 45)
    assert cfg.prompt_side is None and cfg.use_cache and cfg.spawn and not cfg.use_perp_neg
    assert not cfg.view_dependent_prompt_front and not cfg.use_prompt_debiasing
    assert (tuple(cfg.perp_neg_f_sb), tuple(cfg.perp_neg_f_fsb)) == ((1, 0.5, -0.606),
                                                                     (1, 0.5, 0.967))  # fmt: skip
    assert tuple(cfg.perp_neg_f_fs) == tuple(cfg.perp_neg_f_sf) == (4, 0.5, -2.426)


def test_the_hash_is_md5_of_model_and_prompt():
    assert hash_prompt(MODEL, "a cube") == hashlib.md5(b"somebody/some-model-a cube").hexdigest()


def test_azimuths_are_wrapped():
    given = torch.tensor([0.0, 180.0, 190.0, -190.0, 360.0, 725.0])
    assert shift_azimuth_deg(given).tolist() == [0, -180, -170, 170, 0, 5]


def test_texts_of_the_directions_in_their_order(make):
    out = make()()
    assert isinstance(out, PromptProcessorOutput)
    assert [direction.name for direction in out.directions] == ["side", "front", "back", "overhead"]
    assert out.direction2idx == {"side": 0, "front": 1, "back": 2, "overhead": 3}
    assert out.prompt == "a cube"
    assert out.prompts_vd == [
        "a cube, side view", "a cube, front view", "a cube, back view", "a cube, overhead view"
    ]  # fmt: skip
    assert torch.equal(out.text_embeddings, embedding("a cube")[None])
    assert torch.equal(out.text_embeddings_vd, torch.stack([embedding(p) for p in out.prompts_vd]))
    assert torch.equal(out.uncond_text_embeddings, embedding("")[None])
    assert torch.equal(out.uncond_text_embeddings_vd, embedding("").expand(4, 3, 4))


def test_words_may_go_before_or_be_written_by_hand(make):
    first = make(view_dependent_prompt_front=True)()
    assert first.prompts_vd == [
        "side view of a cube", "front view of a cube", "backside view of a cube",
        "overhead view of a cube",
    ]  # fmt: skip
    assert make(prompt_back="its rear")().prompts_vd[BACK] == "its rear"
    negative = make(negative_prompt="ugly")()
    assert torch.equal(negative.uncond_text_embeddings, embedding("ugly")[None])


def test_texts_are_encoded_once_and_read_from_the_cache_afterwards(make):
    make(prompt="a ball")
    assert set(Processor.encoded) == {
        "a ball", "", *(f"a ball, {d} view" for d in ("side", "front", "back", "overhead"))
    }  # fmt: skip
    Processor.encoded.clear()
    make(prompt="a ball")
    assert Processor.encoded == []


@pytest.mark.parametrize(
    ("view", "direction"),
    [
        ((0, 0), FRONT), ((0, 44.9), FRONT), ((0, 45), SIDE), ((0, -44), FRONT), ((0, 90), SIDE),
        ((0, 135), SIDE), ((0, 136), BACK), ((0, 180), BACK), ((0, 224), BACK), ((0, -136), BACK),
        ((0, 316), FRONT), ((60, 0), FRONT), ((60.5, 0), OVERHEAD), ((80, 180), OVERHEAD),
    ],
)  # fmt: skip
def test_the_camera_chooses_the_text(make, view, direction):
    out = make(negative_prompt="bad")()
    got = out.get_text_embeddings(**views(view), view_dependent_prompting=True)
    assert torch.equal(got[0], out.text_embeddings_vd[direction])
    assert torch.equal(got[1], out.uncond_text_embeddings_vd[direction])


def test_conditional_rows_come_first(make):
    out = make()()
    got = out.get_text_embeddings(**views((0, 0), (0, 90), (70, 0)))
    assert got.shape == (6, 3, 4)
    assert torch.equal(got[:3], out.text_embeddings_vd[[FRONT, SIDE, OVERHEAD]])
    assert torch.equal(got[3:], out.uncond_text_embeddings_vd[[FRONT, SIDE, OVERHEAD]])
    plain = out.get_text_embeddings(**views((0, 0), (0, 90)), view_dependent_prompting=False)
    assert torch.equal(plain[:2], embedding("a cube").expand(2, 3, 4))
    assert torch.equal(plain[2:], embedding("").expand(2, 3, 4))


def decay(r, a, b, c):
    return a * math.exp(-b * r) + c


@pytest.mark.parametrize("azimuth", [0, 30, 89, -60, 90, 120, 180, -150])
def test_perp_neg_around_the_object(make, azimuth):
    out = make(use_perp_neg=True, negative_prompt="bad")()
    assert out.use_perp_neg
    side, front, back, _ = out.text_embeddings_vd
    rows, weights = out.get_text_embeddings_perp_neg(**views((0, azimuth)))
    assert rows.shape == (4, 3, 4) and weights.shape == (1, 2)
    if abs(azimuth) < 90:
        r = 1 - abs(azimuth) / 90
        positive, negatives = r * front + (1 - r) * side, (front, side)
        expected = -decay(r, 4, 0.5, -2.426), -decay(1 - r, 4, 0.5, -2.426)
    else:
        r = 2 - abs(azimuth) / 90
        positive, negatives = r * side + (1 - r) * back, (side, front)
        expected = -decay(r, 1, 0.5, -0.606), -decay(r, 1, 0.5, 0.967)
    assert torch.allclose(rows[0], positive, atol=1e-6)
    assert torch.equal(rows[1], embedding("bad"))
    assert torch.allclose(rows[2], negatives[0]) and torch.allclose(rows[3], negatives[1])
    assert weights[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_perp_neg_interleaves_the_negatives_and_leaves_overhead_views_alone(make):
    out = make(use_perp_neg=True)()
    side, front, _, overhead = out.text_embeddings_vd
    rows, weights = out.get_text_embeddings_perp_neg(**views((0, 0), (75, 0), (0, 170)))
    assert rows.shape == (12, 3, 4)
    assert torch.allclose(rows[1], overhead) and weights[1].abs().max() == 0
    assert torch.allclose(rows[6], front) and torch.allclose(rows[7], side)  # of the first view
    assert torch.allclose(rows[10], side) and torch.allclose(rows[11], front)  # of the third


def test_prompts_of_the_library_are_found_by_their_words(make, tmp_path):
    (tmp_path / "load").mkdir()
    (tmp_path / "load" / "prompt_library.json").write_text(
        json.dumps({"dreamfusion": ["a red cube on grass", "a red ball", "a blue cube"]})
    )
    assert make(prompt="lib:red_cube")().prompt == "a red cube on grass"
    for ambiguous in ("lib:red", "lib:tree"):
        with pytest.raises(ValueError):
            make(prompt=ambiguous)


def test_a_processor_is_no_module_and_enters_no_checkpoint(make):
    holder = torch.nn.Module()
    holder.prompt_processor = make()
    assert holder.state_dict() == {}


def test_the_dummy_needs_no_model():
    out = threestudio.find("dummy-prompt-processor")({"prompt": "anything"})()
    assert out.get_text_embeddings(**views((0, 0), (0, 90))).shape[0] == 4
