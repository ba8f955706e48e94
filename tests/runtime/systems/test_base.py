import json
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import threestudio
import torch
from omegaconf import OmegaConf
from threestudio.models.exporters.base import DummyExporter, ExporterOutput
from threestudio.models.exporters.base import Exporter as BaseExporter
from threestudio.systems.base import BaseLift3DSystem, BaseSystem
from threestudio.utils.base import BaseModule, BaseObject, Updateable
from threestudio.utils.checkpoint import save_checkpoint
from torch.utils.data import DataLoader, IterableDataset

EVENTS = []


class Part(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        width: int = 2
        child: bool = False

    def configure(self, *args, **parts):
        self.parts = SimpleNamespace(**parts)  # not submodules, as the renderer keeps them
        self.layer = torch.nn.Linear(self.cfg.width, 1)
        if self.cfg.child:
            self.child = torch.nn.Linear(2, 2)
        self.updates = []

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.updates.append((epoch, global_step, on_load_weights))

    @classmethod
    def create_from(cls, other, cfg, copy_net=True):
        made = cls(cfg)
        made.source, made.copied = other, copy_net
        return made


class Exporter(BaseObject):
    @dataclass
    class Config(BaseObject.Config):
        save_video: bool = False
        save_type: str = "json"

    def configure(self, geometry, material, background):
        self.geometry = geometry

    def __call__(self):
        return [SimpleNamespace(save_name="a.json", save_type=self.cfg.save_type,
                                params={"payload": {"x": 1}})]


class Endless(IterableDataset, Updateable):
    def __iter__(self):
        while True:
            yield {}

    def update_step(self, epoch, global_step, on_load_weights=False):
        EVENTS.append(("dataset", global_step))


class System(BaseLift3DSystem):
    @dataclass
    class Config(BaseLift3DSystem.Config):
        manual: bool = False
        extra: dict = field(default_factory=dict)

    def configure(self):
        super().configure()
        self.automatic_optimization = not self.cfg.manual
        EVENTS.append("configure")

    def post_configure(self):
        EVENTS.append("post_configure")

    def preprocess_data(self, batch, stage):
        EVENTS.append(("preprocess", stage))

    def update_step(self, epoch, global_step, on_load_weights=False):
        EVENTS.append(("system", global_step))

    def update_step_end(self, epoch, global_step):
        EVENTS.append(("system end", global_step))

    def on_before_optimizer_step(self, optimizer):
        EVENTS.append("before optimizer")

    def training_step(self, batch, batch_idx):
        EVENTS.append(("training_step", batch_idx))
        loss = self.geometry.layer(torch.ones(1, self.geometry.cfg.width)).square().sum()
        self.log("train/loss_x", loss)
        if self.cfg.manual:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return None
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        EVENTS.append(("validation_step", self.true_global_step))

    test_step = validation_step

    def on_validation_epoch_end(self):
        EVENTS.append("validation end")

    def on_test_epoch_end(self):
        EVENTS.append("test end")


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    EVENTS.clear()
    monkeypatch.setattr(threestudio, "find", {"part": Part, "mesh-exporter": Exporter}.__getitem__)


def config(**changes):
    parts = {f"{name}_type": "part" for name in ("geometry", "material", "background", "renderer")}
    base = {**parts, "optimizer": {"name": "SGD", "args": {"lr": 0.1},
                                   "params": {"geometry": {}}}}
    return OmegaConf.merge(base, changes)


def make_trainer(tmp_path, **options):
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, max_steps=2,
                      default_root_dir=tmp_path, inference_mode=False, **options)


def views(n):
    return DataLoader([{"index": i} for i in range(n)], batch_size=None)


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


# Weights


def stored(system, path, step=40):
    save_checkpoint(path, {"state_dict": system.state_dict(), "epoch": 0, "global_step": step})
    return str(path)


def test_weights_are_taken_and_the_parts_told(tmp_path):
    source = System(config())
    path = stored(source, tmp_path / "a.ckpt")
    EVENTS.clear()
    system = System(config(weights=path))
    assert torch.equal(system.geometry.layer.weight, source.geometry.layer.weight)
    assert system.geometry.updates == [(0, 40, True)]
    assert EVENTS == ["configure", ("system", 40), "post_configure"]
    assert system.true_global_step == 0


def test_a_new_module_starts_fresh_and_an_old_one_is_ignored(tmp_path, caplog):
    source = System(config())
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("background")}
    state["guidance.lora"] = torch.ones(1)
    save_checkpoint(tmp_path / "a.ckpt", {"state_dict": state})
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        System(config(weights=str(tmp_path / "a.ckpt")))
    assert f"background is not in {tmp_path}/a.ckpt and starts fresh." in caplog.text
    assert "guidance of" in caplog.text and "is ignored" in caplog.text


def test_unfit_weights_are_refused_with_their_keys(tmp_path):
    path = stored(System(config()), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"geometry\.layer\.weight: shape \(1, 2\) in the file, "
                                         r"\(1, 3\) here"):
        System(config(weights=path, geometry={"width": 3}))
    save_checkpoint(tmp_path / "b.ckpt", {"state_dict": {"other.w": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"nothing in common with this system; expected .*geom"):
        System(config(weights=str(tmp_path / "b.ckpt")))
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        System(config(weights="none.ckpt"))


def test_ignored_modules_keep_their_own_weights(tmp_path):
    source = System(config())
    path = stored(source, tmp_path / "a.ckpt")
    system = System(config(weights=path, geometry={"width": 3},
                           weights_ignore_modules=["geometry"]))
    assert system.geometry.layer.weight.shape == (1, 3)
    assert torch.equal(system.material.layer.weight, source.material.layer.weight)


def test_strict_loading_ignores_other_roots_only(caplog):
    system = System(config())
    state = system.state_dict()
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        system.load_state_dict({**state, "guidance.x": torch.ones(1)})
    assert "guidance of the checkpoint is not part of this system" in caplog.text
    with pytest.raises(ValueError, match=r"geometry\.extra: in the file, but not here"):
        system.load_state_dict({**state, "geometry.extra": torch.ones(1)})
    del state["geometry.layer.bias"]
    with pytest.raises(ValueError, match=r"geometry\.layer\.bias: here, but not in the file"):
        system.load_state_dict(state)
    system.load_state_dict(state, strict=False)


def test_frozen_guidance_is_not_stored_and_not_missed():
    system = System(config())
    system.guidance = torch.nn.ModuleDict({"frozen": torch.nn.BatchNorm1d(2),
                                           "lora": torch.nn.Linear(1, 1)})
    system.guidance["frozen"].requires_grad_(False)
    checkpoint = {"state_dict": dict(system.state_dict())}
    system.on_save_checkpoint(checkpoint)
    kept = {key for key in checkpoint["state_dict"] if key.startswith("guidance")}
    assert kept == {"guidance.lora.weight", "guidance.lora.bias"}
    system.load_state_dict(checkpoint["state_dict"])


class LateSystem(System):
    late_modules = ("guidance_single_view",)

    def build(self, width=1):
        self.guidance_single_view = torch.nn.Linear(width, 1)
        self.load_late_weights()


def test_a_module_that_is_built_later_gets_its_weights_then(tmp_path, caplog):
    source = LateSystem(config())
    source.build()
    path = stored(source, tmp_path / "a.ckpt")
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        system = LateSystem(config(weights=path))
        system.build()
    assert torch.equal(system.guidance_single_view.weight, source.guidance_single_view.weight)
    assert "is ignored" not in caplog.text and "starts fresh" not in caplog.text
    with pytest.raises(ValueError, match=r"guidance_single_view\.weight: shape \(1, 1\) in the f"):
        LateSystem(config(weights=path)).build(width=2)


def test_a_late_module_may_be_new_or_left_out(tmp_path, caplog):
    path = stored(System(config()), tmp_path / "a.ckpt")
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        LateSystem(config(weights=path)).build()
    assert f"guidance_single_view is not in {path} and starts fresh." in caplog.text
    source = LateSystem(config())
    source.build(width=2)
    path = stored(source, tmp_path / "b.ckpt")
    LateSystem(config(weights=path, weights_ignore_modules=["guidance_single_view"])).build()
    LateSystem(config()).build()


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


# Export and savers


def test_export_dispatches_to_the_saver(tmp_path):
    system = System(config())
    system.set_save_dir(tmp_path)
    system.set_resume_status(0, 9)
    make_trainer(tmp_path).predict(system, views(1), return_predictions=False)
    assert (tmp_path / "it9-export" / "a.json").exists()
    assert not any(isinstance(e, tuple) and e[0] == "validation_step" for e in EVENTS)
    system.cfg.exporter["save_type"] = "hologram"
    with pytest.raises(ValueError, match=r"System has no method save_hologram"):
        make_trainer(tmp_path).predict(system, views(1), return_predictions=False)


class Watching(BaseExporter):
    """Writes what it was told."""

    def attach(self, system):
        self.told = [system.true_global_step]

    def see_view(self, batch):
        self.told.append(batch["index"])

    def __call__(self):
        yield ExporterOutput("told.json", "json", {"payload": self.told})


def test_no_export_overwrites_an_earlier_one(tmp_path):
    """Nor does one that wrote nothing leave a folder."""
    system = System(config())
    system.set_save_dir(tmp_path)
    system.set_resume_status(0, 9)
    parts = {name: None for name in ("geometry", "material", "background")}
    for index in range(3):
        system.exporter = Watching({}, **parts)
        system.exporter.attach(system)
        system.predict_step({"index": index}, 0)
        system.on_predict_epoch_end()
    system.exporter = DummyExporter({}, **parts)
    system.on_predict_epoch_end()
    names = ["it9-export", "it9-export-2", "it9-export-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    found = [json.loads((tmp_path / name / "told.json").read_text()) for name in names]
    assert found == [[9, 0], [9, 1], [9, 2]]


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


@pytest.mark.parametrize("stage, key", [("validate", "cleanup_after_validation_step"),
                                        ("test", "cleanup_after_test_step")])
def test_memory_is_freed_after_each_batch_if_asked(tmp_path, monkeypatch, stage, key):
    freed = []
    monkeypatch.setattr("threestudio.systems.base.cleanup", lambda: freed.append(1))
    for asked, expected in ((False, 0), (True, 3)):
        getattr(make_trainer(tmp_path), stage)(System(config(**{key: asked})), views(3))
        assert len(freed) == expected
