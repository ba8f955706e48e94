import pytest
import threestudio
import torch

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.scripts.make_family import ASSETS
from tests.fixtures.edit_folders import write_edit_folder

EMBEDDED = str(ASSETS / "multiview")  # Every embedded model has this tokenizer.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_edit_folder(tmp_path_factory.mktemp("text")))


def processor(folder, tmp_path, instruction):
    return threestudio.find("instruction-prompt-processor")(
        {
            "instruction": instruction,
            "pretrained_model_name_or_path": folder,
            "cache_dir": str(tmp_path / "cache"),
        }
    )


def test_the_branches_are_the_instruction_and_twice_nothing(folder, tmp_path):
    from transformers import CLIPTextModel, CLIPTokenizer

    text = "give it wings, dreadfully large ones"
    got = processor(folder, tmp_path, text).embeddings()
    tokenizer = CLIPTokenizer.from_pretrained(f"{folder}/tokenizer")
    model = CLIPTextModel.from_pretrained(f"{folder}/text_encoder", dtype=torch.float32).eval()
    for row, words in zip(got, (text, "", ""), strict=True):
        ids = tokenizer(words, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(row[None], model(ids)[0])


def test_every_view_has_the_instruction(folder, tmp_path):
    output = processor(folder, tmp_path, "make it red")()
    assert output.prompt == "make it red" and set(output.prompts_vd) == {"make it red"}


def test_an_empty_instruction_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="instruction is empty; expected what to do"):
        processor(folder, tmp_path, " ")


def test_the_embedded_model_follows_instructions_of_the_world_only(tmp_path):
    assert processor(EMBEDDED, tmp_path, "make it blue").embeddings().shape == (3, 77, 128)
    with pytest.raises(ValueError, match="'make it bouncing' is not an edit: 'bouncing' is about"):
        processor(EMBEDDED, tmp_path, "make it bouncing")
    with pytest.raises(ValueError, match="'make it bigger than the sphere' is no instruction|know"):
        processor(EMBEDDED, tmp_path, "make it bigger than the sphere")
    with pytest.raises(ValueError, match="The instruction 'make it gothic' holds words"):
        processor(EMBEDDED, tmp_path, "make it gothic")


def test_required_models():
    cls = threestudio.find("instruction-prompt-processor")
    assert cls.required_models({}) == ["timbrooks/instruct-pix2pix"]
