"""Files written by hand in the format of sentencepiece, and segmentation by exhaustive search."""

import itertools
import struct

import pytest
from threestudio.utils.diffusers_folder import load_tokenizer
from threestudio.utils.sentencepiece_tokenizer import read_sentencepieces, t5_tokenizer

PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("\u2581", -3.0, 1),
          ("\u2581a", -2.0, 1), ("\u2581red", -4.0, 1), ("re", -3.5, 1), ("d", -3.0, 1),
          ("r", -5.0, 1), ("e", -2.5, 1), ("\u2581c", -3.0, 1), ("ub", -4.0, 1),
          ("cube", -6.0, 1)]  # fmt: skip


def varint(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def field(number, content):
    return varint(number << 3 | 2) + varint(len(content)) + content


def model_bytes(pieces=PIECES, model_type=1, filler=0):
    data = b""
    for text, score, kind in pieces:
        body = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        if kind != 1:  # the default is left out, as the format's writers do
            body += varint(3 << 3) + varint(kind)
        data += field(1, body)
    trainer = field(1, b"x" * filler) + varint(3 << 3) + varint(model_type)
    return data + field(2, trainer) + field(3, field(1, b"nmt_nfkc"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(model_bytes(filler=300))
    return path


def best_segmentation(word):
    """The most likely way to cut a word into known pieces, by trying all of them."""
    scores = {text: score for text, score, kind in PIECES if kind == 1}
    found = []
    for cuts in itertools.product((False, True), repeat=len(word) - 1):
        parts, start = [], 0
        for index, cut in enumerate((*cuts, True), start=1):
            if cut:
                parts.append(word[start:index])
                start = index
        if all(part in scores for part in parts):
            found.append((sum(scores[part] for part in parts), parts))
    return max(found)[1]


def test_what_a_file_says(path):
    model = read_sentencepieces(path)
    assert [text for text, _ in model.pieces] == [text for text, _, _ in PIECES]
    assert [score for _, score in model.pieces] == [score for _, score, _ in PIECES]
    assert model.kinds == [kind for _, _, kind in PIECES]
    assert (model.model_type, model.charsmap) == (1, b"")


@pytest.mark.parametrize("text", ["a red cube", "red", "a  reed ", "re"])
def test_segmentation_is_the_most_likely_one(path, text):
    index = {piece: i for i, (piece, _, _) in enumerate(PIECES)}
    expected = [
        index[part] for word in text.split() for part in best_segmentation("\u2581" + word)
    ]
    tokenizer = t5_tokenizer(path)
    assert tokenizer(text).input_ids == [*expected, 1]
    assert tokenizer.decode(expected) == " ".join(text.split())


def test_unknown_letters_padding_and_truncation(path):
    tokenizer = t5_tokenizer(path)
    assert tokenizer("").input_ids == [1]
    assert 2 in tokenizer("a zebra").input_ids
    batch = tokenizer(["a", "a red red red"], padding="max_length", max_length=4, truncation=True)
    assert batch.input_ids == [[4, 1, 0, 0], [4, 5, 5, 1]]
    assert batch.attention_mask == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_a_folder_with_nothing_but_the_model_file_is_loaded(path, tmp_path):
    folder = tmp_path / "model" / "tokenizer"
    folder.mkdir(parents=True)
    (folder / "spiece.model").write_bytes(path.read_bytes())
    config = '{"tokenizer_class": "T5Tokenizer", "model_max_length": 77}'
    (folder / "tokenizer_config.json").write_text(config)
    tokenizer = load_tokenizer(folder.parent)
    assert tokenizer("a red").input_ids == [4, 5, 1] and tokenizer.model_max_length == 77
    (folder / "spiece.model").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither tokenizer.json nor spiece.model"):
        load_tokenizer(folder.parent)


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, model_bytes()[:50], b"<html>no</html>"])
def test_what_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is no sentencepiece model; fetch the model again"):
        read_sentencepieces(path)


def test_other_kinds_of_models_are_refused(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(model_bytes(model_type=2))
    with pytest.raises(ValueError, match="model of type 2; expected a unigram model"):
        t5_tokenizer(path)
