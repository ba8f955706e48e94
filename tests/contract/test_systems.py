"""`BaseSystem` and `BaseLift3DSystem` under Lightning: section 3, what a launch does not show."""

from dataclasses import dataclass

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from threestudio.systems.base import BaseLift3DSystem, BaseSystem
from threestudio.utils.base import Updateable
from torch.utils.data import DataLoader, IterableDataset

SYSTEM_DEFAULTS = {
    "loggers": {}, "loss": {}, "optimizer": {}, "scheduler": None, "weights": None,
    "weights_ignore_modules": None, "cleanup_after_validation_step": False,
    "cleanup_after_test_step": False,
}  # fmt: skip
LIFT_DEFAULTS = {
    "geometry_convert_from": None, "geometry_convert_inherit_texture": False,
    "geometry_convert_override": {}, "exporter_type": "mesh-exporter", "exporter": {},
    **{f"{part}_type": "" for part in
       ("geometry", "material", "background", "renderer", "guidance", "prompt_processor")},
    **{part: {} for part in
       ("geometry", "material", "background", "renderer", "guidance", "prompt_processor")},
}  # fmt: skip
EVENTS = []


class Endless(IterableDataset, Updateable):
    def __iter__(self):
        while True:
            yield {}

    def collate(self, batch):
        return {"x": torch.ones(1, 2)}

    def update_step(self, epoch, global_step, on_load_weights=False):
        EVENTS.append(("dataset", global_step))

    def update_step_end(self, epoch, global_step):
        EVENTS.append(("dataset end", global_step))


class Plain(BaseSystem):
    """A layer that is trained towards zero."""

    def configure(self):
        self.layer = torch.nn.Linear(2, 1)

    def update_step(self, epoch, global_step, on_load_weights=False):
        EVENTS.append(("system", global_step))

    def update_step_end(self, epoch, global_step):
        EVENTS.append(("system end", global_step))

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch["x"]).square().mean() * self.C(self.cfg.loss.lambda_x)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False)
        self.log_dict({"train/one": 1, "train/two": torch.tensor(2.0)})
        return {"loss": loss}


class Scene(BaseLift3DSystem):
    def configure(self):
        pass


def plain(**cfg):
    optimizer = {"name": "SGD", "args": {"lr": 0.1}}
    return Plain({"optimizer": optimizer, "loss": {"lambda_x": [0, 1.0, 3.0, 4]}, **cfg})


def fit(system, steps):
    loader = DataLoader(Endless(), batch_size=None, collate_fn=Endless().collate)
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, inference_mode=False,
    )  # fmt: skip
    trainer.fit(system, loader)


@pytest.mark.parametrize(
    ("cls", "defaults"),
    [(BaseSystem, SYSTEM_DEFAULTS), (BaseLift3DSystem, {**SYSTEM_DEFAULTS, **LIFT_DEFAULTS})],
)
def test_defaults(cls, defaults):
    cfg = cls.Config()
    assert {key: getattr(cfg, key) for key in defaults} == defaults


@pytest.mark.parametrize("step", ["training_step", "validation_step", "test_step", "predict_step"])
def test_steps_must_be_defined(step):
    with pytest.raises(NotImplementedError):
        getattr(Scene({}) if step != "predict_step" else BaseSystem({}), step)({}, 0)


def test_the_end_of_validation_must_be_defined():
    with pytest.raises(NotImplementedError):
        Scene({}).on_validation_epoch_end()


def test_unknown_keys_are_type_errors():
    with pytest.raises(TypeError, match="geometri"):
        Scene({"geometri": {}})


def test_the_dataset_is_brought_to_the_step_before_the_system():
    EVENTS.clear()
    fit(plain(), 2)
    # The system holds the dataset while it is updated, so the walk reaches it once more. The end
    # of a step comes after the optimizer, when Lightning has counted the step already.
    assert EVENTS == [
        event
        for step in (0, 1)
        for event in (
            [("dataset", step)] * 2 + [("system", step)]
            + [("dataset end", step + 1)] * 2 + [("system end", step + 1)]
        )
    ]  # fmt: skip


def test_training_moves_the_weights_and_counts_the_steps():
    system = plain()
    before = system.layer.weight.clone()
    fit(system, 3)
    assert not torch.equal(system.layer.weight, before)
    assert system.true_global_step == 3
    assert system.C([0, 1.0, 3.0, 4]) == pytest.approx(2.5)


def test_an_evaluation_reports_the_injected_step():
    system = plain()
    system.set_resume_status(2, 345)
    assert (system.true_current_epoch, system.true_global_step) == (2, 345)
    assert system.C([0, 0.0, 1.0, 690]) == pytest.approx(0.5)
    assert Plain({}, resumed=True).resumed is True and plain().resumed is False


def test_a_loss_without_its_weight_stops():
    with pytest.raises(Exception, match="lambda_x"):
        fit(plain(loss={}), 1)


def test_weights_may_leave_modules_out(tmp_path):
    source, path = plain(), tmp_path / "last.ckpt"
    torch.save({"state_dict": source.state_dict(), "epoch": 1, "global_step": 90}, path)
    EVENTS.clear()
    loaded = plain(weights=str(path))
    assert torch.equal(loaded.layer.weight, source.layer.weight)
    assert EVENTS == [("system", 90)] and loaded.true_global_step == 0


def test_what_a_guidance_makes_of_a_render_is_one_picture(tmp_path):
    system = Scene({})
    system.set_save_dir(str(tmp_path))
    system.set_resume_status(0, 5)
    shades = {"imgs_noisy": 0.2, "imgs_1step": 0.4, "imgs_1orig": 0.6, "imgs_final": 0.8}
    system.guidance_evaluation_save(
        torch.ones(2, 64, 64, 3),
        {**{name: torch.full((2, 32, 32, 3), value) for name, value in shades.items()},
         "texts": ["a", "b"]},
    )  # fmt: skip
    read = np.asarray(Image.open(tmp_path / "it5-train.png"))
    assert read.shape == (2 * 64, 5 * 64, 3)
    columns = [read[60, 64 * k + 40, 0] for k in range(5)]
    assert columns == [255, 51, 102, 153, 204]


def test_an_exporter_may_only_ask_for_savers_that_exist(tmp_path):
    @dataclass
    class Output:
        save_name: str
        save_type: str
        params: dict

    class Exporter:
        cfg = type("Cfg", (), {"save_video": False})

        def __call__(self):
            return [Output("a.json", "json", {"payload": [1]}), Output("b", "hologram", {})]

    system = Scene({})
    system.set_save_dir(str(tmp_path))
    system.set_resume_status(0, 5)
    system.exporter = Exporter()
    with pytest.raises((ValueError, AttributeError), match="hologram"):
        system.on_predict_epoch_end()
    assert (tmp_path / "it5-export" / "a.json").read_text().split() == ["[", "1", "]"]
