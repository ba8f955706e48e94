"""`launch.py` on a project with an extension: sections 1.2, 1.9, 2 and 3 from the outside.

The project is a folder of its own: a copy of `launch.py`, an experiment and ``custom/``. It is run
as a user runs it, with the command line in ``sys.argv``.
"""

import contextlib
import csv
import os
import re
import runpy
import shutil
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import threestudio
import torch
import trimesh
import yaml
from PIL import Image

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "fixtures" / "contract_project"
EXTENSION = "threestudio-contract-scene"
PROMPT = "system.prompt_processor.prompt=a gray ball"
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")


class Project:
    """A project folder in which `launch.py` can be run."""

    def __init__(self, folder):
        self.folder = folder
        shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "launch.py", folder)
        # Below tests/ no folder is a package, so the extension becomes one here.
        extension = folder / "custom" / EXTENSION
        (extension / "package.py").rename(extension / "__init__.py")
        for part in ("guidance", "systems"):
            (extension / part / "__init__.py").touch()

    def launch(self, *arguments, config="experiment.yaml"):
        """Run a command line; returns its exit status (0 where it just ends)."""
        argv = ["launch.py", *(["--config", str(config)] if config else []), *arguments]
        with pytest.MonkeyPatch.context() as patch, contextlib.chdir(self.folder):
            for name in GPU_VARIABLES:
                # Set first, so that what the launcher writes is taken back too.
                patch.setenv(name, os.environ.get(name, ""))
            patch.setattr(sys, "argv", argv)
            try:
                runpy.run_path("launch.py", run_name="__main__")
            except SystemExit as end:
                return end.code or 0
        return 0

    @property
    def trials(self):
        return sorted((self.folder / "outputs" / "contract").glob("*"))


def forget_extension():
    for name in [n for n, c in threestudio.__modules__.items() if EXTENSION in c.__module__]:
        del threestudio.__modules__[name]
    for name in [n for n in sys.modules if n.split(".")[0] == EXTENSION]:
        del sys.modules[name]


def events():
    return sys.modules[f"{EXTENSION}.systems.scene_system"].EVENTS


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    made = Project(tmp_path_factory.mktemp("contract") / "project")
    yield made
    forget_extension()


@pytest.fixture(scope="module")
def trained(project):
    """The folder of a training of four steps, and what its system wrote down."""
    assert project.launch("--train", "--gpu", "0", PROMPT) == 0
    (trial,) = project.trials
    return trial, list(events())


def last(trained):
    return trained[0] / "ckpts" / "last.ckpt"


def test_the_extension_is_imported_under_its_folders_name(trained):
    cls = threestudio.find("contract-scene-system")
    assert cls.__module__ == f"{EXTENSION}.systems.scene_system"


def test_trial_is_named_by_prompt_and_time(trained):
    name = trained[0].name
    assert name.startswith("a_gray_ball@") and len(name) == len("a_gray_ball@20260101-000000")


def test_output_layout(trained):
    trial = trained[0]
    assert {path.name for path in trial.iterdir()} >= {
        "cmd.txt", "configs", "ckpts", "tb_logs", "csv_logs", "save"
    }  # fmt: skip
    assert PROMPT.split("=")[1] in (trial / "cmd.txt").read_text()
    assert {path.name for path in (trial / "configs").iterdir()} >= {"raw.yaml", "parsed.yaml"}
    assert {path.name for path in (trial / "ckpts").glob("*.ckpt")} == {
        "last.ckpt", "epoch=0-step=4.ckpt"
    }  # fmt: skip
    assert list((trial / "tb_logs" / "version_0").glob("events.out.tfevents.*"))


def test_configs_of_the_run(trained):
    trial = trained[0]
    parsed = yaml.safe_load((trial / "configs" / "parsed.yaml").read_text())
    assert parsed["trial_name"] == trial.name and parsed["timestamp"] == trial.name[11:]
    assert parsed["system"]["prompt_processor"]["prompt"] == "a gray ball"
    assert parsed["checkpoint"]["every_n_train_steps"] == 4
    assert parsed["system"]["renderer"]["return_comp_normal"] is True
    raw = yaml.safe_load((trial / "configs" / "raw.yaml").read_text())
    assert raw == yaml.safe_load((PROJECT / "experiment.yaml").read_text())


def test_pictures_of_validation_and_test(trained):
    save = trained[0] / "save"
    pictures = {str(path.relative_to(save)) for path in save.rglob("*.png")}
    assert pictures == {
        *(f"it{step}-{view}.png" for step in (2, 4) for view in (0, 1)),
        *(f"it4-test/{view}.png" for view in (0, 1, 2)),
    }
    assert np.asarray(Image.open(save / "it4-0.png")).shape == (12, 3 * 16, 3)
    with av.open(str(save / "it4-test.mp4")) as video:
        assert video.streams.video[0].average_rate == 30
        assert sum(1 for _ in video.decode(video=0)) == 3


def test_logged_scalars(trained):
    with open(trained[0] / "csv_logs" / "version_0" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))

    def column(name):
        return [float(row[name]) for row in rows if row.get(name)]

    assert len(column("train/loss_color")) == 4
    # lambda_shape falls from 1 at step 0 to 0 at step 4, the guidance's number from 1 in 10 steps.
    assert column("train_params/lambda_shape") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert column("train/percent") == pytest.approx([1.0, 0.9, 0.8, 0.7])
    (rates,) = [column(name) for name in rows[0] if name.startswith("lr") and "encoding" in name]
    # Warm-up from a half over two steps, then the decay from the full rate.
    assert rates[:3] == pytest.approx([0.005, 0.0075, 0.01])
    assert rates[3] == pytest.approx(0.01 * 0.1**0.25, rel=1e-4)


def test_checkpoint_has_lightnings_keys_and_the_contracts_roots(trained):
    checkpoint = torch.load(last(trained), map_location="cpu", weights_only=True)
    assert {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops",
            "callbacks", "optimizer_states", "lr_schedulers"} <= set(checkpoint)  # fmt: skip
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (0, 4)
    keys = checkpoint["state_dict"]
    assert {key.split(".")[0] for key in keys} <= {"geometry", "material", "background", "renderer"}
    assert "geometry.encoding.encoding.encoding.params" in keys


def test_order_of_the_hooks_of_a_training(trained):
    log = trained[1]
    assert log[0] == ("configure", None)  # no save folder yet
    assert log[1] == ("post_configure", False)  # not resumed
    first_test = next(i for i, event in enumerate(log) if event[0] == "preprocess test")
    step_1 = [i for i, event in enumerate(log[:first_test]) if event == ("preprocess train", 1)][0]
    names = [event[0] for event in log[step_1 : step_1 + 5]]
    assert names == [
        "preprocess train", "update_step", "training_step", "before optimizer", "update_step_end"
    ]  # fmt: skip
    assert log[step_1 + 1][1] == (1, False)
    # The guidance was brought to the step before the training step read it.
    assert log[step_1 + 2][1] == (1, pytest.approx(0.9))
    stages = [event[0] for event in log if event[0].startswith("preprocess")]
    assert (
        stages
        == (["preprocess train"] * 2 + ["preprocess validation"] * 2) * 2 + ["preprocess test"] * 3
    )
    assert [event[1] for event in log if event[0] == "validation end"] == [2, 4]


def run(project, *arguments, tag="other", **kwargs):
    """A launch into a trial of its own; returns its folder and the events.

    A training evaluates nothing: the pictures are looked at where they are the point.
    """
    events().clear()
    named = [f"tag={tag}", "use_timestamp=false"]
    if arguments[0] == "--train":
        named += ["trainer.limit_val_batches=0", "trainer.limit_test_batches=0"]
    assert project.launch(*arguments, PROMPT, *named, **kwargs) == 0
    return project.folder / "outputs" / "contract" / tag, list(events())


def steps(log, name="training_step"):
    return [value[0] for event, value in log if event == name]


@pytest.mark.parametrize(
    ("mode", "key", "files"),
    [
        (
            "--test",
            "resume",
            {"it4-test/0.png", "it4-test/1.png", "it4-test/2.png", "it4-test.mp4"},
        ),
        ("--validate", "system.weights", {"it4-0.png", "it4-1.png"}),
        ("--export", "resume", {"it4-export/model.obj"}),
    ],
)
def test_evaluation_of_a_checkpoint_takes_its_step(project, trained, mode, key, files):
    trial, log = run(project, mode, f"{key}={last(trained)}", tag=f"eval{mode}")
    save = trial / "save"
    assert {str(path.relative_to(save)) for path in save.rglob("*.*")} == files
    assert steps(log) == []
    if mode == "--test":
        for view in range(3):
            assert (save / f"it4-test/{view}.png").read_bytes() == (
                trained[0] / f"save/it4-test/{view}.png"
            ).read_bytes()
    if mode == "--export":
        mesh = trimesh.load(save / "it4-export" / "model.obj", process=False)
        assert len(mesh.faces) > 50 and mesh.visual.kind == "vertex"
        # Without a video the views are of no use, so they are not walked.
        assert [event for event, _ in log].count("preprocess predict") <= 1


def test_export_may_render_the_test_views_first(project, trained):
    trial, log = run(
        project, "--export", f"resume={last(trained)}", "system.exporter.save_video=true", tag="v"
    )
    assert [value for event, value in log if event == "test_step"] == [0, 1, 2]
    assert (trial / "save" / "it4-test.mp4").is_file()
    assert (trial / "save" / "it4-export" / "model.obj").is_file()


def test_relaunching_the_parsed_config_uses_the_same_folder(project, trained):
    before = project.trials
    parsed = trained[0] / "configs" / "parsed.yaml"
    newest = "resume=outputs/contract/a gray ball@LAST/ckpts/last.ckpt"
    assert project.launch("--validate", newest, config=parsed) == 0
    assert project.trials == before


def test_resume_continues_everything(project, trained):
    trial, log = run(
        project, "--train", f"resume={last(trained)}", "trainer.max_steps=6", tag="resumed"
    )
    assert steps(log) == [4, 5]
    assert ("update_step", (4, False)) in log and ("post_configure", True) in log
    checkpoint = torch.load(trial / "ckpts" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 6
    state = checkpoint["optimizer_states"][0]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {6}


def test_weights_start_a_new_run_at_step_zero(project, trained):
    trial, log = run(
        project, "--train", f"system.weights={last(trained)}", "trainer.max_steps=1",
        "system.weights_ignore_modules=[background]", tag="weights",
    )  # fmt: skip
    assert [value for event, value in log if event == "update_step"][:2] == [(4, True), (0, False)]
    assert [event for event, _ in log[:3]] == ["configure", "update_step", "post_configure"]
    assert steps(log) == [0]
    checkpoint = torch.load(trial / "ckpts" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 1
    key = "geometry.encoding.encoding.encoding.params"
    moved = (
        checkpoint["state_dict"][key]
        - torch.load(last(trained), weights_only=True)["state_dict"][key]
    )
    assert 0 < moved.abs().max() < 0.02  # one step from the loaded ones


def test_a_part_takes_its_weights_alone(project, trained):
    trial, log = run(
        project, "--train", f"system.geometry.weights={last(trained)}:geometry",
        "trainer.max_steps=1", tag="part",
    )  # fmt: skip
    assert ("update_step", (4, True)) not in log  # of the system; its part was told alone
    key = "geometry.density_network.layers.0.weight"
    first, second = (
        torch.load(path, weights_only=True)["state_dict"][key]
        for path in (last(trained), trial / "ckpts" / "last.ckpt")
    )
    assert (first - second).abs().max() < 0.0011  # one step of 0.001 away


def test_a_geometry_may_be_converted_from_another_run(project, trained):
    _, log = run(
        project, "--train", f"system.geometry_convert_from={last(trained)}",
        "system.geometry_convert_inherit_texture=true", "trainer.max_steps=1", tag="converted",
    )  # fmt: skip
    assert steps(log) == [0]


def test_optimization_may_be_manual(project):
    trial, log = run(project, "--train", "system.manual=true", "trainer.max_steps=2", tag="manual")
    assert steps(log) == [0, 1]
    state = torch.load(trial / "ckpts" / "last.ckpt", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer_states"][0]["state"].values()} == {2}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--train", "--test", PROMPT], "--train|--test"),
        ([PROMPT], "--train"),
        (["--train"], "prompt"),
        (["--train", PROMPT, "system.geometry.radios=2"], "radios"),
        (["--train", PROMPT, "system.geometry_type=implicit-volum"], "implicit-volume"),
        (["--train", PROMPT, "sytem.loss.lambda_color=1"], "sytem"),
        (["--train", PROMPT, "data.batch_size=[1"], "batch_size"),
        (["--train", PROMPT, "resume=nowhere/last.ckpt"], "nowhere"),
        (["--test", PROMPT], "weights"),
    ],
)
def test_what_cannot_be_run_ends_before_a_folder_is_made(project, trained, capfd, arguments, word):
    before = project.trials
    assert project.launch(*arguments) not in (0, None)
    assert re.search(word, capfd.readouterr().err)
    assert project.trials == before


def test_the_config_is_required(project, capfd):
    assert project.launch("--train", PROMPT, config=None) not in (0, None)
    assert "--config" in capfd.readouterr().err


def test_folders_of_custom_are_loaded_disabled_or_reported(project, trained, capfd):
    custom = project.folder / "custom"
    files = {
        "contract_single.py": "import threestudio\nthreestudio.register('contract-single')(int)\n",
        "contract_off_disabled/__init__.py": "raise SystemExit('must not run')\n",
        "contract-broken/__init__.py": "import a_module_that_nobody_has\n",
        "notes.txt": "no code",
    }
    for name, text in files.items():
        (custom / name).parent.mkdir(exist_ok=True)
        (custom / name).write_text(text)
    try:
        run(project, "--validate", f"resume={last(trained)}", tag="extensions")
        assert threestudio.find("contract-single") is int
        assert "contract_off_disabled" not in sys.modules
        said = capfd.readouterr().err
        assert "a_module_that_nobody_has" in said and "must not run" not in said
        status = project.launch(
            "--validate", PROMPT, f"resume={last(trained)}", "system.background_type=contract-none"
        )
        assert status not in (0, None)
        assert "contract-broken" in capfd.readouterr().err  # the cause, beside the unknown name
    finally:
        threestudio.__modules__.pop("contract-single", None)
        sys.modules.pop("contract_single", None)
        for name in files:
            path = custom / name
            path.unlink() if path.parent == custom else shutil.rmtree(path.parent)
