import shutil
import socket
import time
from pathlib import Path

import pytest
from threestudio.utils import pretrained

import custom.fourd  # noqa: F401 - registers the table of models
from custom.fourd.scripts import doctor_models
from custom.fourd.scripts.doctor_models import fetch, model_row, tidy
from tests.fixtures.hub_server import COMMIT, HubServer
from tests.fixtures.model_folders import write_stable_diffusion_folder

PRIOR = ("unet", "vae", "scheduler")
TEXT = ("tokenizer", "text_encoder")


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An own, empty hub cache, and no network flags."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained, "_announced", set())
    return tmp_path / "hub"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """An own table of models with round sizes."""
    path = tmp_path / "models.yaml"
    path.write_text(
        """
models:
  one:
    id: owner/model
    licence: MIT
    size_gb: 9
    files_gb: {unet: 5, vae: 3, text_encoder: 1}
  mirror: {id: second/mirror, licence: MIT, size_gb: 4}
  pickles: {id: owner/pickles, licence: MIT, original: {kind: diffusers}}
aliases:
  gone/model: [second/mirror]
"""
    )
    monkeypatch.setattr(pretrained, "_table_paths", [path])


def bytes_in(folder, parts):
    return sum(p.stat().st_size for part in parts for p in (folder / part).rglob("*"))


def test_a_missing_model_has_the_size_of_its_parts(table):
    row = model_row("owner/model", PRIOR)
    assert (row.where, row.is_here, row.download_gb, row.licence) == ("missing", False, 8.0, "MIT")
    assert row.missing_parts == PRIOR and row.disk_gb == 0.0
    assert model_row("owner/model", ()).download_gb == 9.0
    unknown = model_row("other/model", PRIOR)
    assert (unknown.download_gb, unknown.licence) == (None, "unknown")
    assert "convert_checkpoint" in model_row("owner/pickles", PRIOR).remark


def test_what_is_there_is_measured_and_what_lacks_is_named(table, sd_folder, cache):
    snapshot = cache / "models--owner--model" / "snapshots" / COMMIT
    (cache / "models--owner--model" / "refs").mkdir(parents=True)
    (cache / "models--owner--model" / "refs" / "main").write_text(COMMIT)
    shutil.copytree(sd_folder, snapshot)
    row = model_row("owner/model", PRIOR)
    assert row.where == "cache" and row.folder == str(snapshot) and row.download_gb == 0.0
    assert row.disk_gb == pytest.approx(bytes_in(sd_folder, PRIOR) / 1e9)
    shutil.rmtree(snapshot / "vae")
    row = model_row("owner/model", PRIOR)
    assert (row.where, row.missing_parts, row.download_gb) == ("missing", ("vae",), 3.0)


def test_folders_embedded_models_and_mirrors_are_told_apart(table, sd_folder, cache):
    assert model_row(str(sd_folder), PRIOR).where == "folder"
    embedded = model_row("embedded://multiview", TEXT)
    assert embedded.where == "embedded" and 0 < embedded.disk_gb < 0.02
    assert model_row("gone/model", PRIOR).served_by == "second/mirror"
    assert model_row("gone/model", PRIOR).download_gb == 4.0


def test_the_models_of_a_profile_are_those_that_its_steps_load():
    """By hand from the configs: stage 2 alone adds VSD's two, stage 3 the video prior."""

    def names(profile, *stages):
        paths = [doctor_models.ROOT / f"custom/configs/fourdfy_stage_{n}.yaml" for n in stages]
        rows = doctor_models.models_of(doctor_models.composed(p, profile) for p in paths)
        return {row.name: set(row.parts) for row in rows}

    mvdream = {"ashawkey/mvdream-sd2.1-diffusers": set(PRIOR)}
    base = "stabilityai/stable-diffusion-2-1-base"
    assert names("low_vram", 1) == {**mvdream, base: set(TEXT)}
    assert names("paper", 1, 2, 3) == {
        **mvdream,
        base: {*TEXT, *PRIOR},
        "stabilityai/stable-diffusion-2-1": {"unet", "scheduler"},
        "cerspense/zeroscope_v2_576w": {*TEXT, *PRIOR},
    }
    assert all(name.startswith("embedded://") for name in names("embedded", 1, 3))
    stage_1 = doctor_models.ROOT / "custom/configs/fourdfy_stage_1.yaml"
    assert doctor_models.composed(stage_1, "no-such-profile") is None
    override = "system.prompt_processor_multi_view.pretrained_model_name_or_path=owner/mine"
    cfg = doctor_models.composed(stage_1, "paper", (override,))
    assert "owner/mine" in {row.name for row in doctor_models.models_of([cfg])}


def test_a_fetch_brings_what_the_config_then_finds(table, sd_folder, cache, monkeypatch):
    said = []
    with HubServer({"second/mirror": sd_folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setattr(doctor_models, "free_bytes", lambda folder: 10**12)
        assert fetch([model_row("gone/model", PRIOR)], said.append) is True
        assert not any("gone/model" in path for path in hub.requests)
    assert said[0].startswith("Fetching second/mirror (unet, vae, scheduler; about 4.0 GB) into")
    assert said[-1] == "gone/model is here."
    row = model_row("gone/model", PRIOR)
    assert row.where == "cache" and row.served_by == "second/mirror"
    # Only what is needed came, and it is what the hub has.
    found = {str(p.relative_to(row.folder)) for p in Path(row.folder).rglob("*") if p.is_file()}
    assert {name.split("/")[0] for name in found if "/" in name} == set(PRIOR)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (Path(row.folder) / weights).read_bytes() == (sd_folder / weights).read_bytes()
    assert fetch([row], said.append) is True and said[-1].startswith("Nothing to fetch")


def test_a_fetch_that_breaks_off_leaves_the_model_missing(table, sd_folder, monkeypatch):
    said = []
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(doctor_models, "free_bytes", lambda folder: 10**12)
    rows = [model_row("owner/model", PRIOR), model_row("second/mirror", ("scheduler",))]
    cut = {"unet/diffusion_pytorch_model.safetensors": 1000}
    with HubServer({"owner/model": sd_folder, "second/mirror": sd_folder}, cut) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert fetch(rows, said.append) is False
        assert any("the download broke off" in line for line in said)
        row = model_row("owner/model", PRIOR)
        assert row.where == "missing" and "unet" in row.missing_parts
        # The next model was fetched all the same, and the first is taken up again.
        assert model_row("second/mirror", ("scheduler",)).is_here
        hub.cut.clear()
        assert fetch([row], said.append) is True
    assert model_row("owner/model", PRIOR).is_here


def test_offline_is_one_sentence_within_five_seconds(table, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")  # never answers
    said = []
    start = time.monotonic()
    rows = [model_row("owner/model", PRIOR), model_row("gone/model", ())]
    assert fetch(rows, said.append) is False
    assert time.monotonic() - start < 5
    (sentence,) = said
    assert "Nothing was fetched: 192.0.2.1 cannot be reached" in sentence
    assert "missing: owner/model, second/mirror" in sentence and sentence.count(". ") == 0
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    assert fetch([model_row("owner/model", PRIOR)], said.append) is False
    assert "says to stay offline" in said[-1]


def test_a_model_that_does_not_fit_the_disk_is_not_begun(table, sd_folder, cache, monkeypatch):
    said = []
    monkeypatch.setattr(doctor_models, "free_bytes", lambda folder: 8.1e9)
    with HubServer({"owner/model": sd_folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert fetch([model_row("owner/model", PRIOR)], said.append) is False
        assert hub.requests == []
    assert "owner/model needs 8.0 GB and" in said[-1] and "has 8.1 GB free; make room" in said[-1]
    assert not cache.exists()


def test_pickles_are_answered_by_how_to_convert_them(table, sd_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(sd_folder, tmp_path / "pickles")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    said = []
    with HubServer({"owner/pickles": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert fetch([model_row("owner/pickles", ("unet",))], said.append) is False
        assert not any(path.endswith(".bin") for path in hub.requests)
    assert "holds no complete safetensors model" in said[-1]
    assert "convert_checkpoint --kind diffusers FOLDER TARGET" in said[-1]


def test_paths_are_shown_without_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert tidy(tmp_path / "cache") == "~/cache"
    assert tidy(f"{tmp_path}-other") == f"{tmp_path}-other"
    assert tidy(doctor_models.ROOT / "outputs") == "./outputs" and tidy("outputs") == "outputs"
