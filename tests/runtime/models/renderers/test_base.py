"""What renderers borrow and what they own."""

import pytest
import threestudio
import torch
from threestudio.models.renderers.base import (
    DeferredVolumeRenderer,
    Rasterizer,
    Renderer,
    VolumeRenderer,
)

GEOMETRY = {
    "pos_encoding_config": {
        "otype": "HashGrid",
        "n_levels": 2,
        "n_features_per_level": 2,
        "log2_hashmap_size": 6,
        "base_resolution": 4,
        "per_level_scale": 1.5,
    }
}


def parts():
    return {
        "geometry": threestudio.find("implicit-volume")(GEOMETRY),
        "material": threestudio.find("no-material")({}),
        "background": threestudio.find("solid-color-background")({"learned": True}),
    }


def test_the_three_parts_are_borrowed_not_owned():
    borrowed = parts()
    renderer = Renderer({"radius": 2.0}, **borrowed)
    assert all(getattr(renderer, name) is part for name, part in borrowed.items())
    assert not list(renderer.parameters()) and set(renderer.state_dict()) == {"bbox"}
    assert renderer.bbox.tolist() == [[-2.0] * 3, [2.0] * 3]


def test_parts_can_be_exchanged():
    renderer, others = Renderer({}, **parts()), parts()
    for name, other in others.items():
        getattr(renderer, f"set_{name}")(other)
        assert getattr(renderer, name) is other


def test_the_step_reaches_the_parts_through_the_renderer():
    renderer = Renderer({}, **parts())
    renderer.do_update_step(0, 7)
    assert renderer.background._step == 7


@pytest.mark.parametrize("kind", [VolumeRenderer, DeferredVolumeRenderer, Rasterizer])
def test_bases_are_abstract(kind):
    renderer = kind({}, **parts())
    assert isinstance(renderer, Renderer)
    with pytest.raises(NotImplementedError):
        renderer(torch.zeros(1))


def test_a_foreign_volume_renderer_may_extend_the_config():
    class Counting(threestudio.find("nerf-volume-renderer")):
        def forward(self, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(*args, **kwargs)

    renderer = Counting({"num_samples_per_ray": 4}, **parts())
    rays_o = torch.tensor([3.0, 0.0, 0.0]).expand(1, 1, 1, 3)
    rays_d = torch.tensor([-1.0, 0.0, 0.0]).expand(1, 1, 1, 3)
    renderer(rays_o, rays_d, torch.zeros(1, 3))
    assert renderer.calls == 1


def test_all_registered_parts_of_a_scene_are_found_by_name():
    for name in (
        "implicit-volume",
        "no-material",
        "diffuse-with-point-light-material",
        "solid-color-background",
        "neural-environment-map-background",
        "nerf-volume-renderer",
        "mesh-exporter",
        "dummy-exporter",
    ):
        assert threestudio.find(name).__module__.startswith("threestudio.models.")
