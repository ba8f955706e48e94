"""What is said of a wrong configuration, and what our loading adds to the contract's."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    ValidationError,
)
from threestudio.utils.config import (
    ExperimentConfig,
    config_to_primitive,
    dump_config,
    load_config,
    parse_structured,
)


@dataclass
class Config:
    radius: float = 1.0
    steps: int = 10
    name: str = "x"
    use: bool = False
    size: tuple[float, float] = (1.0, 2.0)
    net: dict = field(default_factory=dict)
    path: str | None = None
    anything: Any = None


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
class TestParseStructured:
    def test_unknown_key_names_the_nearest(self, make):
        with pytest.raises(TypeError, match="unknown key 'radis'.*Did you mean 'radius'"):
            parse_structured(Config, make({"radis": 1}))

    def test_unknown_key_without_a_neighbour_lists_all(self, make):
        with pytest.raises(TypeError, match="It has anything, name, net"):
            parse_structured(Config, make({"qqq": 1}))

    @pytest.mark.parametrize("values", [{"steps": "many"}, {"radius": None}, {"use": "maybe"}])
    def test_wrong_type_names_the_key(self, make, values):
        with pytest.raises(ValidationError, match=f"wrong type for '{next(iter(values))}'"):
            parse_structured(Config, make(values))


def test_a_tuple_is_accepted_like_a_list():
    assert list(parse_structured(Config, {"radius": (0, 1.0, 2.0, 5)}).radius) == [0, 1.0, 2.0, 5]


def test_no_mapping_is_refused():
    with pytest.raises(TypeError, match="config of Config is None; expected a mapping"):
        parse_structured(Config, None)


def test_interpolations_are_read_once_and_literal_text_stays():
    outer = OmegaConf.create({"value": 3, "part": {"steps": "${value}", "name": "\\${value}"}})
    cfg = parse_structured(Config, outer.part)
    assert (cfg.steps, cfg.name) == (3, "${value}")


def test_an_error_in_a_nested_config_gives_the_whole_key():
    outer = OmegaConf.create({"system": {"geometry": {"radis": 1}, "renderer": {"steps": "x"}}})
    with pytest.raises(TypeError, match="'system.geometry.radis'"):
        parse_structured(Config, outer.system.geometry)
    with pytest.raises(ValidationError, match="'system.renderer.steps'"):
        parse_structured(Config, outer.system.renderer)


UPSTREAM = """
name: example
tag: "${rmspace:${system.prompt_processor.prompt},_}"
exp_root_dir: %s
system_type: some-system
system:
  prompt_processor:
    prompt: ???
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "example.yaml"
    path.write_text(UPSTREAM % (tmp_path / "outputs"))
    return path


PROMPT = "system.prompt_processor.prompt"


def test_a_folder_is_made_only_on_request(config_file):
    cfg = load_config(config_file, cli_args=[f"{PROMPT}=x"], make_trial_dir=False)
    assert not os.path.exists(cfg.trial_dir)
    assert os.path.isdir(load_config(config_file, cli_args=[f"{PROMPT}=x"]).trial_dir)


def test_missing_prompt_fails_while_the_config_is_loaded(config_file):
    with pytest.raises(InterpolationToMissingValueError, match="'tag' needs a value"):
        load_config(config_file)


def test_unknown_top_level_key_is_a_type_error(config_file):
    with pytest.raises(TypeError, match="unknown key 'sytem'.*Did you mean 'system'"):
        load_config(config_file, cli_args=[f"{PROMPT}=x", "sytem.a=1"])


def test_a_trial_needs_a_name():
    with pytest.raises(ValueError, match="tag is empty and use_timestamp is false"):
        ExperimentConfig(use_timestamp=False)


def test_several_gpus_disable_the_timestamp_and_need_a_tag(caplog):
    assert ExperimentConfig(tag="a", n_gpus=2).trial_name == "a"
    assert "Timestamps are disabled" in caplog.text
    with pytest.raises(ValueError, match="several ranks need one"):
        ExperimentConfig(n_gpus=2)


def test_hostile_tags_stay_inside_the_experiment(tmp_path):
    cfg = ExperimentConfig(name="../../up", tag="../x/y\0z", exp_root_dir=str(tmp_path))
    assert os.path.realpath(cfg.trial_dir).startswith(os.path.realpath(tmp_path) + os.sep)


def test_dumped_config_reads_back_equal(config_file, tmp_path):
    prompt = "a ${seed} cube: with # and [brackets"
    cfg = load_config(config_file, cli_args=[f"{PROMPT}={prompt}"], make_trial_dir=False)
    dump_config(tmp_path / "parsed.yaml", cfg)
    again = load_config(tmp_path / "parsed.yaml", make_trial_dir=False)
    assert config_to_primitive(again) == config_to_primitive(cfg)
    assert again.system.prompt_processor.prompt == prompt
