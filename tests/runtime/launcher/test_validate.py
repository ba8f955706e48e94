"""Checks of a whole experiment: keys, types and names at every depth."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import pytest
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher.validate import (
    CHECKPOINT_KEYS,
    TRAINER_KEYS,
    accepts_key,
    check_experiment,
    find_issues,
    iterate_parts,
    known_keys,
    required_models,
    used_parts,
)
from threestudio.utils.config_errors import UnknownKeyError, WrongTypeError


@dataclass
class GeometryConfig:
    radius: float = 1.0
    bias: Any = "blob"
    encoding: dict = field(default_factory=dict)


@dataclass
class ViewConfig:
    height: int = 64


@dataclass
class DataConfig:
    batch_size: Any = 1
    single_view: ViewConfig = field(default_factory=ViewConfig)


@dataclass
class SystemConfig:
    geometry_type: str = ""
    geometry: dict = field(default_factory=dict)
    guidance_type_video: str = ""
    guidance_video: dict = field(default_factory=dict)
    exporter_type: str = "a-missing-exporter"
    exporter: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    use: bool = False
    name: str | None = None
    weights: str | None = None


class Geometry:
    Config = GeometryConfig


class Guidance:
    Config = GeometryConfig

    @classmethod
    def required_models(cls, cfg):
        return [cfg.get("bias", "owner/default")]


class DataModule:
    """Configured as upstream's data modules are: by the annotation of ``cfg`` alone."""

    cfg: DataConfig


class System:
    Config = SystemConfig


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(registry, "__modules__", dict(registry.__modules__))
    for cls in (DataConfig, SystemConfig, GeometryConfig, ViewConfig):
        monkeypatch.setattr(cls, "__module__", __name__)
    # These stand for modules of ours, whose lists and dicts are checked as well.
    monkeypatch.setattr(registry, "FIRST_PARTY_PACKAGES", ("threestudio", __name__))
    for name, cls in {
        "r1-geometry": Geometry,
        "r1-guidance": Guidance,
        "r1-datamodule": DataModule,
        "r1-system": System,
    }.items():
        registry.register(name)(cls)


def experiment(**changes):
    cfg = OmegaConf.create(
        {
            "data_type": "r1-datamodule",
            "data": {"batch_size": 2, "single_view": {"height": 8}},
            "system_type": "r1-system",
            "system": {
                "geometry_type": "r1-geometry",
                "geometry": {"radius": 1, "encoding": {"otype": "X", "anything": 1}},
                "guidance_type_video": "r1-guidance",
                "guidance_video": {"radius": [0, 1.0, 2.0, 5]},
                "loss": {"lambda_anything": 1.0},
            },
            "trainer": {"max_steps": 5},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def test_a_valid_experiment_has_no_issue():
    assert list(find_issues(experiment())) == []


@pytest.mark.parametrize(
    "key, message",
    [
        ("sede", "unknown key 'sede': ExperimentConfig has no field 'sede'. Did you mean 'seed'?"),
        ("data__batch_sise", "unknown key 'data.batch_sise': DataConfig .* mean 'batch_size'"),
        ("data__single_view__heigt", "'data.single_view.heigt': ViewConfig .* mean 'height'"),
        ("system__geomety_type", "'system.geomety_type': .* mean 'geometry_type'"),
        ("system__geometry__radis", "'system.geometry.radis': GeometryConfig .* mean 'radius'"),
        ("system__guidance_video__radis", "'system.guidance_video.radis': .* mean 'radius'"),
        ("trainer__max_step", "'trainer.max_step': pytorch_lightning.Trainer .* mean 'max_steps'"),
        ("checkpoint__save_lst", "'checkpoint.save_lst': ModelCheckpoint .* mean 'save_last'"),
    ],
)
def test_unknown_keys_at_any_depth_name_the_nearest(key, message):
    with pytest.raises(UnknownKeyError, match=message):
        check_experiment(experiment(**{key: 1}))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("seed", "x", "wrong type for 'seed': 'x' is text, expected int"),
        ("system__use", "perhaps", "'system.use': 'perhaps' is text, expected bool"),
        ("system__geometry__radius", "wide", "'system.geometry.radius': 'wide' is text, .* float"),
        ("data__single_view__height", 1.5, "'data.single_view.height': 1.5 is a number, .* int"),
        ("system__geometry", "round", "'system.geometry': 'round' is text"),
        ("system__use", [1], r"'system.use': a list \[1\], expected bool"),
        ("tag", {"a": "b"}, r"'tag': a mapping \{'a': 'b'\}, expected str. Quote text"),
        ("system__geometry__radius", {"a": 1}, "'system.geometry.radius': a mapping"),
        ("trainer", 5, "'trainer': 5 is an integer, expected a mapping"),
        ("trainer__max_steps", "abc", "'abc' is text, expected a whole number"),
        ("trainer__max_steps", 1.5, "'trainer.max_steps': 1.5 is a number, .* a whole number"),
        ("trainer__val_check_interval", "x", "'x' is text, expected a number"),
        ("checkpoint__every_n_train_steps", True, "True is .*, expected a whole number"),
    ],
)
def test_wrong_types_are_named_with_their_value(key, value, message):
    with pytest.raises(WrongTypeError, match=message):
        check_experiment(experiment(**{key: value}))


def test_unknown_modules_are_reported_at_their_key():
    with pytest.raises(UnknownKeyError, match="system.geometry_type: no module .*'r1-geometry'"):
        check_experiment(experiment(system__geometry_type="r1-geometri"))
    with pytest.raises(UnknownKeyError, match="system.guidance_type_video: no module"):
        check_experiment(experiment(system__guidance_type_video="r1-guidanse"))
    with pytest.raises(UnknownKeyError, match="data_type: no module"):
        check_experiment(experiment(data_type="r1-datamodul"))


def test_a_default_module_is_looked_up_only_where_its_config_is_written():
    assert list(find_issues(experiment())) == []
    with pytest.raises(UnknownKeyError, match="exporter_type: no module .*'a-missing-exporter'"):
        check_experiment(experiment(system__exporter={"fmt": "obj"}))


def test_all_issues_are_reported_at_once_with_their_places():
    cfg = experiment(system__geometry__radis=1, sede=1)
    origins = {"system.geometry": "a.yaml:7", "sede": "command line"}
    with pytest.raises(UnknownKeyError) as caught:
        check_experiment(cfg, origins)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("command line: unknown key 'sede'")
    assert lines[1].startswith("a.yaml:7: unknown key 'system.geometry.radis'")


def test_foreign_modules_keep_what_upstream_allows(monkeypatch):
    monkeypatch.setattr(registry, "FIRST_PARTY_PACKAGES", ("threestudio",))
    assert list(find_issues(experiment(data__single_view__heigt=1))) == []
    assert list(find_issues(experiment(system__name=["a", "list"]))) == []


def test_parts_and_the_models_that_they_need():
    cfg = experiment()
    assert {part.key: part.cls for part in iterate_parts(cfg)} == {
        "data": DataModule,
        "system": System,
        "system.geometry": Geometry,
        "system.guidance_video": Guidance,
    }
    assert required_models(cfg) == ["owner/default"]
    assert required_models(experiment(system__guidance_video__bias="a/b")) == ["a/b"]


def test_parts_that_no_step_uses_need_no_model(monkeypatch):
    idle = classmethod(lambda cls, cfg: {"guidance_video"} if cfg.use else set())
    monkeypatch.setattr(System, "unused_parts", idle, raising=False)
    used = {part.key for part in used_parts(experiment(system__use=True))}
    assert used == {"data", "system", "system.geometry"}
    assert required_models(experiment(system__use=True)) == []
    assert required_models(experiment(system__use=False)) == ["owner/default"]


@pytest.mark.parametrize(
    "key, accepted",
    [
        ("seed", True),
        ("trainer.max_steps", True),
        ("trainer.precision", True),
        ("trainer.max_stepz", False),
        ("system.weights", True),
        ("system.geometry.bias", True),
        ("system.geometry.bais", False),
        ("system.geometry.encoding.new_key", True),
        ("system.loss.lambda_new", True),
        ("data.single_view.height", True),
        ("data.nothing", False),
    ],
)
def test_which_keys_an_experiment_has(key, accepted):
    assert accepts_key(experiment(), key) is accepted


def test_known_keys_hold_schema_and_file():
    known = known_keys(experiment())
    for key in ("seed", "trainer.max_steps", "system.geometry.bias", "system.loss.lambda_anything"):
        assert key in known


def test_copied_argument_names_are_those_of_lightning():
    import pytorch_lightning as pl
    from pytorch_lightning.callbacks import ModelCheckpoint

    trainer = set(inspect.signature(pl.Trainer.__init__).parameters) - {"self"}
    checkpoint = set(inspect.signature(ModelCheckpoint.__init__).parameters) - {"self"}
    assert trainer == TRAINER_KEYS
    assert checkpoint == CHECKPOINT_KEYS
