"""Which profile a run takes, case by case."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from threestudio import registry
from threestudio.launcher.profiles import Machine, choose_profile, deltas_of
from threestudio.utils.config_errors import ConfigValueError
from threestudio.utils.config_sources import load_with_includes

ALL = ["embedded", "low_vram", "paper", "test"]


def machine(free=None, on_disk=(), covers=False):
    return Machine(free, lambda name: name in on_disk, lambda name: covers)


@pytest.mark.parametrize(
    "recorded, free, on_disk, covers, expected, reason",
    [
        (None, None, (), False, "embedded", "no CUDA device"),
        ("paper", None, (), False, "paper", "recorded in the weights"),
        ("gone", None, (), False, "embedded", "no CUDA device"),
        ("as-written", 80, (), False, "as-written", "recorded"),
        (None, 80, ("paper", "low_vram"), True, "paper", "80 GiB .* on this disk"),
        (None, 80, ("low_vram",), True, "low_vram", "on this disk"),
        (None, 24, ("paper", "low_vram"), True, "low_vram", "24 GiB"),
        (None, 24, (), True, "embedded", "vocabulary covers the prompt"),
        (None, 80, (), False, "paper", "will be downloaded"),
        (None, 24, (), False, "low_vram", "will be downloaded"),
        (None, 12, ("low_vram",), True, "embedded", "vocabulary"),
    ],
)
def test_auto(recorded, free, on_disk, covers, expected, reason):
    choice = choose_profile("auto", recorded, ALL, True, machine(free, on_disk, covers))
    assert choice.name == expected
    assert __import__("re").search(reason, choice.reason)


def test_auto_stops_where_nothing_fits():
    with pytest.raises(ConfigValueError, match="12 GiB of GPU memory are free, the smallest, low_"):
        choose_profile("auto", None, ALL, True, machine(12.0))


def test_auto_without_profiles_runs_as_written():
    assert choose_profile("auto", None, None, False, machine()).name == "as-written"
    assert choose_profile("auto", None, ALL, False, machine()).name == "as-written"
    assert choose_profile("auto", None, [], True, machine()).name == "as-written"
    assert choose_profile("auto", None, ["paper"], True, machine()).name == "as-written"
    assert choose_profile("auto", None, ["test"], True, machine(80)).name == "as-written"


def test_named_profiles():
    assert choose_profile("paper", "embedded", ALL, True, machine()).name == "paper"
    assert choose_profile("paper", None, ALL, False, machine()).name == "paper"  # built-in
    assert choose_profile("as-written", None, ALL, True, machine()).name == "as-written"
    # The written-out config of a run names its profile and has it applied.
    assert choose_profile("paper", None, [], True, machine()).name == "paper"


def test_unknown_profile_lists_what_there_is():
    with pytest.raises(ConfigValueError, match="expected one of embedded, .* Did you mean 'paper'"):
        choose_profile("papper", None, ALL, True, machine())
    with pytest.raises(ConfigValueError, match="no profiles section and no built-in"):
        choose_profile("paper", None, None, False, machine())


TABLE = """
some-system:
  like:
    - {config: moving.yaml, where: {data.static: false}}
    - {config: resting.yaml}
  also:
    - profiles: {test: {trainer: {precision: 32}}}
    - where: {system.renderer_type: nerf-volume-renderer}
      profiles: {test: {seed: 7}, own: {seed: 8}}
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "profiles.yaml").write_text(TABLE)
    (tmp_path / "moving.yaml").write_text("profiles: {test: {seed: 1}, paper: {}}\n")
    (tmp_path / "resting.yaml").write_text("profiles: {test: {seed: 2}}\n")
    return tmp_path


def config(**keys):
    return OmegaConf.create({"system_type": "some-system", **keys})


def test_deltas_of_a_config_win_over_built_in_ones(root):
    assert deltas_of(config(profiles={"test": {"seed": 5}}), root) == {"test": {"seed": 5}}
    assert deltas_of(config(profiles={}), root) == {}
    assert deltas_of(OmegaConf.create({"system_type": "other"}), root) is None
    assert deltas_of(config(), root / "elsewhere") is None


def test_built_in_deltas_are_those_of_the_first_config_of_ours_that_fits(root):
    precision = {"trainer": {"precision": 32}}
    assert deltas_of(config(), root) == {"test": {"seed": 2, **precision}}
    moving = config(data={"static": False})
    assert deltas_of(moving, root) == {"test": {"seed": 1, **precision}, "paper": {}}
    assert deltas_of(config(data={"static": "${nowhere}"}), root) == deltas_of(config(), root)


def test_everything_else_that_fits_is_laid_over_them(root, monkeypatch):
    monkeypatch.setitem(registry._aliases, "their-renderer", "nerf-volume-renderer")
    for name in ("nerf-volume-renderer", "their-renderer"):
        found = deltas_of(config(system={"renderer_type": name}), root)
        assert found["test"].seed == 7 and found["own"].seed == 8


def test_overrides_say_what_a_config_is_like(root):
    assert deltas_of(config(), root, config(data={"static": False}))["test"].seed == 1


def test_a_table_of_another_form_is_refused(root):
    (root / "configs" / "profiles.yaml").write_text("some-system: moving.yaml\n")
    with pytest.raises(ConfigValueError, match="'moving.yaml'; expected a mapping with the keys"):
        deltas_of(config(), root)


def test_the_shipped_table_names_configs_that_exist():
    root = Path(__file__).parents[3]
    for table in OmegaConf.load(root / "configs" / "profiles.yaml").values():
        for rule in table.like:
            assert load_with_includes(root / rule.config, root).profiles
