"""Extensions as others write them: load and train, or say in one sentence what needs a GPU.

`tests/fixtures/foreign_project` is a project with three of them, in hyphenated folders: a field on
tinycudann and nerfacc; splats with a renderer and an optimizer of their own; a mesh renderer on
nvdiffrast. Where the real packages are installed these runs use them, so they are skipped.
"""

import csv
import os
import shutil
import sys

import pytest
import threestudio
import torch
from threestudio.launcher.main import main
from threestudio.stand_ins.finder import STAND_INS, is_installed
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.launched import ROOT

PROJECT = ROOT / "tests" / "fixtures" / "foreign_project"
EXTENSIONS = ("threestudio-tcnn-field", "threestudio-own-splats", "threestudio-mesh-views")

pytestmark = pytest.mark.skipif(
    any(is_installed(package) for package in STAND_INS), reason="needs the packages to be absent"
)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("foreign") / "project"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for part in (folder / "custom").rglob("*/"):
        # Kept under another name, since a folder of tests is no package.
        given = part / "package.py"
        given.rename(part / "__init__.py") if given.exists() else (part / "__init__.py").touch()
    yield folder
    for name in [n for n, c in threestudio.__modules__.items() if owner(c) in EXTENSIONS]:
        del threestudio.__modules__[name]
    for name in [n for n in sys.modules if n.split(".")[0] in (*EXTENSIONS, *STAND_INS)]:
        del sys.modules[name]


def owner(cls) -> str:
    return cls.__module__.split(".")[0]


def launch(project, config, *arguments) -> int:
    argv = ["--config", str(project / config), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
            # Set first, so that what the launcher writes is taken back too.
            patch.setenv(name, os.environ.get(name, ""))
        patch.chdir(project)
        return main(argv, root=project)


def trial_of(project, name):
    (trial,) = (project / "outputs" / name).iterdir()
    return trial


def logged(trial, key) -> list[float]:
    (path,) = trial.glob("csv_logs/**/metrics.csv")
    return [float(row[key]) for row in csv.DictReader(path.open()) if row.get(key)]


def test_a_field_on_tinycudann_and_nerfacc_trains(project, caplog):
    caplog.set_level("INFO")
    assert launch(project, "field.yaml", "--train") == 0
    trial = trial_of(project, "field")
    losses = logged(trial, "train/loss")
    assert len(losses) == 3 and losses[2] < losses[0]
    assert logged(trial, "train/strength") == [2.0] * 3, "the composite name found its mixin"
    state = load_checkpoint(trial / "ckpts" / "last.ckpt")["state_dict"]
    # The field's modules have tiny-cuda-nn's one vector: matrices [16, 16] and [16, 16] of the
    # network, then three levels of the grid with 64 + 512 + 512 entries of two features.
    assert state["geometry.density.params"].numel() == 2 * 256 + 2 * (64 + 512 + 512)
    assert state["geometry.encoding.params"].numel() == 0
    assert list((trial / "save").glob("it3-test.mp4"))
    lines = [record.getMessage() for record in caplog.records]
    for package in ("tinycudann", "nerfacc"):
        assert sum(f"{package} is not installed" in line for line in lines) == 1


def test_its_checkpoint_is_rendered_by_a_second_launch(project):
    last = trial_of(project, "field") / "ckpts" / "last.ckpt"
    assert launch(project, "field.yaml", "--test", f"resume={last}", "tag=again") == 0


def test_splats_train_with_an_optimizer_of_their_own(project):
    assert launch(project, "splats.yaml", "--train") == 0
    trial = trial_of(project, "splats")
    points = logged(trial, "train/points")
    assert len(points) == 3 and points[0] == points[1] == 12 and points[2] < 12
    losses = logged(trial, "train/loss")
    assert losses[1] < losses[0]
    state = load_checkpoint(trial / "ckpts" / "last.ckpt")["state_dict"]
    assert len(state["geometry.position"]) == points[2]
    assert launch(project, "splats.yaml", "--test", f"resume={trial / 'ckpts' / 'last.ckpt'}",
                  "tag=again") == 0  # fmt: skip


def test_what_needs_nvdiffrast_says_so_and_the_rest_of_its_extension_works(project, capsys):
    refused = ("system.renderer_type=mesh-view-renderer", "tag=refused")
    assert launch(project, "splats.yaml", "--train", *refused) == 1
    errors = capsys.readouterr().err
    sentence = "launch.py: error: nvdiffrast.torch.RasterizeCudaContext needs a CUDA GPU and the"
    assert sentence in errors and "Traceback" not in errors
    background = threestudio.find("two-color-background")({})
    up = torch.tensor([[[[0.0, 0.0, 1.0]]]])
    assert torch.equal(background(up), torch.ones(1, 1, 1, 3))
