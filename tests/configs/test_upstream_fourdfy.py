"""4D-fy's own configs run as users bring them, with nothing but ``profile=test`` and a prompt.

The files of `tests/fixtures/upstream_fourdfy` hold the keys and values of the original's twelve
configs; those in its folder ``extension`` of the six that its port to an extension ships.
"""

import csv
import math
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from threestudio.launcher.arguments import parse_arguments
from threestudio.launcher.main import main
from threestudio.launcher.stages import plan_stages
from threestudio.launcher.validate import iterate_parts, required_models
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.launched import ROOT, need_embedded_model
from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.video_models import write_videocrafter_folder

FOLDER = ROOT / "tests" / "fixtures" / "upstream_fourdfy"
SHAPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))
PROMPT = "system.prompt_processor.prompt=a red cube"
# Between them: a stage by itself and one behind another, the plain and the masked renderer, both
# encodings, both video priors, the tuned score, every name of the extension, 32 and 16 bits.
QUICK_ALONE = ("extension/fourdfy_stage_3",)
DEFORMED = ("fourdfy_stage_1_low_vram_deformation", "fourdfy_stage_3_low_vram_vc_deformation")


def config(shape: str) -> Path:
    return FOLDER / f"{shape}.yaml"


def run(shape: str, folder: Path, *overrides: str) -> Path:
    """Train a shape in this process, from the project's root, and return its trial folder."""
    need_embedded_model()
    argv = ["--config", str(config(shape)), "--train", "profile=test", PROMPT]
    selection = {key: os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")}
    try:
        with torch.random.fork_rng(devices=[]):
            status = main([*argv, f"exp_root_dir={folder}", *overrides], root=ROOT)
    finally:
        for key, value in selection.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    assert status == 0
    (trial,) = folder.glob("*/a_red_cube@*")
    return trial


def check(trial: Path) -> dict:
    """Two steps were made, with finite losses, and the scene was saved; returns the checkpoint."""
    checkpoint = load_checkpoint(trial / "ckpts" / "last.ckpt")
    assert checkpoint["global_step"] == 2 and checkpoint["profile"] == "test"
    for key, value in checkpoint["state_dict"].items():
        assert not value.is_floating_point() or value.isfinite().all(), key
    (log,) = trial.glob("csv_logs/**/metrics.csv")
    losses = [row["train/loss"] for row in csv.DictReader(log.open()) if row.get("train/loss")]
    assert len(losses) == 2 and all(math.isfinite(float(loss)) for loss in losses)
    assert list((trial / "save").glob("it2-test*.mp4"))
    return checkpoint


def test_the_twelve_and_the_extensions_six_are_here():
    assert len([shape for shape in SHAPES if "/" not in shape]) == 12
    assert len([shape for shape in SHAPES if shape.startswith("extension/")]) == 6
    for shape in SHAPES:
        lines = config(shape).read_text().splitlines()
        assert not {"include:", "profiles:"} & set(lines), "not upstream's"


@pytest.mark.parametrize("shape", QUICK_ALONE)
def test_a_shape_runs_unchanged(shape, tmp_path):
    check(run(shape, tmp_path))


def test_a_stage_runs_behind_the_one_before_it(tmp_path):
    """The motion that the video prior gave is the third stage's; the scene is the first's."""
    first, third = DEFORMED
    before = run(first, tmp_path / "first")
    check(before)
    weights = before / "ckpts" / "last.ckpt"
    start = load_checkpoint(weights)["state_dict"]
    after = check(run(third, tmp_path / "third", f"system.weights={weights}"))["state_dict"]
    shared = {key for key in start if key.startswith(("geometry.", "background."))}
    assert shared <= set(after)
    moved = {key for key in shared if not torch.equal(start[key], after[key])}
    assert moved and all("encoding_time" in key or "time_network" in key for key in moved)


def test_videocrafter_itself_takes_two_steps(tmp_path):
    """Back in the place of the embedded prior, from a tiny folder of random weights."""
    folder = write_videocrafter_folder(write_stable_diffusion_folder(tmp_path / "prior"))
    overrides = [
        "data.prob_multi_view=0.0",  # clips only
        "system.guidance_type_video=videocrafter-guidance",
        "system.prompt_processor_type_video=videocrafter-prompt-processor",
        f"system.prompt_processor_video.pretrained_model_name_or_path={folder}",
        f"system.guidance_video.pretrained_model_name_or_path={folder}",
        "system.guidance_video.width=16",
        "system.guidance_video.height=8",
    ]
    trial = run("fourdfy_stage_3_low_vram_vc", tmp_path / "runs", *overrides)
    system = check(trial)["config"]["system"]
    assert system["guidance_type_video"] == "videocrafter-guidance"
    assert system["guidance_video"]["pretrained_model_name_or_path"] == str(folder)
    (log,) = trial.glob("csv_logs/**/metrics.csv")
    rows = [row for row in csv.DictReader(log.open()) if row.get("train/loss_sds_video")]
    assert len(rows) == 2 and all(float(row["train/loss_sds_video"]) > 0 for row in rows)
    assert not any(row.get("train/loss_sds") for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in (*QUICK_ALONE, *DEFORMED)])
def test_every_other_shape_runs_unchanged(shape, tmp_path):
    check(run(shape, tmp_path))


@pytest.mark.parametrize("shape", ["extension/fourdfy_stage_3_low_vram"])
def test_the_test_profile_leaves_the_choices_of_a_config(shape):
    """It swaps models and shrinks sizes; which modules, terms and groups there are stays."""
    written = OmegaConf.load(config(shape))
    planned = plan(shape, "test")
    assert all(str(m).startswith("embedded://") for m in required_models(planned))
    same = ("geometry_type", "background_type", "renderer_type", "guidance_type",
            "freeze_static_modules", "stage")  # fmt: skip
    for key in same:
        assert planned.system.get(key) == written.system.get(key), key
    assert planned.system.loss == written.system.loss
    assert set(planned.system.optimizer.params) >= set(written.system.optimizer.params)
    assert planned.data.prob_multi_view == written.data.prob_multi_view
    assert planned.trainer.max_steps == 2


@pytest.mark.parametrize("shape", ["fourdfy_stage_3_low_vram_vc"])
@pytest.mark.parametrize("profile", ["as-written", "embedded"])
def test_a_shape_is_valid_as_it_is_and_without_a_gpu(shape, profile):
    planned = plan(shape, profile)
    assert planned.profile == profile
    names = {part.key for part in iterate_parts(planned)}
    assert {"system.geometry", "system.renderer", "system.guidance_video"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("profile", ["as-written", "embedded", "low_vram", "paper", "test"])
def test_every_shape_is_valid_for_every_profile(shape, profile):
    assert plan(shape, profile).profile == profile


def plan(shape: str, profile: str) -> OmegaConf:
    """The checked experiment of a shape; nothing is built, and no model is looked for."""
    argv = ["--config", str(config(shape)), "--train", f"profile={profile}", PROMPT]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("threestudio.launcher.stages._require_models", lambda cfg: None)
        (stage,) = plan_stages(parse_arguments(argv), ROOT)
    return stage.cfg


def test_a_missing_prompt_is_asked_for_once(capsys):
    """The prompts of the other priors are taken from the first, so only that one is missing."""
    argv = ["--config", str(config("fourdfy_stage_3")), "--train", "profile=test"]
    assert main(argv, root=ROOT) == 2
    message = capsys.readouterr().err
    assert "no value for system.prompt_processor.prompt; give it" in message
