"""YAML files, includes and overrides."""

import pytest
from omegaconf import OmegaConf
from threestudio.utils.config_errors import ConfigFileError, ConfigValueError, MissingValueError
from threestudio.utils.config_sources import (
    Override,
    load_with_includes,
    load_yaml,
    merge_sources,
    missing_keys,
    parse_override,
    parse_yaml,
    resolve_config,
)

HOSTILE_PROMPTS = [
    "a cube: red",
    "a cube # with a hash",
    "[a cube",
    "{a: cube}",
    "007",
    "yes",
    "null",
    "1e-3",
    "${oc.env:HOME} and ${seed}",
    "lib:a_red_cube",
    "a = b",
    "a 'quoted' cube",
    "- a cube",
    "a cube, ünïcode",
    "*anchor &alias !tag",
    "",
]


@pytest.mark.parametrize("prompt", HOSTILE_PROMPTS)
@pytest.mark.parametrize(
    "key", ["system.prompt_processor.prompt", "system.negative_prompt", "system.a.instruction"]
)
def test_prompts_on_the_command_line_stay_as_typed(prompt, key):
    cfg = resolve_config(merge_sources([], [f"{key}={prompt}"]))
    assert OmegaConf.select(cfg, key) == prompt


def test_one_pair_of_quotes_around_a_prompt_is_removed():
    cfg = resolve_config(merge_sources([], ["system.prompt='a: b'"]))
    assert cfg.system.prompt == "a: b"


@pytest.mark.parametrize(
    "text, value",
    [("null", None), ("yes", True), ("1e-3", 0.001), ("[1, 2]", [1, 2]), ("a b", "a b"), ("", "")],
)
def test_other_overrides_are_yaml(text, value):
    cfg = merge_sources([], [f"trainer.x={text}"])
    assert cfg.trainer.x == value or (text == "" and cfg.trainer.x is None)


def test_override_for_one_stage():
    assert parse_override("2:system.a=1") == Override("system.a", "1", stage=2)
    assert parse_override("system.a=b:c=d") == Override("system.a", "b:c=d")


def test_malformed_overrides_are_refused():
    with pytest.raises(ConfigValueError, match="'seed' is no override; expected key=value"):
        parse_override("seed")
    with pytest.raises(ConfigValueError, match="cannot be read as YAML.*quote the value"):
        merge_sources([], ["system.a=[1, 2"])
    with pytest.raises(ConfigValueError, match="system.a.b=1 does not fit the config"):
        merge_sources(["system: {a: [1]}"], ["system.a.b=1"], from_string=True)


def test_typed_text_in_a_file_keeps_its_digits():
    text = "prompt: 007\nsystem:\n  list:\n  - {prompt_side: yes, n: 007}\nprompt_back: null\n"
    cfg = parse_yaml(text)
    assert cfg.prompt == "007"
    assert cfg.system.list[0].prompt_side == "yes"
    assert cfg.system.list[0].n == 7
    assert cfg.prompt_back is None


def test_interpolation_in_a_file_still_works_for_prompts():
    cfg = resolve_config(
        parse_yaml("system: {prompt: a cube, b: {prompt: '${system.prompt}'}}")
    )
    assert cfg.system.b.prompt == "a cube"


@pytest.mark.parametrize(
    "text, reason",
    [
        ("a: [1", "expected ',' or ']'"),
        ("a: 1\na: 2", "duplicate"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: ${unclosed", "not a valid config|missing BRACE"),
        ("- a\n- b", "holds a list; expected a mapping"),
        ("just text", "not a valid config"),
    ],
)
def test_bad_yaml_is_one_sentence_with_the_file(text, reason):
    with pytest.raises(ConfigValueError, match=f"(?s)bad.yaml.*({reason})"):
        resolve_config(parse_yaml(text, "bad.yaml"))


def test_alias_bomb_is_refused():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 8)]
    with pytest.raises(ConfigValueError, match="alias|expansion"):
        parse_yaml("\n".join(lines))


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ConfigFileError, match="'.*absent.yaml' cannot be read: No such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigFileError, match="Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFileError, match="not UTF-8 text"):
        load_yaml(tmp_path / "binary.yaml")
    (tmp_path / "huge.yaml").write_bytes(b"# " + b"x" * 5 * 2**20)
    with pytest.raises(ConfigValueError, match="is larger than"):
        load_yaml(tmp_path / "huge.yaml")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "models.yaml").write_text(
        "models:\n  sd: {id: owner/sd}\ntrainer: {max_steps: 5, precision: 32}\n"
    )
    return tmp_path


def test_includes_are_relative_to_the_root_and_the_file_wins(project):
    path = project / "run.yaml"
    path.write_text(
        "include: [configs/models.yaml]\ntrainer: {max_steps: 9}\nsystem: {m: '${models.sd.id}'}\n"
    )
    cfg = resolve_config(load_with_includes(path, project))
    assert cfg.trainer == {"max_steps": 9, "precision": 32}
    assert cfg.system.m == "owner/sd"
    assert "models" not in cfg and "include" not in cfg


def test_a_block_of_the_file_itself_is_not_dropped(project):
    path = project / "run.yaml"
    path.write_text("include: [configs/models.yaml]\nmodels: {sd: 1}\n")
    assert "models" in resolve_config(load_with_includes(path, project))


def test_missing_and_circular_includes_are_refused(project):
    path = project / "run.yaml"
    path.write_text("include: [configs/absent.yaml]")
    with pytest.raises(ConfigFileError, match="run.yaml includes 'configs/absent.yaml', but .* no"):
        load_with_includes(path, project)
    path.write_text("include: run.yaml")
    with pytest.raises(ConfigValueError, match="run.yaml'?, which includes it in turn"):
        load_with_includes(path, project)


@pytest.mark.parametrize(
    "value", ["${oc.env:R1_CANARY}", "${oc.env:R1_CANARY,x}", "${oc.${a}:R1_CANARY}"]
)
def test_environment_variables_are_refused(value, monkeypatch):
    monkeypatch.setenv("R1_CANARY", "secret-value")
    with pytest.raises(ConfigValueError, match="refused: values of the environment") as caught:
        resolve_config(merge_sources([], ["a=env", f"trainer.x={value}"]))
    assert "secret-value" not in str(caught.value)
    # Outside of our configs the resolver works as before.
    assert OmegaConf.create({"x": "${oc.env:R1_CANARY}"}).x == "secret-value"


def test_unresolvable_values_name_their_key():
    with pytest.raises(ConfigValueError, match="cannot resolve 'a.b'.*'c' not found"):
        resolve_config(parse_yaml("a: {b: '${c}'}"))
    with pytest.raises(ConfigValueError, match="cannot resolve"):
        resolve_config(parse_yaml("a: '${b}'\nb: '${a}'"))
    with pytest.raises(MissingValueError, match="'a.b' needs a value"):
        resolve_config(parse_yaml("a: {b: '${c}'}\nc: '???'"))


def test_profiles_are_not_resolved_and_not_missing():
    cfg = parse_yaml("a: 1\nprofiles: {x: {b: '${absent}', c: '???'}}\nd: {e: '???'}")
    assert missing_keys(cfg) == ["d.e"]
    assert "x" in resolve_config(cfg).profiles
