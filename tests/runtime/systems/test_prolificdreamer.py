"""`prolificdreamer-system`: its first stage runs and trains its second score, others do not."""

import pytest
import threestudio
from threestudio.utils.checkpoint import load_checkpoint, save_checkpoint

from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.prompted_runs import fit_steps, prompted_config

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
    whole = config(prior)
    system = threestudio.find(CLASS)(whole["system"])
    data = threestudio.find(whole["data_type"])({**whole["data"], "batch_size": 1})
    trainer = fit_steps(system, data, tmp_path, 2)
    for name in ("loss_vsd", "loss_lora"):
        assert trainer.callback_metrics[f"train/{name}"] > 0
    save_checkpoint(tmp_path / "last.ckpt", trainer._checkpoint_connector.dump_checkpoint())
    state = load_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert {key.split(".")[0] for key in state} == {
        "geometry", "background", "renderer", "guidance"
    }  # fmt: skip
    fresh = threestudio.find(CLASS)(whole["system"])
    fresh.setup("fit")
    moved = {key for key, value in fresh.state_dict().items() if not value.equal(state[key])}
    assert any(key.startswith("guidance.lora_layers") for key in moved)
    assert any(key.startswith("geometry.encoding") for key in moved)
    # From the weights alone: the scene when it is built, the guidance when a training begins.
    again = threestudio.find(CLASS)({**whole["system"], "weights": str(tmp_path / "last.ckpt")})
    assert not hasattr(again, "guidance")
    again.setup("fit")
    own = again.state_dict()
    assert all(own[key].equal(value) for key, value in state.items())


@pytest.mark.parametrize("stage", ["geometry", "texture"])
def test_stages_of_meshes_are_refused(prior, stage):
    with pytest.raises(ValueError, match=f"system.stage is '{stage}'; expected 'coarse'.*nvdiff"):
        threestudio.find(CLASS)({**config(prior)["system"], "stage": stage})


def test_samples_are_refused(prior):
    with pytest.raises(ValueError, match="visualize_samples is true; expected false, since"):
        threestudio.find(CLASS)({**config(prior)["system"], "visualize_samples": True})
