"""The parts that renderers and exporters borrow."""

import threestudio
from threestudio.models.exporters.base import DummyExporter
from threestudio.models.renderers.base import Renderer
from threestudio.models.scene_parts import SceneParts

GRID = {"otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 6, "base_resolution": 4}


def test_both_give_the_same_parts_and_own_none():
    geometry = threestudio.find("implicit-volume")({"pos_encoding_config": GRID})
    material = threestudio.find("no-material")({})
    background = threestudio.find("solid-color-background")({"learned": True})
    parts = SceneParts(geometry, material, background)
    for borrower in (Renderer({}, **vars(parts)), DummyExporter({}, **vars(parts))):
        assert borrower.sub_modules == parts
        assert borrower.geometry is geometry
        assert borrower.material is material
        assert borrower.background is background
    assert not list(Renderer({}, **vars(parts)).parameters())
