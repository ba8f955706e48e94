"""Replacing a module by a profile or on the command line."""

from dataclasses import dataclass

import pytest
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher.parts import (
    config_class,
    drop_replaced_keys,
    drop_unfit_keys,
    part_name,
)


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


class System:
    @dataclass
    class Config:
        b_type: str = "solid"
        b: dict | None = None


def borrowed(delta, **system):
    """What is left of a delta that was written for a neural background."""
    lender = {"system_type": "a-system", "system": {"b_type": "neural", "b": {"activation": "x"}}}
    borrower = {"system_type": "a-system", "system": system}
    delta = OmegaConf.create({"seed": 1, "system": delta})
    drop_unfit_keys(delta, OmegaConf.create(lender), OmegaConf.create(borrower))
    return delta


@pytest.mark.parametrize(
    "system, kept",
    [
        ({"b_type": "solid"}, {"random_aug"}),  # another module, with one of the keys
        ({}, {"random_aug"}),  # the system's default is another module
        ({"b_type": "neural"}, {"activation", "random_aug"}),
        ({"b_type": "their-neural"}, {"activation", "random_aug"}),  # an alias of the same
        ({"b_type": "bare"}, {"activation", "random_aug"}),  # no schema to ask
        ({"b_type": "unknown"}, {"activation", "random_aug"}),  # reported elsewhere
    ],
)
def test_a_borrowed_delta_keeps_what_the_borrowers_modules_know(monkeypatch, system, kept):
    monkeypatch.setitem(registry.__modules__, "a-system", System)
    monkeypatch.setitem(registry._aliases, "their-neural", "neural")
    delta = borrowed({"b": {"activation": "y", "random_aug": True}, "loss": {"z": 1}}, **system)
    assert set(delta.system.b) == kept
    assert delta.seed == 1 and delta.system.loss == {"z": 1}


def test_a_borrowed_delta_may_name_its_module(monkeypatch):
    monkeypatch.setitem(registry.__modules__, "a-system", System)
    delta = borrowed({"b_type": "neural", "b": {"activation": "y"}}, b_type="solid")
    assert delta.system.b == {"activation": "y"}
    drop_unfit_keys(OmegaConf.create({"seed": 1}), OmegaConf.create(), OmegaConf.create())
