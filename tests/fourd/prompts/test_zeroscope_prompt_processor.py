import pytest
import threestudio
import torch

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.video_folders import write_zeroscope_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_zeroscope_folder(tmp_path_factory.mktemp("text") / "zeroscope")


def processor(folder, tmp_path, **keys):
    return threestudio.find("zeroscope-prompt-processor")(
        {
            "prompt": "a red cube",
            "pretrained_model_name_or_path": str(folder),
            "cache_dir": str(tmp_path / "cache"),
            **keys,
        }
    )


def test_embeddings_are_the_video_models_own_text_encoders(folder, tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    output = processor(folder, tmp_path)()
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    for got, text in (
        (output.text_embeddings, "a red cube"),
        (output.text_embeddings_vd[0:1], "a red cube, side view"),
        (output.uncond_text_embeddings, ""),
    ):
        ids = tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(got, model(ids)[0])


def test_front_and_back_reach_45_degrees(folder, tmp_path):
    """The image priors of the same experiment stop at 30; by hand at both sides of each border."""
    output = processor(folder, tmp_path)()
    azimuth = torch.tensor([0.0, 44.0, -44.0, 46.0, 134.0, 136.0, -136.0, 226.0])
    views = ["front", "front", "front", "side", "side", "back", "back", "side"]
    rows = output.get_text_embeddings(torch.zeros(8), azimuth, torch.ones(8))[:8]
    for row, name in zip(rows, views):
        assert torch.equal(row, output.text_embeddings_vd[output.direction2idx[name]])
    assert output.prompts_vd == [
        f"a red cube, {v} view" for v in ("side", "front", "back", "overhead")
    ]


def test_required_models_and_the_extensions_name():
    cls = threestudio.find("zeroscope-prompt-processor")
    assert cls.required_models({}) == ["cerspense/zeroscope_v2_576w"]
    assert cls.required_models({})[0].components == ("tokenizer", "text_encoder")
    assert threestudio.find("4dfy-zeroscope-prompt-processor") is cls
