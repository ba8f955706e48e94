import pytest
from threestudio.models.prompt_processors.vocabulary import check_words, read_vocabulary


def test_words_without_special_tokens_and_punctuation(word_folder):
    assert read_vocabulary(word_folder).words == (
        "a",
        "back",
        "blue",
        "cube",
        "front",
        "overhead",
        "red",
        "side",
        "sphere",
        "view",
    )


def test_a_tokenizer_that_splits_words_has_no_vocabulary(sd_folder, tmp_path):
    assert read_vocabulary(sd_folder) is None
    assert read_vocabulary(tmp_path) is None
    check_words("sd", None, ["anything goes"])


def test_unknown_words_once_and_in_order(word_folder):
    vocabulary = read_vocabulary(word_folder)
    assert vocabulary.unknown_words("A Red cube, side view") == []
    assert vocabulary.unknown_words("a Dragon on a dragon, Dragon") == ["Dragon", "on", "dragon"]
    # Longer than the encoder's 77 tokens: the last word counts as well.
    assert vocabulary.unknown_words("cube " * 100 + "dragon") == ["dragon"]


def test_the_sentence_names_unknown_near_and_known_words(word_folder):
    with pytest.raises(ValueError) as caught:
        check_words("embedded://multiview", read_vocabulary(word_folder), ["a rad dragon cube"])
    message = str(caught.value)
    assert "text encoder of 'embedded://multiview' does not know: rad, dragon" in message
    assert "Did you mean red?" in message
    assert "only these words: a back blue cube front overhead red side sphere view." in message
    assert "profile=low_vram" in message
