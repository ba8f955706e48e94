"""The painted sphere: texel centres, blends and seams by hand."""

import math

import pytest
import threestudio
import torch
from threestudio.utils.rng import set_experiment_seed


def build(**config):
    set_experiment_seed(0)
    return threestudio.find("textured-background")(
        {"height": 4, "width": 2, "n_output_dims": 2, "color_activation": "none", **config}
    )


def direction(from_up_deg, azimuth_deg):
    up, around = math.radians(from_up_deg), math.radians(azimuth_deg)
    return [math.sin(up) * math.cos(around), math.sin(up) * math.sin(around), math.cos(up)]


def test_texel_centres_and_the_middle_between_them():
    background = build()
    texture = background.texture.detach()[0]
    # Rows are azimuth -180..180 in four, columns the angle from +z in two.
    for row, azimuth in enumerate((-135, -45, 45, 135)):
        for column, from_up in enumerate((45, 135)):
            color = background(torch.tensor(direction(from_up, azimuth)).view(1, 1, 1, 3))
            torch.testing.assert_close(color[0, 0, 0], texture[:, row, column], atol=1e-5, rtol=0)
    middle = background(torch.tensor(direction(90, 0)).view(1, 1, 1, 3))[0, 0, 0]
    torch.testing.assert_close(middle, texture[:, 1:3].mean(dim=(1, 2)), atol=1e-5, rtol=0)


def test_shapes_activation_and_gradient():
    background = build(color_activation="sigmoid", n_output_dims=3)
    dirs = torch.nn.functional.normalize(torch.randn(2, 5, 6, 3), dim=-1)
    color = background(dirs)
    assert color.shape == (2, 5, 6, 3) and 0 < color.min() <= color.max() < 1
    color.sum().backward()
    assert background.texture.grad.abs().sum() > 0
    assert torch.isfinite(background(torch.tensor([[[[0.0, 0.0, 1.0]]]]))).all()


def test_the_texture_depends_on_the_seed_only():
    assert torch.equal(build().texture, build().texture)
    assert build().texture.shape == (1, 2, 4, 2)


def test_a_size_of_zero_is_refused():
    with pytest.raises(ValueError, match="height is 0 and its width 2; expected at least one"):
        build(height=0)
