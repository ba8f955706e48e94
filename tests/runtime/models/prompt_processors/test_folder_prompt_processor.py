"""A text encoder's folder: its precision, its hash, and what is said of long prompts."""

import shutil

import pytest
import torch
from threestudio.models.prompt_processors.folder_prompt_processor import (
    FolderPromptProcessor,
    warn_if_cut,
)
from threestudio.utils.pretrained import ModelUnavailableError


class Processor(FolderPromptProcessor):
    """Encodes every text as one zero, so that no network runs."""

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1, 1)


def processor(folder, tmp_path):
    name, cache = str(folder), str(tmp_path / "cache")
    return Processor({"pretrained_model_name_or_path": name, "prompt": "a", "cache_dir": cache})


def test_the_cpu_computes_in_full_precision_whatever_is_asked(sd_folder, tmp_path):
    made = processor(sd_folder, tmp_path)
    for half in (False, True):
        encoder = made.load_encoder(half_precision=half)
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
        assert not encoder.training


def test_the_fingerprint_is_that_of_the_files(sd_folder, tmp_path):
    copy = shutil.copytree(sd_folder, tmp_path / "copy")
    first = processor(sd_folder, tmp_path).encoder_fingerprint()
    assert processor(copy, tmp_path).encoder_fingerprint() == first
    config = copy / "text_encoder" / "config.json"
    config.write_text(config.read_text() + " ")
    assert processor(copy, tmp_path).encoder_fingerprint() != first


def test_a_missing_folder_ends_it_before_anything_is_encoded(tmp_path):
    with pytest.raises(ModelUnavailableError, match="nowhere"):
        processor(tmp_path / "nowhere", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_a_prompt_is_mentioned_only_where_it_is_cut(caplog):
    warn_if_cut("a red cube", 7, 7)
    assert caplog.text == ""
    warn_if_cut("a red cube", 8, 7)
    assert "The prompt 'a red cube' has 8 tokens; only 7 are read." in caplog.text
