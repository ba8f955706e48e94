import threestudio
import torch

import custom.fourd  # noqa: F401 - registers the names
from custom.fourd.prompts import videocrafter_prompt_processor
from tests.fixtures.model_folders import write_stable_diffusion_folder

CLASS = "videocrafter-prompt-processor"
PUBLISHED = {
    "config": "inference_t2v_512_v2.0.yaml",
    "pretrained_model_name_or_path": "VideoCrafter/VideoCrafter2",
    "negative_prompt": "low motion, static statue, not moving, no motion",
    "prompt": "a red cube",
    "use_cache": False,
}


def test_the_originals_id_stands_for_the_text_encoder_of_stable_diffusion(tmp_path, monkeypatch):
    folder = write_stable_diffusion_folder(tmp_path / "sd")
    cls = threestudio.find(CLASS)
    assert cls.required_models({}) == ["stabilityai/stable-diffusion-2-1-base"]
    assert cls.required_models(PUBLISHED) == cls.required_models({})
    assert cls.required_models({"pretrained_model_name_or_path": "a/b"}) == ["a/b"]
    monkeypatch.setattr(videocrafter_prompt_processor, "TEXT_ENCODER", str(folder))
    given = dict(PUBLISHED)
    output = cls(given)()
    assert given == PUBLISHED
    usual = threestudio.find("stable-diffusion-prompt-processor")(
        {
            "pretrained_model_name_or_path": str(folder),
            "prompt": PUBLISHED["prompt"],
            "negative_prompt": PUBLISHED["negative_prompt"],
            "use_cache": False,
        }
    )()
    assert torch.equal(output.text_embeddings_vd, usual.text_embeddings_vd)
    assert torch.equal(output.uncond_text_embeddings, usual.uncond_text_embeddings)
