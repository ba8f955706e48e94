import pytest

from tests.fixtures.model_folders import (
    TINY_TEXT,
    write_stable_diffusion_folder,
    write_text_encoder,
    write_word_tokenizer,
)

WORDS = ["a", "red", "blue", "cube", "sphere", "side", "front", "back", "overhead", "view", ","]


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A tiny model with CLIP's own kind of tokenizer, which knows every word."""
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("text") / "sd")


@pytest.fixture(scope="session")
def word_folder(tmp_path_factory):
    """A tiny text encoder with a word-level tokenizer, like the embedded one."""
    import torch

    root = tmp_path_factory.mktemp("text") / "words"
    write_word_tokenizer(root / "tokenizer", WORDS)
    write_text_encoder(root / "text_encoder", TINY_TEXT, torch.float16, seed=1)
    return root
