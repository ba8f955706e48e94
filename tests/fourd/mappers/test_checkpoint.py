"""Mappers on disk: what comes back, what is in the files, and what is refused."""

import json

import pytest
import torch
from safetensors import safe_open

from custom.fourd.mappers.checkpoint import MapperFacts, check_fits, load_mapper, save_mapper
from custom.fourd.mappers.mapper import Mapper, MapperConfig
from custom.fourd.mappers.text_injection import InjectionConfig

TABLE = ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0")
MODEL = "embedded://multiview"


@pytest.fixture
def mapper():
    config = MapperConfig(kind="joint", width=12, n_layers=3, hidden=(8, 8), scene_features=5)
    made = Mapper(config, 0.4, seed=2)
    made.set_ranges(torch.rand(6, len(made.axes), generator=torch.Generator().manual_seed(0)))
    return made


@pytest.fixture
def facts():
    return MapperFacts(
        MODEL, "abc", TABLE, InjectionConfig("unconstrained", bypass_strength=5.0),
        "<view> <time>. a photo of a {caption}", 120, "ip-adapter-plus.safetensors", 0.5,
    )  # fmt: skip


def edit(path, **changes):
    written = json.loads(path.read_text())
    for key, value in changes.items():
        written.pop(key) if value is None else written.update({key: value})
    path.write_text(json.dumps(written))


def test_everything_comes_back(tmp_path, mapper, facts):
    paths = save_mapper(tmp_path / "new" / "mapper-step-120", mapper, facts)
    assert [path.name for path in paths] == [
        "mapper-step-120.safetensors",
        "mapper-step-120.json",
    ]
    for path in paths:
        again, read = load_mapper(path)
        assert again.config == mapper.config and not again.training
        assert not any(parameter.requires_grad for parameter in again.parameters())
        assert read.injection == facts.injection and read.layer_table == TABLE
        assert (read.step, read.ip_adapter_scale, read.width) == (120, 0.5, 12)
        controls, noise = torch.rand(2, len(mapper.axes)), torch.rand(2)
        features = torch.rand(2, 5)
        ours = mapper(noise, controls, scene_features=features)
        theirs = again(noise, controls, scene_features=features)
        assert torch.equal(ours.base, theirs.base) and torch.equal(ours.bypass, theirs.bypass)


def test_the_files_say_what_they_hold(tmp_path, mapper, facts):
    """Read by others: the safetensors library and plain JSON."""
    weights, told = save_mapper(tmp_path / "mapper", mapper, facts)
    with safe_open(weights, framework="pt") as file:
        keys = set(file.keys())
        low = file.get_tensor("axis_low")
    assert {"encoder.frequencies", "scene_code.weight", "head.weight", "base_norm"} <= keys
    written = json.loads(told.read_text())
    assert written["format_version"] == 1 and written["base_model"] == MODEL
    assert written["base_revision"] == "abc" and written["base_norm"] == pytest.approx(0.4)
    assert written["ranges"]["delta_elevation"][0] == pytest.approx(float(low[4]))
    assert written["injection"]["bypass_strength"] == 5.0
    assert written["prompt_template"].startswith("<view> <time>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "mapper.json",
        "mapper.safetensors",
    ], "no temporary file stays"


def test_nothing_is_written_over(tmp_path, mapper, facts):
    (tmp_path / "mapper.json").write_text("mine")
    with pytest.raises(FileExistsError, match="mapper.json exists; expected a new name"):
        save_mapper(tmp_path / "mapper", mapper, facts)
    assert (tmp_path / "mapper.json").read_text() == "mine"
    assert not (tmp_path / "mapper.safetensors").exists()


def test_two_files_that_do_not_belong_together_are_refused(tmp_path, mapper, facts):
    first, _ = save_mapper(tmp_path / "first", mapper, facts)
    with torch.no_grad():
        mapper.head.bias.add_(1)
    second, told = save_mapper(tmp_path / "second", mapper, facts)
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match="second.safetensors is not the file that second.json"):
        load_mapper(second)
    second.unlink()
    with pytest.raises(FileNotFoundError, match="second.safetensors does not exist; expected"):
        load_mapper(told)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format_version": 2}, "format version 2; expected 1. Update"),
        ({"format_version": None}, "format version None; expected 1"),
        ({"layer_table": None}, "lacks layer_table; expected what `save_mapper` wrote"),
    ],
)
def test_other_formats_are_refused(tmp_path, mapper, facts, changes, message):
    _, told = save_mapper(tmp_path / "mapper", mapper, facts)
    edit(told, **changes)
    with pytest.raises(ValueError, match=message):
        load_mapper(told)
    told.write_text("{")
    with pytest.raises(ValueError, match="mapper.json is not JSON"):
        load_mapper(told)
    told.write_text("[]")
    with pytest.raises(ValueError, match="format version None"):
        load_mapper(told)


def test_weights_of_another_shape_are_refused(tmp_path, mapper, facts):
    _, told = save_mapper(tmp_path / "mapper", mapper, facts)
    changed = json.loads(told.read_text())["mapper"] | {"hidden": [8, 9]}
    edit(told, mapper=changed)
    with pytest.raises(ValueError, match=r"holds head.weight as \(24, 8\); expected \(24, 9\)"):
        load_mapper(told)


def test_another_model_is_refused(facts):
    from dataclasses import replace

    facts = replace(facts, width=12)
    check_fits(facts, MODEL, 12, TABLE)
    with pytest.raises(ValueError, match="trained for the text width 12, and the model has 768"):
        check_fits(facts, MODEL, 768, TABLE)
    with pytest.raises(ValueError, match="base model embedded://multiview, and the model has sd"):
        check_fits(facts, "sd", 12, TABLE)
    with pytest.raises(ValueError, match="speaks to 3 layers and the model has 2"):
        check_fits(facts, MODEL, 12, TABLE[:2])
    with pytest.raises(ValueError, match="expected the same layers in the same order"):
        check_fits(facts, MODEL, 12, TABLE[::-1])
