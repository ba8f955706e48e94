import time
from pathlib import Path

import pytest
from threestudio.utils import hub

from tests.fixtures.hub_server import HubServer


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    # The client reads the flag once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_cache_folder_follows_the_hubs_own_variables(monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "/a")
    assert hub.hub_cache_folder() == Path("/a")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", "/b")
    assert hub.hub_cache_folder() == Path("/b/hub")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert hub.hub_cache_folder() == Path("/c/huggingface/hub")


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE"])
@pytest.mark.parametrize("value, offline", [("1", True), ("true", True), ("0", False), ("", False)])
def test_offline_flags(monkeypatch, name, value, offline):
    monkeypatch.setenv(name, value)
    assert hub.is_offline() is offline


def test_snapshots_are_found_by_branch_and_by_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    assert hub.cached_snapshot("a/b", None) is None
    folder.mkdir(parents=True)
    assert hub.cached_snapshot("a/b", None) is None
    assert hub.cached_snapshot("a/b", "c0ffee") == folder
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("c0ffee\n")
    assert hub.cached_snapshot("a/b", None) == folder
    # A branch whose commit was never downloaded.
    (tmp_path / "models--a--b" / "refs" / "next").write_text("dead")
    assert hub.cached_snapshot("a/b", "next") is None


def test_a_hub_that_answers_may_be_asked(monkeypatch):
    with HubServer({}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        assert hub.why_no_download(allow_download=True) is None
        assert hub.why_no_download(allow_download=False) == "downloads were not asked for"
        # The probe opens a connection and asks for nothing.
        assert server.requests == []


def test_a_silent_network_is_given_up_soon(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    start = time.monotonic()
    assert "cannot be reached" in hub.why_no_download(allow_download=True)
    assert time.monotonic() - start < hub.PROBE_SECONDS + 2


def test_a_cut_download_is_told_by_its_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("no folder")
    (source := tmp_path / "source" / "unet").mkdir(parents=True)
    (source / "config.json").write_text("{}")
    with HubServer({"a/b": tmp_path / "source"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        cause = hub.download("a/b", None, ["unet/*.json"])
    assert cause == "the download broke off (NotADirectoryError)"


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch):
    """A hub with one file, and an empty cache."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (folder := tmp_path / "source" / "unet").mkdir(parents=True)
    (folder / "config.json").write_text("{}" * 5000)
    with HubServer({"a/b": tmp_path / "source"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield tmp_path / "cache"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_told_and_leaves_nothing_to_take_for_complete(tiny_hub, monkeypatch):
    import builtins

    real_open = builtins.open
    writes = []

    def open_on_a_full_disk(file, mode="r", *args, **kwargs):
        # What the client writes next to the blobs of this cache meets a device that is full.
        if str(file).startswith(str(tiny_hub)) and ".incomplete" in str(file) and "r" not in mode:
            writes.append(str(file))
            return real_open("/dev/full", mode, *args, **kwargs)
        return real_open(file, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_on_a_full_disk)
        patch.setattr("io.open", open_on_a_full_disk)
        cause = hub.download("a/b", None, ["unet/*.json"])
    assert writes and cause == f"the disk of {tiny_hub} is full"
    snapshot = hub.cached_snapshot("a/b", None)
    assert snapshot is None or not (snapshot / "unet" / "config.json").exists()
    assert hub.download("a/b", None, ["unet/*.json"]) is None


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(28, "No space left on device"), "the disk of CACHE is full"),
        (OSError(30, "Read-only file system"), "CACHE cannot be written (Read-only file system)"),
        (PermissionError(13, "Permission denied"), "CACHE cannot be written (Permission denied)"),
        (OSError(5, "Input/output error"), None),
        (ValueError("x"), None),
    ],
)
def test_problems_of_the_disk_are_found_in_the_chain_of_causes(error, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", "CACHE")
    outer = RuntimeError("wrapped")
    outer.__cause__ = error
    assert hub._disk_problem(outer) == sentence
    assert hub._disk_problem(None) is None
