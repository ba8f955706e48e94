"""Replacing a module by a profile or on the command line."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher.parts import config_class, drop_replaced_keys, part_name


@dataclass
class SolidConfig:
    color: str = "white"
    random_aug: bool = False


class Solid:
    Config = SolidConfig


class Annotated:
    cfg: SolidConfig


class Unreadable:
    cfg: "ANameThatDoesNotExist"  # noqa: F821


class Bare:
    pass


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    monkeypatch.setattr(registry, "__modules__", {"solid": Solid, "bare": Bare})


def test_part_names():
    assert part_name("geometry_type") == "geometry"
    assert part_name("guidance_type_multi_view") == "guidance_multi_view"
    assert part_name("camera_condition_types") is None
    assert part_name("geometry") is None


def test_config_class_is_found_by_attribute_or_annotation():
    assert config_class(Solid) is SolidConfig
    assert config_class(Annotated) is SolidConfig
    assert config_class(Unreadable) is None
    assert config_class(Bare) is None


def laid_over(given):
    file_cfg = OmegaConf.create(
        {"system": {"b_type": "neural", "b": {"activation": "x", "random_aug": True}}}
    )
    given = OmegaConf.create(given)
    merged = OmegaConf.merge(file_cfg, given)
    lines = drop_replaced_keys(merged, file_cfg, given)
    return merged.system.b, lines


def test_keys_that_the_new_module_lacks_are_dropped_with_a_line():
    part, lines = laid_over({"system": {"b_type": "solid", "b": {"color": "red"}}})
    assert part == {"random_aug": True, "color": "red"}
    assert lines == ["system.b is now solid; dropped activation."]


def test_keys_that_were_given_with_the_new_module_are_kept_for_the_check():
    part, lines = laid_over({"system": {"b_type": "solid", "b": {"activation": "y"}}})
    assert part == {"activation": "y", "random_aug": True} and lines == []


@pytest.mark.parametrize("name", ["neural", "bare", "a-missing-module"])
def test_nothing_is_dropped_otherwise(name):
    part, lines = laid_over({"system": {"b_type": name}})
    assert part == {"activation": "x", "random_aug": True} and lines == []
