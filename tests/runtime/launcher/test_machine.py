"""Probes of the machine, without a GPU and on models that a test makes."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher.machine import check_prompt_words, probe_machine, unknown_prompt_words
from threestudio.utils.config_errors import ConfigValueError


@dataclass
class ProcessorConfig:
    prompt: str = ""
    model: str = ""


class Processor:
    Config = ProcessorConfig

    @classmethod
    def required_models(cls, cfg):
        return [cfg.model]


class System:
    @dataclass
    class Config:
        prompt_processor_type: str = ""
        prompt_processor: dict = field(default_factory=dict)


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A diffusers folder whose tokenizer knows four words."""
    monkeypatch.setattr(registry, "__modules__", {"r1-processor": Processor, "r1-system": System})
    words = ["[UNK]", "a", "red", "cube"]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: index for index, word in enumerate(words)},
            "unk_token": "[UNK]",
        },
    }
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return tmp_path


def experiment(model, prompt):
    return OmegaConf.create(
        {
            "system_type": "r1-system",
            "system": {
                "prompt_processor_type": "r1-processor",
                "prompt_processor": {"prompt": prompt, "model": str(model)},
            },
        }
    )


def test_words_that_the_encoder_lacks(model):
    assert unknown_prompt_words(experiment(model, "a red cube")) == []
    assert unknown_prompt_words(experiment(model, "a red dog and a dog")) == ["dog", "and"]


def test_a_prompt_beyond_the_vocabulary_is_refused_with_the_known_words(model):
    check_prompt_words(experiment(model, "a red cube"))
    with pytest.raises(ConfigValueError, match="does not know: kube.*mean cube.*a cube red"):
        check_prompt_words(experiment(model, "a red kube"))


def test_probe_of_prompt_and_models(model, tmp_path):
    machine = probe_machine(lambda name: experiment(model, name))
    assert machine.covers_prompt("a cube") and not machine.covers_prompt("a dog")
    assert machine.has_models("a cube")
    absent = probe_machine(lambda name: experiment(tmp_path / "absent", name))
    assert not absent.has_models("a cube") and not absent.covers_prompt("a cube")


def test_a_profile_that_cannot_be_composed_fits_nothing():
    def fail(name):
        raise ConfigValueError("no such value")

    machine = probe_machine(fail)
    assert not machine.has_models("x") and not machine.covers_prompt("x")


def test_free_memory_is_in_gib(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 8 * 2**30))
    assert probe_machine(None).free_gpu_gib == 3.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert probe_machine(None).free_gpu_gib is None
