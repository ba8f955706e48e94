"""`fourdfy-system` through the real launcher, and its arithmetic by hand."""

import copy
import json
import time

import pytest
import threestudio
import torch
from threestudio.systems.regularisers import sparsity_loss
from threestudio.utils.checkpoint import load_checkpoint

import custom.fourd  # noqa: F401 - registers the names
from tests.fixtures.launched import launch, need_embedded_model, trained

KEYS = {"psnr", "ssim", "alpha_iou", "seconds", "peak_memory_gb", "steps", "profile", "prompt",
        "truth"}  # fmt: skip
PROMPT = "a red cube next to a blue sphere bouncing"


@pytest.fixture(scope="module")
def run():
    result = trained()
    assert result.status == 0, result.errors
    return result


def metrics_of(folder):
    return json.loads((folder / "save" / "metrics.json").read_text())


@pytest.fixture
def config(run):
    return copy.deepcopy(load_checkpoint(run.checkpoint)["config"]["system"])


@pytest.fixture
def system(config):
    return threestudio.find("fourdfy-system")(config)


@pytest.fixture
def no_guidance(monkeypatch):
    def refuse(self, *_):
        raise AssertionError("an evaluation built a guidance")

    monkeypatch.setattr(threestudio.find("fourdfy-system"), "_build_guidance", refuse)


# What a training leaves behind


def test_training_ends_with_measures_against_the_truth(run):
    metrics = metrics_of(run.folder)
    assert KEYS <= metrics.keys()
    assert metrics["truth"] is True and metrics["prompt"] == PROMPT
    assert metrics["steps"] == 2 and metrics["profile"] == "test" and metrics["views"] == 4
    assert 0 < metrics["seconds"] < 600 and 0.1 < metrics["peak_memory_gb"] < 16
    assert 0 < metrics["psnr_min"] <= metrics["psnr"] < 50
    assert 0 <= metrics["alpha_iou_min"] <= metrics["alpha_iou"] <= 1
    assert -1 <= metrics["ssim"] <= 1


def test_the_measures_are_those_of_the_written_pictures(run):
    """Eight-bit pictures against the truth below them in the contact sheet."""
    import cv2

    sheet = cv2.imread(str(run.folder / "save" / "it2-test-sheet.png"))
    assert sheet.shape == (32, 64, 3), "four views, each above its truth"
    values = []
    for view in range(4):
        columns = slice(16 * view, 16 * view + 16)
        ours = cv2.imread(str(run.folder / "save" / "it2-test" / f"{view}.png"))
        assert (sheet[:16, columns] == ours).all()
        error = (torch.tensor(ours).double() - torch.tensor(sheet[16:, columns]).double()) / 255
        values.append(float(-10 * torch.log10(error.square().mean())))
    assert sum(values) / 4 == pytest.approx(metrics_of(run.folder)["psnr"], abs=0.05)


def test_the_video_has_every_view(run):
    import av

    with av.open(str(run.folder / "save" / "it2-test.mp4")) as video:
        frames = list(video.decode(video=0))
    assert len(frames) == 4 and (frames[0].width, frames[0].height) == (16, 16)


def test_the_checkpoint_holds_the_scene_only(run):
    checkpoint = load_checkpoint(run.checkpoint)
    roots = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert roots == {"geometry", "background", "renderer"}
    assert checkpoint["train_seconds"] > 0
    assert checkpoint["config"]["system"]["prompt_processor"]["prompt"] == PROMPT


# Evaluation of a checkpoint


def test_test_repeats_the_measures_without_a_guidance(run, tmp_path, no_guidance):
    again = launch("--test", tmp_path, f"resume={run.checkpoint}")
    assert again.status == 0, again.errors
    first, second = metrics_of(run.folder), metrics_of(again.folder)
    for name in ("psnr", "ssim", "alpha_iou", "steps", "profile", "truth"):
        assert second[name] == pytest.approx(first[name], abs=1e-4), name
    trained_for = load_checkpoint(run.checkpoint)["train_seconds"]
    assert second["seconds"] == pytest.approx(trained_for, abs=0.01)


def test_a_prompt_of_another_world_has_no_truth(run, tmp_path, no_guidance):
    other = launch(
        "--test", tmp_path, f"resume={run.checkpoint}",
        "system.prompt_processor.prompt=a golden star made of glass",
        "data.single_view.n_test_views=1",
    )  # fmt: skip
    assert other.status == 0, other.errors
    metrics = metrics_of(other.folder)
    assert metrics["truth"] is False and metrics["prompt"] == "a golden star made of glass"
    assert not {"psnr", "ssim", "alpha_iou"} & metrics.keys()
    assert KEYS - {"psnr", "ssim", "alpha_iou"} <= metrics.keys()


def test_validation_writes_a_grid_without_a_guidance(run, tmp_path, no_guidance):
    import cv2

    shown = launch("--validate", tmp_path, f"resume={run.checkpoint}")
    assert shown.status == 0, shown.errors
    grid = cv2.imread(str(shown.folder / "save" / "it2-0.png"))
    assert grid.shape == (48, 32, 3), "colour, opacity and truth of two views"


def test_export_needs_no_guidance(run, tmp_path, no_guidance):
    exported = launch(
        "--export", tmp_path, f"resume={run.checkpoint}",
        "system.geometry.isosurface_resolution=12", "system.geometry.isosurface_threshold=0.1",
    )  # fmt: skip
    assert exported.status == 0, exported.errors
    assert list((exported.folder / "save").rglob("*.obj"))


@pytest.mark.parametrize("mode", ["--test", "--validate", "--export"])
def test_evaluation_without_weights_is_refused(mode, tmp_path):
    refused = launch(mode, tmp_path)
    assert refused.status != 0 and "weights" in refused.errors
    assert "system.weights=" in refused.errors and not refused.folder.exists()


# Bad input


def test_unknown_words_are_named_before_training(tmp_path):
    need_embedded_model()
    refused = launch("--train", tmp_path, "system.prompt_processor.prompt=a red zebra")
    assert refused.status != 0
    assert "zebra" in refused.errors and "red" in refused.errors.replace("a red zebra", "")


def test_an_optimizer_group_that_is_missing_is_an_error(config):
    del config["optimizer"]["params"]["geometry.density_network"]
    system = threestudio.find("fourdfy-system")(config)
    with pytest.raises(ValueError, match=r"geometry.density_network.* require a gradient but are"):
        system.configure_optimizers()


def test_other_stages_are_refused(config):
    with pytest.raises(ValueError, match="system.stage is 'fine'; .* the stage 'coarse' only"):
        threestudio.find("fourdfy-system")({**config, "stage": "fine"})


def test_an_empty_prompt_is_refused(config):
    empty = {**config["prompt_processor"], "prompt": " "}
    with pytest.raises(ValueError, match="prompt_processor.prompt is empty; expected the words"):
        threestudio.find("fourdfy-system")({**config, "prompt_processor": empty})


def test_a_guidance_that_steps_draw_must_be_named(config):
    system = threestudio.find("fourdfy-system")({**config, "prob_multi_view": 0.75})
    with pytest.raises(ValueError, match="system.guidance_type is empty, but 25% of the steps"):
        system._add_guidance("single_view", 0.25)


def test_orientation_needs_normals(system):
    system.cfg.loss["lambda_orient"] = 1.0
    with pytest.raises(ValueError, match="lambda_orient needs normals; use a material"):
        system._regularisers({"opacity": torch.ones(1, 2, 2, 1)})


# Arithmetic of a step


def test_schedules_switch_regularisers_on(system):
    out = {"opacity": torch.full((1, 2, 2, 1), 0.5)}
    for step, weight, terms in (
        (0, 0.0, {"loss_sparsity"}),
        (10000, 0.0, {"loss_sparsity"}),
        (10001, 1000.0, {"loss_sparsity", "loss_opaque"}),
    ):
        system.set_resume_status(0, step)
        assert system._weight("lambda_opaque") == weight
        assert set(system._regularisers(out)) == terms
    assert system._weight("lambda_that_is_not_listed") == 0


@pytest.mark.parametrize(("single", "kind"), [(True, "single_view"), (False, "multi_view")])
def test_a_step_is_the_weighted_sum_of_its_terms(system, single, kind):
    """The guidance is a plain function here: what it returns is weighed and added."""
    logged, seen = {}, {}
    system.log = lambda name, value, **_: logged.update({name: value})

    def guide(rgb, prompt_utils, **batch):
        seen.update(batch, prompt_utils=prompt_utils)
        return {"loss_sds": rgb.mean(), "grad_norm": torch.tensor(3.0), "note": "not logged"}

    setattr(system, f"guidance_{kind}", guide)
    setattr(system, f"prompt_utils_{kind}", "words")
    from custom.fourd.ops.camera import camera_from_orbit, camera_rays, intrinsics_from_fovy

    c2w = camera_from_orbit(torch.zeros(1), torch.zeros(1), 3.0)
    rays_o, rays_d = camera_rays(c2w, intrinsics_from_fovy(torch.tensor([0.7]), 4, 4), 4, 4)
    batch = {"rays_o": rays_o, "rays_d": rays_d, "light_positions": c2w[:, :3, 3],
             "single_view": single, "bg_color": torch.ones(3)}  # fmt: skip
    system.do_update_step(0, 0)
    system.set_resume_status(0, 0)
    system.eval()
    out = system(batch)
    loss = system.training_step(batch, 0)["loss"]
    expected = out["comp_rgb"].mean() + 10.0 * sparsity_loss(out["opacity"])
    torch.testing.assert_close(loss, expected)
    assert seen["prompt_utils"] == "words" and seen["rgb_as_latents"] is False
    weights = {name for name in logged if name.startswith("train_params/")}
    assert weights == {f"train_params/{name}" for name in system.cfg.loss}
    assert logged["train_params/lambda_sparsity"] == 10.0
    assert set(logged) - weights == {
        "train/grad_norm", "train/loss_sds", "train/loss_sparsity", "train/loss",
    }  # fmt: skip
    loss.backward()
    assert system.geometry.encoding.encoding.encoding.params.grad.abs().sum() > 0


def test_the_clock_counts_training_once(system):
    system._fit_started = time.monotonic() - 5
    checkpoint = {"state_dict": {}}
    system.on_save_checkpoint(checkpoint)
    assert checkpoint["train_seconds"] == pytest.approx(5, abs=1)
    system.on_fit_end()
    assert system._train_seconds == pytest.approx(5, abs=1)
    system.on_fit_end()
    system.on_save_checkpoint(checkpoint)
    assert checkpoint["train_seconds"] == system._train_seconds == pytest.approx(5, abs=1)
    system.on_load_checkpoint({"train_seconds": 7.5})
    assert system._train_seconds == 7.5
