"""`dreamfusion-system` through the real launcher: what a run leaves, and its loss by hand."""

import csv
import math

import pytest
import threestudio
import torch
from threestudio.systems.base import BaseLift3DSystem
from threestudio.utils.checkpoint import load_checkpoint

from tests.fixtures.launched import need_embedded_model
from tests.fixtures.model_folders import write_stable_diffusion_folder
from tests.fixtures.prompted_runs import fit_steps, prompted_config, run

CLASS = "dreamfusion-system"


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return write_stable_diffusion_folder(tmp_path_factory.mktemp("priors") / "sd")


@pytest.fixture(scope="module")
def trained(prior, tmp_path_factory):
    """Two steps; pictures of the guidance in the first."""
    config = prompted_config(CLASS, prior, freq={"guidance_eval": 2},
                             guidance={"max_step_percent": 0.05})  # fmt: skip
    result = run("--train", tmp_path_factory.mktemp("run"), config)
    assert result.status == 0, result.errors
    return result


@pytest.fixture
def no_guidance(monkeypatch):
    def refuse(self, *_):
        raise AssertionError("an evaluation built a guidance")

    monkeypatch.setattr(threestudio.find(CLASS), "_build_guidance", refuse)


def config_of(prior):
    return prompted_config(CLASS, prior)["system"]


def rows_of(result):
    """Values of every step, by name, from the log of numbers."""
    (path,) = (result.folder / "csv_logs").rglob("metrics.csv")
    steps = {}
    for row in csv.DictReader(path.open()):
        values = {name: float(value) for name, value in row.items() if value}
        steps.setdefault(int(values.pop("step")), {}).update(values)
    return steps


def size_of(path):
    import cv2

    return cv2.imread(str(path)).shape


def test_the_loss_is_the_weighted_sum_of_what_was_logged(trained):
    steps = rows_of(trained)
    assert sorted(steps) == [0, 1]
    for step, logged in steps.items():
        weights = {"sds": 1.0, "orient": 10.0 + 990.0 * step / 5000, "sparsity": 1.0,
                   "opaque": 0.5, "z_variance": 0.25}  # fmt: skip
        total = sum(weight * logged[f"train/loss_{name}"] for name, weight in weights.items())
        assert logged["train/loss"] == pytest.approx(total, rel=1e-4)
        for name, weight in weights.items():
            assert logged[f"train_params/lambda_{name}"] == pytest.approx(weight)
        assert (logged["train/min_step"], logged["train/max_step"]) == (20, 50)
        assert math.isfinite(logged["train/grad_norm"])


def test_pictures_have_the_names_and_sizes_of_the_contract(trained):
    save = trained.folder / "save"
    for name in ("it1-0", "it1-1", "it2-0", "it2-1", "it2-test/0", "it2-test/2"):
        assert size_of(save / f"{name}.png") == (12, 30, 3), "colour, normals, opacity"
    # Two renders, and of each the noisy image, one step later, its clean image and the end.
    height, width, _ = size_of(save / "it0-train.png")
    assert width == 5 * 8 and height >= 2 * 8
    assert not (save / "it1-train.png").exists(), "every second step"


def test_the_video_shows_every_test_view_at_thirty_frames(trained):
    import av

    with av.open(str(trained.folder / "save" / "it2-test.mp4")) as video:
        assert video.streams.video[0].average_rate == 30
        assert len(list(video.decode(video=0))) == 3


def test_the_checkpoint_holds_the_scene_only(trained):
    roots = {key.split(".")[0] for key in load_checkpoint(trained.checkpoint)["state_dict"]}
    assert roots == {"geometry", "material", "background", "renderer"}


def test_export_and_its_video_build_no_guidance(trained, prior, tmp_path, no_guidance):
    exported = run("--export", tmp_path, prompted_config(CLASS, prior),
                   f"system.weights={trained.checkpoint}", f"resume={trained.checkpoint}",
                   "data.n_test_views=1", "system.exporter.save_video=true")  # fmt: skip
    assert exported.status == 0, exported.errors
    first, second = ((r.folder / "save/it2-test/0.png").read_bytes() for r in (trained, exported))
    assert first == second
    assert (exported.folder / "save/it2-export/model.obj").is_file()


# Without the launcher


def test_a_multiview_model_serves_as_a_single_image_prior(tmp_path):
    """The whole of Lightning's loop with the embedded model, one step."""
    need_embedded_model()
    config = prompted_config(CLASS, "embedded://multiview")
    system = threestudio.find(CLASS)(config["system"])
    before = system.geometry.encoding.encoding.encoding.params.detach().clone()
    data = threestudio.find(config["data_type"])({**config["data"], "batch_size": 1})
    trainer = fit_steps(system, data, tmp_path, 1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["train/loss_sds"] > 0 and logged["train/grad_norm"] > 0
    assert not torch.equal(system.geometry.encoding.encoding.encoding.params, before)


def cameras(size=4):
    module = threestudio.find("random-camera-datamodule")(
        {"height": size, "width": size, "batch_size": 1, "camera_distance_range": [2, 2.2]}
    )
    return module.build_train_dataset().collate({"step": 0, "batch_in_step": 0})


def ready(prior, answer, **system):
    """A system whose guidance is a plain function; returns it and what it logs."""
    built = threestudio.find(CLASS)({**config_of(prior), **system})
    logged = {}
    built.log = lambda name, value, **_: logged.update({name: value})
    built.guidance, built.prompt_utils = answer, "words"
    built.set_resume_status(0, 0)
    built.do_update_step(0, 0)
    return built, logged


def test_a_step_asks_the_guidance_with_the_whole_batch(prior):
    seen = {}

    def answer(rgb, prompt_utils, **batch):
        seen.update(batch, prompt_utils=prompt_utils)
        return {"loss_sds": rgb.mean(), "scale": 3, "words": ["a"], "image": torch.zeros(2, 2)}

    system, logged = ready(prior, answer, loss={"lambda_sds": 2.0})
    batch = cameras()
    loss = system.training_step(batch, 0)["loss"]
    loss.backward()
    assert seen["prompt_utils"] == "words" and seen["rgb_as_latents"] is False
    assert set(batch) <= set(seen) and "guidance_eval" not in seen
    assert set(logged) == {"train/loss_sds", "train/scale", "train/loss", "train_params/lambda_sds"}
    assert loss.item() == pytest.approx(2.0 * logged["train/loss_sds"].item())
    assert system.geometry.encoding.encoding.encoding.params.grad.abs().sum() > 0


def test_a_guidance_that_makes_no_pictures_is_mentioned_once(prior, caplog):
    system, _ = ready(prior, lambda rgb, prompt, **_: {"loss_sds": rgb.mean()},
                      freq={"guidance_eval": 1}, loss={"lambda_sds": 1.0})  # fmt: skip
    with caplog.at_level("WARNING"):
        system.training_step(cameras(), 0)
        system.training_step(cameras(), 1)
    assert caplog.text.count("freq.guidance_eval is 1, but stable-diffusion-guidance makes no") == 1


def test_a_term_without_a_weight_and_an_sdf_are_understood(prior):
    system, _ = ready(prior, lambda *_, **__: {"loss_vsd": torch.ones(())})
    with pytest.raises(ValueError, match="system.loss has no lambda_vsd, the weight of a term"):
        system.training_step(cameras(), 0)
    system.cfg.loss = {"lambda_eikonal": 0.5}
    out = {"opacity": torch.ones(1, 1, 1, 1), "sdf_grad": torch.tensor([[3.0, 0.0, 0.0]])}
    assert {k: float(v) for k, v in system._regularisers(out).items()} == {"loss_eikonal": 4.0}
    assert system._regularisers({"opacity": out["opacity"]}) == {}


@pytest.mark.parametrize("continued", [{}, {"resumed": True}])
def test_a_geometry_starts_from_its_shape_unless_the_run_continues(prior, continued):
    system = threestudio.find(CLASS)(config_of(prior), **continued)
    started = []
    system.geometry.initialize_shape = lambda: started.append(True)
    system.on_fit_start()
    assert started == ([] if continued else [True])


@pytest.mark.parametrize("changes, message", [
    ({"prompt_processor": {"prompt": " "}}, "prompt_processor.prompt is empty; expected the words"),
    ({"freq": {"guidance_evals": 3}}, r"freq has the keys \['guidance_evals'\]; expected guid"),
])  # fmt: skip
def test_wrong_values_are_refused(prior, changes, message):
    with pytest.raises(ValueError, match=message):
        threestudio.find(CLASS)({**config_of(prior), **changes})


def test_a_missing_guidance_is_named_when_training_begins(prior):
    system = threestudio.find(CLASS)({**config_of(prior), "guidance_type": ""})
    assert isinstance(system, BaseLift3DSystem)
    with pytest.raises(ValueError, match="system.guidance_type is empty; .* stable-diffusion-guid"):
        system.setup("fit")
