"""`prolificdreamer-system`: its first stage runs and trains its second score, others do not."""

import pytest
import threestudio
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.prompted_runs import prompted_config, run

CLASS = "prolificdreamer-system"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("priors") / "sd")


def config(prior):
    result = prompted_config(
        CLASS,
        prior,
        stage="coarse",
        material_type="no-material",
        guidance_type="stable-diffusion-vsd-guidance",
        guidance={"pretrained_model_name_or_path_lora": str(prior)},
        optimizer={"params": {"guidance": {"lr": 0.001}}},
        loss={"lambda_vsd": 1.0, "lambda_lora": 1.0, "lambda_orient": 0.0},
    )
    del result["system"]["material"], result["system"]["loss"]["lambda_sds"]
    return result


def test_two_steps_train_scene_and_second_score_which_the_next_run_continues(prior, tmp_path):
    few = ("data.n_test_views=1", "trainer.limit_val_batches=0", "data.batch_size=1")
    first = run("--train", tmp_path / "first", config(prior), *few)
    assert first.status == 0, first.errors
    state = load_checkpoint(first.checkpoint)["state_dict"]
    assert {key.split(".")[0] for key in state} == {
        "geometry", "background", "renderer", "guidance"
    }  # fmt: skip
    lora = [key for key in state if key.startswith("guidance.lora_layers.") and "up" in key.lower()]
    trained = [key for key in state if key.startswith("guidance.") and state[key].abs().sum() > 0]
    assert trained and (lora or len(trained) > 4)
    # From the weights alone: the scene when it is built, the guidance when a training begins.
    system = threestudio.find(CLASS)(
        {**config(prior)["system"], "weights": str(first.checkpoint)}
    )
    assert not hasattr(system, "guidance")
    system.setup("fit")
    own = system.state_dict()
    assert all((own[key] == value).all() for key, value in state.items())
    assert "colour" not in first.errors


@pytest.mark.parametrize("stage", ["geometry", "texture"])
def test_stages_of_meshes_are_refused(prior, stage):
    with pytest.raises(ValueError, match=f"system.stage is '{stage}'; expected 'coarse'.*nvdiff"):
        threestudio.find(CLASS)({**config(prior)["system"], "stage": stage})


def test_samples_are_refused(prior):
    with pytest.raises(ValueError, match="visualize_samples is true; expected false, since"):
        threestudio.find(CLASS)({**config(prior)["system"], "visualize_samples": True})
