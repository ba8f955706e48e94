"""An export: what is asked to save, and a folder of its own for each."""

import json

import pytest
from threestudio.models.exporters.base import DummyExporter, ExporterOutput
from threestudio.models.exporters.base import Exporter as BaseExporter

from tests.fixtures.small_system import EVENTS, System, config, make_trainer, views

pytestmark = pytest.mark.usefixtures("small_parts")


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
