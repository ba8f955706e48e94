"""A renderer over another one: whose parts, box and configuration it shows."""

import pytest
import threestudio
import torch
from threestudio.models.renderers.wrapper_renderer import WrapperRenderer

GRID = {"otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 6, "base_resolution": 4}


def parts():
    return {
        "geometry": threestudio.find("implicit-volume")({"pos_encoding_config": GRID}),
        "material": threestudio.find("no-material")({}),
        "background": threestudio.find("solid-color-background")({}),
    }


class Narrow(WrapperRenderer):
    def base_config(self):
        return {**super().base_config(), "radius": 0.25}


def test_box_and_parts_are_the_base_renderers():
    borrowed = parts()
    config = {"base_renderer_type": "nerf-volume-renderer", "base_renderer": {"radius": 2.0}}
    renderer = WrapperRenderer(config, **borrowed)
    assert all(getattr(renderer, name) is part for name, part in borrowed.items())
    assert renderer.bbox is renderer.base_renderer.bbox
    assert renderer.bbox.tolist() == [[-2.0] * 3, [2.0] * 3]
    assert "bbox" not in dict(renderer.named_buffers(recurse=False))


def test_parts_are_exchanged_in_the_base_renderer():
    config = {"base_renderer_type": "nerf-volume-renderer"}
    renderer, others = WrapperRenderer(config, **parts()), parts()
    for name, other in others.items():
        getattr(renderer, f"set_{name}")(other)
        assert getattr(renderer.base_renderer, name) is other


def test_a_subclass_decides_what_the_base_renderer_is_built_with():
    renderer = Narrow({"base_renderer_type": "nerf-volume-renderer"}, **parts())
    torch.testing.assert_close(renderer.bbox, torch.tensor([[-0.25] * 3, [0.25] * 3]))


def test_a_base_renderer_must_be_named():
    with pytest.raises(ValueError, match="base_renderer_type is empty; expected a renderer's name"):
        WrapperRenderer({}, **parts())
