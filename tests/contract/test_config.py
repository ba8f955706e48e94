"""Configurations: parsing, merging, interpolation, names of trials. Sections 1.4 and 2."""

import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple  # noqa: UP035 - as extensions annotate
from unittest.mock import ANY

import pytest
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    MissingMandatoryValue,
    ValidationError,
)
from threestudio.utils.config import (
    C_max,
    ExperimentConfig,
    config_to_primitive,
    dump_config,
    load_config,
    parse_structured,
)


@dataclass
class Sub:
    x: int = 1


@dataclass
class Fields:
    """The kinds of fields that extensions declare."""

    scale: float = 1.0
    count: int = 3
    name: str = ""
    flag: bool = False
    schedule: Any = 0.5
    step_percent: float = 0.02
    color: Tuple[float, float] = (1.0, 2.0)  # noqa: UP006
    words: List[str] = field(default_factory=list)  # noqa: UP006
    extra: dict = field(default_factory=dict)
    table: Dict[str, Any] = field(default_factory=dict)  # noqa: UP006
    clip: Optional[Any] = None  # noqa: UP045
    base: Optional[Sub] = None  # noqa: UP045


def load(text, *cli, **kwargs):
    """An experiment from text, whose folder is not made unless the test says where."""
    base = "tag: t\nuse_timestamp: false\n"
    return load_config(base + text, from_string=True, cli_args=list(cli), **kwargs)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# parse_structured


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"scale": "0.5"}, "scale", 0.5),
        ({"scale": 2}, "scale", 2.0),
        ({"count": "7"}, "count", 7),
        ({"name": 5}, "name", "5"),
        ({"flag": "yes"}, "flag", True),
        ({"clip": None}, "clip", None),
        ({"clip": [0, 2.0, 8.0, 1000]}, "clip", [0, 2.0, 8.0, 1000]),
    ],
)
def test_scalars_are_converted_to_their_field(given, key, value):
    parsed = getattr(parse_structured(Fields, given), key)
    assert parsed == value and type(parsed) in (type(value), ListConfig)


@pytest.mark.parametrize(
    "given", [{"scale": "much"}, {"count": 1.5}, {"scale": None}, {"flag": "perhaps"}]
)
def test_a_scalar_that_does_not_fit_is_refused(given):
    with pytest.raises(ValidationError):
        parse_structured(Fields, given)


@pytest.mark.parametrize("wrap", [OmegaConf.create, lambda value: value], ids=["node", "plain"])
def test_lists_and_mappings_are_stored_whatever_the_type_of_the_field(wrap):
    parsed = parse_structured(
        Fields,
        {
            "step_percent": wrap([0, 0.98, 0.02, 8000]),
            "color": wrap([1, 2, 3]),
            "base": wrap({"unknown": 4}),
            "table": wrap({"a": [1, {"b": 2}]}),
        },
    )
    assert list(parsed.step_percent) == [0, 0.98, 0.02, 8000]
    assert list(parsed.color) == [1, 2, 3]
    assert parsed.base.unknown == 4
    assert parsed.table.a[1].b == 2


def test_defaults_are_complete_and_tuples_read_as_sequences():
    parsed = parse_structured(Fields, {})
    assert tuple(parsed.color) == (1.0, 2.0) and parsed.color[1] == 2.0
    assert parsed.words == [] and parsed.clip is None and parsed.count == 3


def test_unknown_keys_and_no_mapping_are_type_errors():
    with pytest.raises(TypeError, match="scael"):
        parse_structured(Fields, {"scael": 1.0})
    with pytest.raises(TypeError):
        parse_structured(Fields, None)


def test_a_value_that_must_be_given_is_missed_when_parsed():
    with pytest.raises(MissingMandatoryValue):
        parse_structured(Fields, OmegaConf.create({"name": "???"}))


def test_result_knows_its_fields_only_and_lets_code_write_into_them():
    parsed = parse_structured(Fields, {"extra": {"a": 1}})
    with pytest.raises(ConfigAttributeError):
        _ = parsed.undeclared
    with pytest.raises(ConfigAttributeError):
        parsed.undeclared = 1
    assert parsed.get("undeclared", 5) == 5 and not hasattr(parsed, "undeclared")
    parsed.scale = 4.0
    parsed.extra.prompt = "a cube"
    parsed.extra["new"] = 2
    assert (parsed.scale, parsed.extra.prompt, parsed.extra.new) == (4.0, "a cube", 2)


def test_sub_configs_are_shared_with_the_experiment_as_open_mappings():
    cfg = load("system:\n  guidance: {scale: 1}\n")
    cfg.system["prompt"] = "a cube"
    cfg.system.guidance["prompt"] = cfg.system.prompt
    assert cfg.system.guidance.prompt == "a cube"


# load_config


def test_defaults_of_an_experiment():
    cfg = load("")
    expected = {
        "name": "default", "description": "", "seed": 0, "timestamp": None,
        "exp_root_dir": "outputs", "n_gpus": 1, "resume": None, "data_type": "", "data": {},
        "system_type": "", "system": {}, "trainer": {}, "checkpoint": {},
    }  # fmt: skip
    assert {key: cfg[key] for key in expected} == expected
    assert ExperimentConfig().use_timestamp is True and ExperimentConfig().tag == ANY


def test_later_sources_win_files_then_command_line_then_keywords(tmp_path):
    for name, text in (("a", "seed: 1\nname: a\ntag: t\n"), ("b", "seed: 2\nname: b\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")]
    assert load_config(*files, cli_args=[]).seed == 2
    cfg = load_config(*files, cli_args=["seed=3", "name=c"], seed=4)
    assert (cfg.seed, cfg.name) == (4, "c")


def test_unknown_top_level_keys_are_type_errors():
    with pytest.raises(TypeError, match="sytem"):
        load("sytem: {}\n")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("a=null", None), ("a=", None), ("a=yes", True), ("a=true", True), ("a=off", False),
        ("a=007", 7), ("a=1e-3", 0.001), ("a=1.e-15", 1e-15), ("a=[1,2.5,x]", [1, 2.5, "x"]),
        ("a={b: 1}", {"b": 1}), ("a='yes'", "yes"), ("a=16-mixed", "16-mixed"), ("a.b.c=1", ANY),
    ],
)  # fmt: skip
def test_values_of_the_command_line_are_yaml(argument, value):
    data = load("data: {a: {b: {c: 0}}}\n" if "b.c" in argument else "", f"data.{argument}").data
    assert data.a == value
    assert "b.c" not in argument or data.a.b.c == 1


def test_a_list_is_replaced_whole_and_not_by_element():
    assert load("data: {l: [1, 2, 3]}\n", "data.l=[9]").data.l == [9]
    with pytest.raises(Exception, match="l.0"):
        load("data: {l: [1, 2, 3]}\n", "data.l.0=9")


def test_a_dashed_key_is_an_unknown_key():
    with pytest.raises(TypeError, match="--seed"):
        load("", "--seed=1")


def test_primitive_and_dump(tmp_path):
    cfg = load("seed: 5\ndata: {l: [1, 2], same: '${seed}'}\n")
    assert config_to_primitive(cfg)["data"] == {"l": [1, 2], "same": 5}
    assert type(config_to_primitive(cfg)["data"]["l"]) is list
    with pytest.raises(ValueError):
        config_to_primitive({"a": 1})
    dump_config(str(tmp_path / "dumped.yaml"), cfg)
    assert load_config(str(tmp_path / "dumped.yaml"), cli_args=[]) == cfg


# Interpolations


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${calc_exp_lr_decay_rate:0.1,2}", 0.1**0.5),
        ("${add:2,3}", 5),
        ("${sub:${seed},3}", 4),
        ("${mul:2,3.5}", 7.0),
        ("${div:7,2}", 3.5),
        ("${idiv:7,2}", 3),
        ("${basename:a/b/c.png}", "c.png"),
        ("${rmspace:a red cube,_}", "a_red_cube"),
        ("${tuple2:2}", [2.0, 2.0]),
        ("${gt0:${seed}}", True),
        ("${gt0:0}", False),
        ("${cmaxgt0:[0,0,0.5,10]}", True),
        ("${cmaxgt0:[5,0.,0.,100]}", False),
        ("${cmaxgt0:0.1}", True),
        ("${cmaxgt0orcmaxgt0:0,[0,0.,1.,10]}", True),
        ("${cmaxgt0orcmaxgt0:0,0.}", False),
        ("${not:true}", False),
        ("${not:${cmaxgt0:0}}", True),
    ],
)
def test_resolvers(text, value):
    assert load(f'seed: 7\ndata: {{v: "{text}"}}\n').data.v == value


def test_a_resolver_cannot_be_registered_again():
    with pytest.raises(ValueError):
        OmegaConf.register_resolver("rmspace", lambda text, sub: text)


def test_the_tag_follows_the_prompt_and_a_missing_prompt_stops_the_loading():
    text = """
    name: n
    tag: "${rmspace:${system.prompt_processor.prompt},_}"
    system:
      prompt_processor:
        prompt: ???
      same: "${system.prompt_processor.prompt}"
    """
    cfg = load_config(
        text, from_string=True, cli_args=["system.prompt_processor.prompt=a red cube"]
    )
    assert cfg.trial_name.startswith("a_red_cube@") and cfg.system.same == "a red cube"
    with pytest.raises(Exception, match="system.prompt_processor.prompt|tag|system.same"):
        load_config(text, from_string=True, cli_args=[])


def test_schedules_of_the_loss_switch_other_keys():
    cfg = load("""
system:
  loss: {lambda_orient: [0, 0., 10., 500], lambda_z: 0.}
  renderer:
    return_comp_normal: ${cmaxgt0:${system.loss.lambda_orient}}
    return_z: ${cmaxgt0:${system.loss.lambda_z}}
""")
    assert cfg.system.renderer == {"return_comp_normal": True, "return_z": False}
    assert C_max(cfg.system.loss.lambda_orient) == 10.0 and C_max(3) == 3


# Trials


def test_folders_follow_name_tag_and_timestamp(tmp_path):
    cfg = load("name: n\nexp_root_dir: out\n", "timestamp='@20260102-030405'")
    assert (cfg.exp_dir, cfg.trial_name) == ("out/n", "t@20260102-030405")
    assert cfg.trial_dir == "out/n/t@20260102-030405" and (tmp_path / cfg.trial_dir).is_dir()
    assert load("exp_root_dir: out\n").trial_name == "t"


def test_a_fresh_timestamp_has_date_and_time():
    cfg = load_config("tag: t\n", from_string=True, cli_args=[])
    assert re.fullmatch(r"t@\d{8}-\d{6}", cfg.trial_name)
    assert cfg.timestamp == cfg.trial_name[1:]


def test_several_gpus_take_no_timestamp_of_their_own():
    cfg = load_config("tag: t\n", from_string=True, cli_args=[], n_gpus=2)
    assert (cfg.trial_name, cfg.use_timestamp) == ("t", False)


def test_a_trial_needs_a_tag_or_a_timestamp():
    with pytest.raises(ValueError):
        load_config("use_timestamp: false\n", from_string=True, cli_args=[])


def test_the_result_is_an_omegaconf_object():
    assert isinstance(load("data: {a: [1]}\n"), DictConfig)
