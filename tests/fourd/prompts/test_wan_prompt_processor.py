import pytest
import threestudio
import torch
from safetensors.torch import load_file, save_file
from threestudio.utils.diffusers_folder import load_model, load_tokenizer
from threestudio.utils.pretrained import ModelUnavailableError

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.video_models import write_umt5_folder

CLASS = "wan-prompt-processor"
LENGTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_umt5_folder(tmp_path_factory.mktemp("priors") / "umt5")


def processor(folder, tmp_path, **keys):
    usual = {
        "pretrained_model_name_or_path": str(folder),
        "prompt": "a red cube",
        "max_sequence_length": LENGTH,
        "cache_dir": str(tmp_path / "cache"),
    }
    return threestudio.find(CLASS)({**usual, **keys})


@torch.no_grad()
def test_embeddings_are_the_encoders_and_zero_beyond_the_text(folder, tmp_path):
    p = processor(folder, tmp_path, negative_prompt="")
    output = p()
    # As diffusers' pipeline has it: padded to one length, the padding masked, then set to zero.
    tokens = load_tokenizer(folder)(
        ["a red cube", "a red cube, side view", ""],
        padding="max_length",
        max_length=LENGTH,
        return_tensors="pt",
    )
    encoder = load_model(folder, "text_encoder", torch.device("cpu"))
    states = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    expected = states * tokens.attention_mask[..., None]
    assert tokens.attention_mask.sum(1).tolist() == [12, 23, 1]
    side = output.direction2idx["side"]
    torch.testing.assert_close(output.text_embeddings[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.text_embeddings_vd[side], expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.uncond_text_embeddings[0], expected[2], rtol=1e-4, atol=1e-5)
    assert (output.text_embeddings[0, 12:] == 0).all()


def test_longer_texts_are_cut_behind_their_end_token_with_a_note(folder, tmp_path, caplog):
    with caplog.at_level("WARNING"):
        p = processor(folder, tmp_path, prompt="a red cube on a blue cylinder", use_cache=False)
    assert "has 31 tokens; only 24 are read" in caplog.text
    ids = load_tokenizer(folder)("a red cube on a blue cylinder").input_ids
    encoder = load_model(folder, "text_encoder", torch.device("cpu"))
    with torch.no_grad():
        expected = encoder(torch.tensor([[*ids[: LENGTH - 1], 1]])).last_hidden_state
    torch.testing.assert_close(p().text_embeddings, expected, rtol=1e-4, atol=1e-5)


def test_the_cache_spares_the_encoder_and_knows_the_length(folder, tmp_path, monkeypatch):
    first = processor(folder, tmp_path)().text_embeddings

    def refuse(self, prompts):
        raise AssertionError(f"encoded {prompts}")

    monkeypatch.setattr(threestudio.find(CLASS), "encode", refuse)
    assert torch.equal(processor(folder, tmp_path)().text_embeddings, first)
    with pytest.raises(AssertionError, match="encoded"):
        processor(folder, tmp_path, max_sequence_length=LENGTH + 1)


def test_the_embedding_table_is_found_under_either_of_its_names(folder, tmp_path):
    write_umt5_folder(tmp_path)
    path = tmp_path / "text_encoder" / "model.safetensors"
    state = load_file(path)
    state["encoder.embed_tokens.weight"] = state.pop("shared.weight")
    save_file(state, path, metadata={"format": "pt"})
    keys = {"use_cache": False}
    torch.testing.assert_close(
        processor(tmp_path, tmp_path, **keys)().text_embeddings,
        processor(folder, tmp_path, **keys)().text_embeddings,
    )


def test_lengths_and_models_that_do_not_serve_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="max_sequence_length is 0; expected a positive number of"):
        processor(folder, tmp_path, max_sequence_length=0)
    with pytest.raises(ModelUnavailableError, match="does not exist; give an existing diffusers"):
        processor(tmp_path / "nowhere", tmp_path)


def test_defaults_are_wans():
    cls = threestudio.find(CLASS)
    assert cls.required_models({}) == ["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    assert cls.Config.max_sequence_length == 512
