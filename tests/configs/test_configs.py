"""Every config of the project is valid under every profile, and every stage runs two steps."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from threestudio.launcher.validate import required_models
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.launched import (
    ROOT,
    launch,
    need_embedded_model,
    planned,
    tiny_video_prior,
    trained,
    written,
)

CONFIGS = sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "custom" / "configs").glob("*.yaml")
)
PROFILES = ("embedded", "low_vram", "paper", "test")
STAGES = {number: f"custom/configs/fourdfy_stage_{number}.yaml" for number in (1, 2, 3)}
# At these draws of seed 0, the first step shows view groups, the second what the stage adds.
GUIDANCE_TERMS = {2: "loss_vsd", 3: "loss_sds_video"}


def test_there_are_configs():
    assert set(STAGES.values()) < set(CONFIGS)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_has_every_profile(config):
    assert set(written(config).profiles) == set(PROFILES)


def combinations():
    """Every config with every profile; of the variants only the one that everybody can run."""
    for config in CONFIGS:
        for profile in PROFILES:
            is_quick = config in STAGES.values() or profile == "embedded"
            yield pytest.param(config, profile, marks=() if is_quick else pytest.mark.slow)


@pytest.mark.parametrize(("config", "profile"), list(combinations()))
def test_every_config_is_valid_for_every_profile(config, profile):
    """Parsed and checked key by key against the modules that it names; nothing is built."""
    cfg = planned(config, profile)
    assert cfg["profile"] == profile and cfg["trainer"]["max_steps"] > 0
    assert cfg["name"] == Path(config).stem, "runs of different configs would share a folder"


@pytest.mark.parametrize("config", CONFIGS)
def test_no_config_needs_a_download_where_there_is_no_gpu(config):
    cfg = planned(config, "embedded")
    models = required_models(OmegaConf.create(cfg))
    is_fitted_to_videos = cfg["system_type"] == "fourd-reconstruction-system"
    assert bool(models) != is_fitted_to_videos
    assert all(str(name).startswith("embedded://") for name in models)


def check(run, steps=2):
    """The stage ended as it should."""
    assert run.status == 0, run.errors
    checkpoint = load_checkpoint(run.checkpoint)
    assert checkpoint["global_step"] == steps and checkpoint["profile"] == "test"
    assert (run.folder / "save" / "metrics.json").is_file()
    return checkpoint


def logged(folder: Path) -> str:
    """The names of what the run of a trial folder logged."""
    (path,) = folder.glob("csv_logs/**/metrics.csv")
    return path.read_text().splitlines()[0]


def test_a_stage_alone_goes_on_from_weights(tmp_path):
    """``system.weights``: the scene of stage 1 is the start, and both kinds of steps are drawn."""
    need_embedded_model()
    weights = f"system.weights={trained().checkpoint}"
    run = launch("--train", tmp_path, *tiny_video_prior(), weights, config=STAGES[3])
    check(run)
    assert "train/loss_sds" in logged(run.folder) and GUIDANCE_TERMS[3] in logged(run.folder)


def test_all_three_stages_in_a_chain(tmp_path):
    need_embedded_model()
    last_run = launch("--train", tmp_path, *tiny_video_prior(), config=tuple(STAGES.values()))
    last = check(last_run)
    first, second = (tmp_path / Path(STAGES[number]).stem / "run/ckpts" for number in (1, 2))
    tuned = load_checkpoint(second / "last.ckpt")
    assert tuned["global_step"] == 2 and tuned["profile"] == "test"
    for number, folder in ((2, second.parent), (3, last_run.folder)):
        assert "train/loss_sds" in logged(folder) and GUIDANCE_TERMS[number] in logged(folder)
    assert Path(last["config"]["system"]["weights"]).parent == second
    assert Path(tuned["config"]["system"]["weights"]).parent == first
    lora = {key for key in tuned["state_dict"] if key.startswith("guidance_single_view.")}
    assert lora and lora <= set(last["state_dict"]), "the second score is handed on"
    assert {c["config"]["system"]["prompt_processor"]["prompt"] for c in (last, tuned)} == {
        "a red cube next to a blue sphere bouncing"
    }


def test_the_tips_for_small_gpus_work_as_they_are_written(tmp_path):
    """Stage 1 to 3 without stage 2, with every override and flag that 4D-fy's readers know."""
    need_embedded_model()
    run = launch(
        "--train", tmp_path, *tiny_video_prior(), "--gpu", "0", "seed=7",
        "2:data.prob_multi_view=0.75", "2:data.single_view.prob_single_view_video=1.0",
        "system.renderer.num_samples_per_ray=128",
        "data.single_view.width_vid=144", "data.single_view.height_vid=80",
        "system.loss.lambda_sds_video=0.3", "2:data.single_view.num_frames=2",
        "2:data.single_view.num_frames_factor=2",
        config=(STAGES[1], STAGES[3]),
    )  # fmt: skip
    cfg = check(run)["config"]
    assert cfg["seed"] == 7 and cfg["exp_root_dir"] == str(tmp_path)
    assert cfg["system"]["renderer"]["num_samples_per_ray"] == 128
    assert cfg["system"]["loss"]["lambda_sds_video"] == 0.3
    single_view = cfg["data"]["single_view"]
    assert (single_view["width_vid"], single_view["height_vid"]) == (144, 80)
    assert "loss_sds_video" in logged(run.folder) and "loss_vsd" not in logged(run.folder)


def test_gradio_is_answered_with_a_sentence(tmp_path):
    refused = launch("--train", tmp_path, "--gradio", config=(STAGES[1], STAGES[3]))
    assert refused.status == 2 and "--gradio is not provided" in refused.errors
    assert not refused.folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["deformation", "vc", "vc_deformation", "animatediff", "wan"])
def test_a_variant_moves_the_scene(variant, tmp_path):
    need_embedded_model()
    grids = "_deformation" if "deformation" in variant else ""
    chain = (f"custom/configs/fourdfy_stage_1{grids}.yaml",
             f"custom/configs/fourdfy_stage_3_{variant}.yaml")  # fmt: skip
    run = launch("--train", tmp_path, *tiny_video_prior(), config=chain)
    check(run)
    assert "loss_sds_video" in logged(run.folder)
