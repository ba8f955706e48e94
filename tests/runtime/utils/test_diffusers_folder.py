import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from threestudio.utils.diffusers_folder import (
    folder_fingerprint,
    load_model,
    load_tokenizer,
    read_config,
    register_model_class,
)

from tests.fixtures.model_folders import write_stable_diffusion_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "sd")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_networks_come_frozen_and_with_the_files_numbers(original, component):
    model = load_model(original, component, CPU)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    (path,) = (original / component).glob("*.safetensors")
    stored = load_file(path)
    # Published text encoders nest their names; transformers no longer does.
    stored = {name.removeprefix("text_model."): value for name, value in stored.items()}
    state = model.state_dict()
    assert stored.keys() <= state.keys()
    assert all(torch.equal(state[name], value) for name, value in stored.items())


def test_precision_is_as_asked(original):
    assert load_model(original, "unet", CPU, torch.float16).dtype == torch.float16


def test_half_precision_files_serve_alone(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: value.half() for name, value in load_file(path).items()}
    path.unlink()
    save_file(half, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    model = load_model(folder, "unet", CPU)
    assert model.dtype == torch.float32
    assert torch.equal(model.conv_in.weight, half["conv_in.weight"].float())


def test_a_class_outside_the_list_is_refused(folder):
    config = read_config(folder, "unet")
    config.update(_class_name="EvilModel", auto_map={"AutoModel": "evil.EvilModel"})
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "unet" / "evil.py").write_text("raise SystemExit('code of a folder ran')")
    with pytest.raises(ValueError, match="asks for the class 'EvilModel'; expected one of Auto"):
        load_model(folder, "unet", CPU)


def test_an_extension_may_add_a_class(folder):
    register_model_class("LinkedUNet", "diffusers:UNet2DConditionModel")
    config = read_config(folder, "unet")
    config["_class_name"] = "LinkedUNet"
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    assert load_model(folder, "unet", CPU).config.cross_attention_dim == 24


def test_pickled_weights_are_refused(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="only the pickle diffusion_pytorch_model.bin; exp"):
        load_model(folder, "unet", CPU)
    path.with_suffix(".bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights; expected a .safetensors file"):
        load_model(folder, "unet", CPU)


def test_missing_and_broken_configurations_are_named(folder):
    with pytest.raises(FileNotFoundError, match="with the component 'image_encoder'"):
        read_config(folder, "image_encoder")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="scheduler_config.json is not valid JSON"):
        read_config(folder, "scheduler")
    path.write_text("[]")
    with pytest.raises(ValueError, match="holds a list; expected a JSON object"):
        read_config(folder, "scheduler")


def test_tokenizer_of_published_files(original):
    tokenizer = load_tokenizer(original)
    ids = tokenizer("Red cat").input_ids
    # Start, the merged word "red", c, a, t at a word's end, end.
    assert tokenizer.convert_ids_to_tokens(ids) == [
        "<|startoftext|>",
        "red</w>",
        "c",
        "a",
        "t</w>",
        "<|endoftext|>",
    ]
    assert tokenizer.model_max_length == 77


def test_a_tokenizer_outside_the_list_is_refused(folder):
    path = folder / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "EvilTokenizer"}))
    with pytest.raises(ValueError, match="asks for the class 'EvilTokenizer'"):
        load_tokenizer(folder)


def test_fingerprint_follows_contents_not_places(original, folder):
    parts = ("tokenizer", "text_encoder")
    before = folder_fingerprint(folder, parts)
    assert before == folder_fingerprint(original, parts)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "text_encoder" / "README.md").write_text("hello")
    assert folder_fingerprint(folder, parts) == before
    weights = folder / "text_encoder" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_fingerprint(folder, parts) != before


def test_fingerprint_of_large_files_reads_their_ends(folder, monkeypatch):
    from threestudio.utils import diffusers_folder

    monkeypatch.setattr(diffusers_folder, "_WHOLE_FILE_BYTES", 100)
    monkeypatch.setattr(diffusers_folder, "_END_BYTES", 50)
    weights = folder / "text_encoder" / "model.safetensors"
    fingerprints = set()
    for position in (0, -1, None):
        content = bytearray(weights.read_bytes())
        if position is not None:
            content[position] ^= 1
        weights.write_bytes(content)
        fingerprints.add(folder_fingerprint(folder, ("text_encoder",)))
    # Two changes; the third reading saw the same file again.
    assert len(fingerprints) == 2
