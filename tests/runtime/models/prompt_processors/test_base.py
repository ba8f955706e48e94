import json
from dataclasses import dataclass

import pytest
import torch
from threestudio.models.prompt_processors.base import PromptProcessor, hash_prompt


class SpelledPrompts(PromptProcessor):
    """Encodes a prompt as the code points of its letters."""

    @dataclass
    class Config(PromptProcessor.Config):
        use_cache: bool = False

    def encoder_fingerprint(self):
        return "letters"

    def encode(self, prompts):
        rows = [[ord(letter) for letter in prompt.ljust(60)] for prompt in prompts]
        return torch.tensor(rows, dtype=torch.float32).unsqueeze(-1)


class ForeignProcessor(PromptProcessor):
    """As an extension written for upstream defines it."""

    @staticmethod
    def spawn_func(model, prompts, cache_dir):
        for prompt in prompts:
            torch.save(
                torch.full((2, 3), float(len(prompt))),
                f"{cache_dir}/{hash_prompt(model, prompt)}.pt",
            )


def test_hash_is_upstreams():
    # md5 of "m-p", as md5sum prints it.
    assert hash_prompt("m", "p") == "c7e35c4ced0f01756aa6e5f1b28f8691"


def test_a_subclass_needs_only_to_encode():
    output = SpelledPrompts({"prompt": "ab", "perp_neg_f_sb": [1, 2, 3]})()
    assert output.text_embeddings[0, :2, 0].tolist() == [97, 98]
    assert output.text_embeddings_vd.shape == (4, 60, 1)
    assert output.perp_neg_f_sb == (1, 2, 3) and output.use_perp_neg is False


def test_cache_of_a_subclass_is_keyed_by_its_fingerprint(tmp_path):
    cfg = {"prompt": "ab", "use_cache": True, "cache_dir": str(tmp_path)}
    SpelledPrompts(cfg)
    # Prompt, four directions, empty negative prompt.
    assert len(list(tmp_path.iterdir())) == 6


def test_spawn_func_of_a_foreign_processor_runs_in_this_process(tmp_path):
    output = ForeignProcessor({"prompt": "abc", "cache_dir": str(tmp_path)})()
    assert output.text_embeddings[0, 0, 0] == 3
    assert output.text_embeddings_vd[0, 0, 0] == len("abc, side view")


def test_a_class_that_defines_neither_says_so(tmp_path):
    with pytest.raises(NotImplementedError, match="PromptProcessor defines no encoder_fingerprint"):
        PromptProcessor({"prompt": "ab", "cache_dir": str(tmp_path)})
    with pytest.raises(NotImplementedError, match="PromptProcessor defines no encode"):
        PromptProcessor({"prompt": "ab", "use_cache": False})


@pytest.fixture
def library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "load").mkdir()
    path = tmp_path / "load" / "prompt_library.json"
    path.write_text(json.dumps({"dreamfusion": ["a Blue jay", "a blue car", "a red car"]}))
    return path


def test_library_prompts_are_found_by_their_words(library):
    assert SpelledPrompts({"prompt": "lib:blue_car"})().prompt == "a blue car"
    assert SpelledPrompts({"prompt": "lib:jay"})().prompt == "a Blue jay"


def test_library_prompts_must_be_unique_and_present(library):
    with pytest.raises(ValueError, match=r"'lib:car' fits 2 prompts of .*a blue car; a red car"):
        SpelledPrompts({"prompt": "lib:car"})
    with pytest.raises(ValueError, match=r"fits 0 prompts of .*\(none\); expected exactly one"):
        SpelledPrompts({"prompt": "lib:dragon"})
    library.unlink()
    with pytest.raises(ValueError, match="asks for the prompt library, and .* does not exist"):
        SpelledPrompts({"prompt": "lib:car"})
