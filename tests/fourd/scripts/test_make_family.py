"""The family of embedded checkpoints is frozen, and its tokenizer knows every later word."""

import json

import pytest

from custom.fourd.diffusion.camera_vector import CAMERA_VECTOR_SIZE
from custom.fourd.scripts import make_family
from custom.fourd.scripts.make_family import (
    END,
    PAD,
    PLACEHOLDERS,
    START,
    UNKNOWN,
    family,
    family_hash,
    load_family,
    make_tokenizer,
    vocabulary,
)
from custom.fourd.world import vocabulary as world

FROZEN = "60e7c18d13d3befe4100af1e8e3bfcc9c8e0b62a2e3b88e717ae64af0459e1a9"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def test_the_family_is_frozen():
    """Every embedded checkpoint carries this hash; a change would silently break them all."""
    assert load_family()["hash"] == FROZEN == family_hash(family())
    assert {**family(), "hash": FROZEN} == load_family()


def test_the_vocabulary_holds_every_word_of_the_world():
    words = vocabulary()
    assert len(words) == len(set(words)) == family()["tokenizer"]["size"]
    spoken = " ".join(
        (*world.SHAPES, *world.SHAPE_SYNONYMS, *world.COLOURS, *world.SIZES, *world.MATERIALS,
         *world.MATERIAL_SYNONYMS, *world.MOTIONS, *world.RELATIONS, *world.RELATION_SYNONYMS,
         *world.VIEW_SUFFIXES, "a an the made of ,")
    ).split()  # fmt: skip
    assert set(spoken) <= set(words)


@pytest.mark.parametrize(
    "sentence",
    [
        "make it blue",
        "turn the cube into a ball",
        "make it look like a pencil sketch",
        "a photo of a <view> <time> object",
        "a small red cube made of wood next to a metal torus, overhead view",
        "give it stripes",
        "a striped blue cone growing",
    ],
)
def test_later_methods_find_their_words(tokenizer, sentence):
    ids = tokenizer(sentence).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids[1:-1]).replace(" ,", ",") == sentence


def test_the_tokenizer_pads_to_77_and_marks_both_ends(tokenizer):
    ids = tokenizer("A Red cube", padding="max_length", truncation=True).input_ids
    words = vocabulary()
    assert len(ids) == 77 == tokenizer.model_max_length
    assert [words[i] for i in ids[:6]] == [START, "a", "red", "cube", END, PAD]
    long = tokenizer("red " * 100, padding="max_length", truncation=True).input_ids
    assert len(long) == 77 and long[-1] == words.index(END)
    assert tokenizer("zebra").input_ids[1] == words.index(UNKNOWN)
    assert [tokenizer.convert_tokens_to_ids(p) for p in PLACEHOLDERS] == list(
        range(4, 4 + len(PLACEHOLDERS))
    )


def test_a_placeholder_is_one_token(tokenizer):
    assert len(tokenizer("<time> <reserved_28>").input_ids) == 4


def test_the_numbers_that_models_must_agree_on():
    facts = family()
    assert facts["camera_vector"]["size"] == CAMERA_VECTOR_SIZE["embedded"] == 32
    assert facts["latents"]["image_size_px"] % facts["latents"]["patch_size_px"] == 0
    assert facts["schedule"]["prediction_type"] == "v_prediction"
    assert facts["schedule"]["rescale_betas_zero_snr"] is True


def test_an_edited_family_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_family, "ASSETS", tmp_path)
    assert make_family.main() == 0
    assert load_family()["hash"] == FROZEN
    assert make_family.main() == 0, "writing the same again is no edit"
    facts = json.loads((tmp_path / "FAMILY.json").read_text())
    facts["latents"]["channels"] = 4
    (tmp_path / "FAMILY.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="does not match its own hash: the family is frozen"):
        load_family()
    before = (tmp_path / "FAMILY.json").read_bytes()
    assert make_family.main() == 1 and "is frozen and differs" in capsys.readouterr().out
    assert (tmp_path / "FAMILY.json").read_bytes() == before
