import json
import shutil

import pytest
import threestudio
import torch
from threestudio.models.prompt_processors import folder_prompt_processor as module
from threestudio.utils.pretrained import ModelUnavailableError


def processor(folder, tmp_path, **keys):
    cls = threestudio.find("stable-diffusion-prompt-processor")
    return cls(
        {
            "prompt": "a red cube",
            "pretrained_model_name_or_path": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            **keys,
        }
    )


def encoded_by_transformers(folder, prompt):
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]))[0]


def test_embeddings_are_the_text_models_last_hidden_states(sd_folder, tmp_path):
    output = processor(sd_folder, tmp_path, negative_prompt="ugly")()
    assert output.text_embeddings.shape == (1, 77, 24)
    for got, prompt in (
        (output.text_embeddings, "a red cube"),
        (output.uncond_text_embeddings, "ugly"),
        (output.text_embeddings_vd[2:3], "a red cube, back view"),
        (output.uncond_text_embeddings_vd[3:], "ugly"),
    ):
        torch.testing.assert_close(got, encoded_by_transformers(sd_folder, prompt))
    assert output.prompt == "a red cube"
    assert output.prompts_vd[0] == "a red cube, side view"


def test_cached_embeddings_load_no_text_encoder(sd_folder, tmp_path, monkeypatch):
    first = processor(sd_folder, tmp_path)()
    assert len(list((tmp_path / "cache").iterdir())) == 6

    def refuse(*args):
        raise AssertionError("the text encoder was loaded")

    monkeypatch.setattr(module, "load_model", refuse)
    again = processor(sd_folder, tmp_path)()
    assert torch.equal(first.text_embeddings_vd, again.text_embeddings_vd)
    with pytest.raises(AssertionError, match="the text encoder was loaded"):
        processor(sd_folder, tmp_path, prompt="a blue cube")
    with pytest.raises(AssertionError, match="the text encoder was loaded"):
        processor(sd_folder, tmp_path, use_cache=False)


def test_another_encoder_under_the_same_name_is_noticed(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    before = processor(folder, tmp_path)()
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config))
    after = processor(folder, tmp_path)()
    assert not torch.equal(before.text_embeddings, after.text_embeddings)


def test_prompts_of_single_views_replace_the_worded_ones(sd_folder, tmp_path):
    output = processor(sd_folder, tmp_path, prompt_back="the back of a red cube")()
    assert output.prompts_vd[2] == "the back of a red cube"
    assert output.prompts_vd[1] == "a red cube, front view"


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"prompt": "a green cube"}, r"The prompt 'a green cube' holds words .* know: green\."),
        ({"prompt_side": "a mug"}, "The view-dependent prompt 'a mug' holds words"),
        ({"negative_prompt": "ugly"}, "The negative_prompt 'ugly' holds words .* know: ugly"),
    ],
)
def test_unknown_words_are_refused_wherever_they_stand(word_folder, tmp_path, keys, message):
    assert processor(word_folder, tmp_path)().text_embeddings.shape == (1, 77, 24)
    with pytest.raises(ValueError, match=message):
        processor(word_folder, tmp_path, **keys)


def test_long_prompts_are_cut_with_a_note(sd_folder, tmp_path, caplog):
    processor(sd_folder, tmp_path, prompt="red " * 90)
    assert "has 92 tokens; only 77 are read" in caplog.text


def test_prompt_debiasing_is_refused(sd_folder, tmp_path):
    with pytest.raises(ValueError, match="use_prompt_debiasing is true; expected false"):
        processor(sd_folder, tmp_path, use_prompt_debiasing=True)


def test_a_folder_without_text_encoder_is_refused(sd_folder, tmp_path):
    folder = shutil.copytree(sd_folder, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ModelUnavailableError, match="lacks text_encoder/config.json"):
        processor(folder, tmp_path)


def test_required_models(sd_folder):
    cls = threestudio.find("stable-diffusion-prompt-processor")
    assert cls.required_models({"prompt": "x"}) == ["runwayml/stable-diffusion-v1-5"]
    assert cls.required_models({"pretrained_model_name_or_path": "a/b"}) == ["a/b"]
