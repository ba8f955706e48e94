"""Texts through a T5, against the encoder itself."""

import pytest
import threestudio
import torch
from threestudio.utils.diffusers_folder import load_model, load_tokenizer

from tests.fixtures.deep_floyd_folder import TEXT_WIDTH, write_deep_floyd_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_deep_floyd_folder(tmp_path_factory.mktemp("priors") / "if")


def processor(folder, tmp_path, **keys):
    usual = {"pretrained_model_name_or_path": str(folder), "prompt": "a red cube",
             "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    return threestudio.find("deep-floyd-prompt-processor")({**usual, **keys})


@torch.no_grad()
def test_embeddings_are_the_encoders_with_the_padding_masked(folder, tmp_path):
    output = processor(folder, tmp_path, negative_prompt="ugly")()
    assert output.text_embeddings.shape == (1, 77, TEXT_WIDTH)
    tokenizer = load_tokenizer(folder)
    encoder = load_model(folder, "text_encoder", torch.device("cpu"))
    for got, prompt in (
        (output.text_embeddings[0], "a red cube"),
        (output.uncond_text_embeddings[0], "ugly"),
        (output.text_embeddings_vd[output.direction2idx["back"]], "a red cube, back view"),
    ):
        ids = tokenizer(prompt).input_ids
        alone = encoder(torch.tensor([ids])).last_hidden_state[0]
        # What the encoder says of the text does not depend on the padding behind it.
        torch.testing.assert_close(got[: len(ids)], alone, rtol=1e-4, atol=1e-5)
        assert got[len(ids) :].abs().sum() > 0, "states of the padding are kept"


def test_a_cached_prompt_loads_no_encoder(folder, tmp_path, monkeypatch):
    from threestudio.models.prompt_processors import folder_prompt_processor as module

    first = processor(folder, tmp_path)()
    monkeypatch.setattr(module, "load_model", None)
    torch.testing.assert_close(processor(folder, tmp_path)().text_embeddings, first.text_embeddings)


def test_long_prompts_are_cut_with_a_note(folder, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        output = processor(folder, tmp_path, prompt="red " * 30)()
    assert output.text_embeddings.shape[1] == 77 and "tokens; only 77 are read" in caplog.text


def test_default_model():
    (required,) = threestudio.find("deep-floyd-prompt-processor").required_models({})
    assert required == "DeepFloyd/IF-I-XL-v1.0"
    assert required.components == ("tokenizer", "text_encoder")
