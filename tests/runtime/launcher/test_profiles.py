"""Which profile a run takes, case by case."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from threestudio.launcher.profiles import Machine, choose_profile, deltas_of
from threestudio.utils.config_errors import ConfigValueError

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


def test_deltas_of_a_config_win_over_built_in_ones(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "profiles.yaml").write_text("some-system: model.yaml\n")
    (tmp_path / "model.yaml").write_text("profiles: {test: {seed: 1}, paper: {}}\n")
    own = OmegaConf.create({"system_type": "some-system", "profiles": {"test": {"seed": 2}}})
    assert deltas_of(own, tmp_path) == {"test": {"seed": 2}}
    without = OmegaConf.create({"system_type": "some-system"})
    assert deltas_of(without, tmp_path) == {"test": {"seed": 1}, "paper": {}}
    applied = OmegaConf.create({"system_type": "some-system", "profiles": {}})
    assert deltas_of(applied, tmp_path) == {}
    assert deltas_of(OmegaConf.create({"system_type": "other"}), tmp_path) is None
    assert deltas_of(without, tmp_path / "elsewhere") is None


def test_the_shipped_table_names_configs_that_exist():
    root = Path(__file__).parents[3]
    for path in OmegaConf.load(root / "configs" / "profiles.yaml").values():
        assert "profiles" in OmegaConf.load(root / path)
