"""Systems under Lightning: construction, the order of a batch, steps, pictures and faults."""


import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import Logger
from threestudio.systems.base import BaseSystem
from torch.utils.data import DataLoader

from tests.fixtures.small_system import (
    EVENTS,
    Endless,
    System,
    config,
    make_trainer,
    stored,
    views,
)

pytestmark = pytest.mark.usefixtures("small_parts")


def test_construction_order_and_parts():
    system = System(config())
    assert EVENTS == ["configure", "post_configure"]
    assert system.renderer.parts.geometry is system.geometry
    assert not any(key.startswith("renderer.parts") for key in system.state_dict())
    assert not system.resumed and System(config(), resumed=True).resumed


def test_order_of_a_training_batch(tmp_path):
    system = System(config())
    EVENTS.clear()
    make_trainer(tmp_path).fit(system, DataLoader(Endless(), batch_size=None))
    first = EVENTS[: EVENTS.index(("preprocess", "train"), 1)]
    # The dataset is updated on its own, then once more as an attribute of the system.
    assert first == [
        ("preprocess", "train"), ("dataset", 0), ("dataset", 0), ("system", 0),
        ("training_step", 0), "before optimizer", ("system end", 1),
    ]
    assert system.geometry.updates[-1] == (0, 1, False)


@pytest.mark.parametrize("stage", ["validation", "test", "predict"])
def test_order_of_evaluation_batches(tmp_path, stage):
    system = System(config(exporter={"save_video": True}))
    system.set_save_dir(tmp_path)
    system.set_resume_status(0, 7)
    EVENTS.clear()
    trainer = make_trainer(tmp_path)
    getattr(trainer, stage if stage != "validation" else "validate")(system, views(1))
    assert EVENTS[:3] == [("preprocess", stage), ("system", 7), ("validation_step", 7)]
    assert ("system end", 7) in EVENTS
    assert EVENTS[-1] == ("validation end" if stage == "validation" else "test end")


def test_manual_optimization_moves_the_weights(tmp_path):
    system = System(config(manual=True))
    before = system.geometry.layer.weight.detach().clone()
    make_trainer(tmp_path).fit(system, DataLoader(Endless(), batch_size=None))
    assert not torch.equal(before, system.geometry.layer.weight)
    assert system.global_step == 2


def test_schedule_and_true_step():
    system = System(config())
    system.set_resume_status(1, 50)
    assert (system.true_current_epoch, system.true_global_step) == (1, 50)
    assert system.C(OmegaConf.create([0, 0.0, 1.0, 100])) == pytest.approx(0.5)
    assert system.C(3) == 3


def test_configure_optimizers_with_a_scheduler():
    system = System(config(scheduler={"name": "ExponentialLR", "interval": "step",
                                      "args": {"gamma": 0.5}}))
    result = system.configure_optimizers()
    assert result["lr_scheduler"]["interval"] == "step"
    assert result["optimizer"].param_groups[0]["name"] == "geometry"


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_steps_are_abstract(name):
    system = BaseSystem({})
    with pytest.raises(NotImplementedError, match=f"BaseSystem defines no {name}"):
        getattr(system, name)({}, 0)


def test_validation_end_is_abstract():
    with pytest.raises(NotImplementedError, match="no on_validation_epoch_end"):
        BaseSystem({}).on_validation_epoch_end()


def test_geometry_conversion(tmp_path):
    run = tmp_path / "run"
    path = stored(System(config()), run / "ckpts" / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"configs/parsed\.yaml, which does not exist"):
        System(config(geometry_convert_from=path))
    (run / "configs").mkdir()
    OmegaConf.save(OmegaConf.create({"system": config()}), run / "configs" / "parsed.yaml")
    system = System(config(geometry_convert_from=path, geometry_convert_inherit_texture=True))
    assert system.geometry.copied and system.geometry.source.updates == [(0, 40, True)]
    resumed = System(config(geometry_convert_from=path), resumed=True)
    assert not hasattr(resumed.geometry, "source")


def test_guidance_evaluation_picture(tmp_path):
    import cv2

    system = System(config())
    system.set_save_dir(tmp_path)
    images = {name: torch.rand(2, 4, 4, 3) for name in
              ("imgs_noisy", "imgs_1step", "imgs_1orig", "imgs_final")}
    system.guidance_evaluation_save(torch.rand(2, 8, 8, 3), {**images, "texts": ["a", "b"]})
    assert cv2.imread(str(tmp_path / "it0-train.png")).shape == (16, 40, 3)


def test_save_faults_raise_outside_a_training(tmp_path):
    system = System(config())
    (tmp_path / "file").write_text("")
    system.set_save_dir(tmp_path / "file")
    with pytest.raises(OSError):
        system.save_json("a.json", {})


def test_logged_losses_are_remembered(tmp_path):
    system = System(config())
    make_trainer(tmp_path).fit(system, DataLoader(Endless(), batch_size=None))
    assert not system._last_logged["train/loss_x"].requires_grad


class Written(Logger):
    """Keeps what it is given to write."""

    name, version = "written", 0

    def __init__(self):
        super().__init__()
        self.steps = {}

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, set()).update(metrics)

    def log_hyperparams(self, *args, **kwargs):
        pass


class CountingSystem(System):
    """Counts how often Lightning was handed a value."""

    handed = 0

    def training_step(self, batch, batch_idx):
        self.log("train/number", float(batch_idx))
        self.log("train/shown", 1.0, prog_bar=True)
        CountingSystem.handed += self.is_log_step
        return super().training_step(batch, batch_idx)


def fit_counting(tmp_path, steps, every, **options):
    CountingSystem.handed = 0
    logger = Written()
    trainer = pl.Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
                         log_every_n_steps=every, default_root_dir=tmp_path, **options)
    trainer.fit(CountingSystem(config()), DataLoader(Endless(), batch_size=None))
    return CountingSystem.handed, logger.steps, trainer


def test_values_reach_lightning_only_at_the_steps_that_are_written(tmp_path):
    handed, written, trainer = fit_counting(tmp_path, steps=7, every=3)
    names = {"train/number", "train/shown", "train/loss_x"}
    assert handed == 3  # of the 3rd, the 6th, and the last step
    assert {step for step, found in written.items() if names <= found} == {2, 5}
    assert trainer.callback_metrics["train/number"] == 6.0


@pytest.mark.parametrize("batches, steps", [(1, 4), (2, 4)])
def test_accumulated_batches_count_as_one_step_of_the_log(tmp_path, batches, steps):
    handed, written, _ = fit_counting(tmp_path, steps, 2, accumulate_grad_batches=batches)
    assert handed == 2 * batches
    assert {step for step, found in written.items() if "train/number" in found} == {1, 3}


def test_a_monitored_value_is_kept_at_every_step(tmp_path):
    stop = EarlyStopping("train/number", patience=100)
    handed, _, trainer = fit_counting(tmp_path, 5, 100, callbacks=[stop])
    assert handed == 5 and trainer.callback_metrics["train/number"] == 4.0


@pytest.mark.parametrize("stage, key", [("validate", "cleanup_after_validation_step"),
                                        ("test", "cleanup_after_test_step")])
def test_memory_is_freed_after_each_batch_if_asked(tmp_path, monkeypatch, stage, key):
    freed = []
    monkeypatch.setattr("threestudio.systems.base.cleanup", lambda: freed.append(1))
    for asked, expected in ((False, 0), (True, 3)):
        getattr(make_trainer(tmp_path), stage)(System(config(**{key: asked})), views(3))
        assert len(freed) == expected
