"""Every config of the project: it parses for every profile, and two steps of it run."""

from pathlib import Path

import pytest
from threestudio.launcher.arguments import parse_arguments
from threestudio.launcher.stages import plan_stages
from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint
from threestudio.utils.config_sources import load_with_includes

from tests.fixtures.launched import ROOT, need_embedded_model, trained

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "custom" / "configs").glob("*.yaml"))
PROFILES = ("embedded", "low_vram", "paper", "test")


def test_there_are_configs():
    assert Path("custom/configs/fourdfy_stage_1.yaml") in CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_has_every_profile(config):
    assert set(load_with_includes(ROOT / config, ROOT).profiles) == set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_is_valid_for_every_profile(config, profile, tmp_path):
    """Parsed and checked key by key against the modules that it names; nothing is built."""
    weights = tmp_path / "weights.ckpt"
    save_checkpoint(weights, {"state_dict": {}, "global_step": 0})
    argv = ["--config", str(ROOT / config), "--export", f"profile={profile}",
            f"exp_root_dir={tmp_path}", f"system.weights={weights}"]  # fmt: skip
    (stage,) = plan_stages(parse_arguments(argv), ROOT)
    assert stage.cfg.profile == profile == stage.choice.name
    assert stage.cfg.trainer.max_steps > 0
    if profile in ("embedded", "test"):
        names = str(stage.cfg.system)
        assert "embedded://" in names and "stabilityai" not in names, "it must need no download"


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_takes_two_steps(config):
    need_embedded_model()
    run = trained(str(config))
    assert run.status == 0, run.errors
    checkpoint = load_checkpoint(run.checkpoint)
    assert checkpoint["global_step"] == 2 and checkpoint["profile"] == "test"
    assert (run.folder / "save" / "metrics.json").is_file()
