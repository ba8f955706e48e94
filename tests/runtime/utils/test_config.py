"""Structured parsing and the loading of an experiment."""

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
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
    def test_values_and_defaults(self, make):
        cfg = parse_structured(Config, make({"radius": "0.5", "name": 7}))
        assert (cfg.radius, cfg.name, cfg.steps) == (0.5, "7", 10)
        assert list(cfg.size) == [1.0, 2.0]

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

    def test_lists_and_dicts_are_stored_whatever_the_type(self, make):
        values = {"radius": [0, 0.98, 0.02, 8000], "size": [1, 2, 3], "path": {"a": 1}}
        cfg = parse_structured(Config, make(values))
        assert list(cfg.radius) == [0, 0.98, 0.02, 8000]
        assert list(cfg.size) == [1, 2, 3]
        assert cfg.path == {"a": 1}


def test_a_tuple_is_accepted_like_a_list():
    assert list(parse_structured(Config, {"radius": (0, 1.0, 2.0, 5)}).radius) == [0, 1.0, 2.0, 5]


def test_result_is_in_struct_mode_with_open_dicts_and_writable_scalars():
    cfg = parse_structured(Config, {"net": {"otype": "HashGrid"}})
    with pytest.raises(ConfigAttributeError):
        _ = cfg.undeclared
    with pytest.raises(ConfigAttributeError):
        cfg.undeclared = 1
    assert cfg.get("undeclared", 3) == 3 and not hasattr(cfg, "undeclared")
    cfg.net["prompt"] = "written later"
    cfg.steps = 11
    assert cfg.net.prompt == "written later" and cfg.steps == 11


def test_missing_value_and_no_mapping_are_refused():
    with pytest.raises(MissingMandatoryValue):
        parse_structured(Config, OmegaConf.create({"radius": "???"}))
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


def test_folders_are_named_as_upstream_names_them(config_file, tmp_path):
    cfg = load_config(config_file, cli_args=[f"{PROMPT}=a red cube", "timestamp=@20260102-030405"])
    assert cfg.trial_name == "a_red_cube@20260102-030405"
    assert cfg.exp_dir == str(tmp_path / "outputs" / "example")
    assert cfg.trial_dir == os.path.join(cfg.exp_dir, cfg.trial_name)
    assert os.path.isdir(cfg.trial_dir)


def test_timestamp_has_upstreams_form_and_can_be_left_out(config_file):
    cfg = load_config(config_file, cli_args=[f"{PROMPT}=x"], make_trial_dir=False)
    assert __import__("re").fullmatch(r"x@\d{8}-\d{6}", cfg.trial_name)
    assert not os.path.exists(cfg.trial_dir)
    cfg = load_config(
        config_file, cli_args=[f"{PROMPT}=x", "use_timestamp=false"], make_trial_dir=False
    )
    assert cfg.trial_name == "x"


def test_missing_prompt_fails_while_the_config_is_loaded(config_file):
    with pytest.raises(InterpolationToMissingValueError, match="'tag' needs a value"):
        load_config(config_file)


def test_unknown_top_level_key_is_a_type_error(config_file):
    with pytest.raises(TypeError, match="unknown key 'sytem'.*Did you mean 'system'"):
        load_config(config_file, cli_args=[f"{PROMPT}=x", "sytem.a=1"])


def test_later_sources_win(config_file, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("seed: 1\nn_gpus: 1\ndescription: from the second file\n")
    cfg = load_config(
        config_file,
        other,
        cli_args=[f"{PROMPT}=x", "seed=2", "tag=t"],
        seed=3,
        make_trial_dir=False,
    )
    assert (cfg.seed, cfg.tag, cfg.description) == (3, "t", "from the second file")


def test_config_from_a_string(tmp_path):
    cfg = load_config("tag: a\nseed: 4", from_string=True, make_trial_dir=False)
    assert (cfg.seed, cfg.tag) == (4, "a")


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


def test_primitive_refuses_what_is_no_config():
    assert config_to_primitive(DictConfig({"a": [1]})) == {"a": [1]}
    with pytest.raises(ValueError):
        config_to_primitive({"a": 1})
