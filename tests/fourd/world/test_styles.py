"""Styles are functions of colour, checked on colours whose answer is known."""

import colorsys

import pytest
import torch

from custom.fourd.world.styles import PALETTES, STYLES, apply_style
from custom.fourd.world.vocabulary import COLOURS

WHITE, BLACK, RED = torch.ones(3), torch.zeros(3), torch.tensor([1.0, 0.0, 0.0])


@pytest.mark.parametrize("name", STYLES)
def test_every_style_stays_in_range_and_changes_something(name):
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 5)] * 3)
    styled = apply_style(name, grid)
    assert styled.shape == grid.shape and 0 <= styled.min() and styled.max() <= 1
    assert (styled - grid).abs().max() > 0.2
    # A picture is styled pixel by pixel.
    assert torch.equal(apply_style(name, grid.view(5, 25, 3)).view(-1, 3), styled)


def test_all_styles_differ():
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 4)] * 3)
    made = [apply_style(name, grid) for name in STYLES]
    for i, first in enumerate(made):
        assert all((first - other).abs().mean() > 0.02 for other in made[i + 1 :])


@pytest.mark.parametrize(
    "name, colour, expected",
    [
        ("negative", RED, (0.0, 1.0, 1.0)),
        ("monochrome", RED, (0.299, 0.299, 0.299)),
        ("sepia", WHITE, (1.00, 0.92, 0.76)),
        ("sepia", BLACK, (0.16, 0.09, 0.04)),
        ("van gogh", BLACK, (0.05, 0.09, 0.30)),
        ("van gogh", WHITE, (0.98, 0.85, 0.35)),
        ("van gogh", 0.5 * WHITE, (0.20, 0.45, 0.75)),
        ("neon", WHITE, (0.0, 0.0, 0.0)),
        ("neon", RED, (1.0, 0.0, 0.0)),
        ("neon", torch.tensor([0.4, 0.2, 0.2]), (0.8, 0.6, 0.6)),
        ("night", WHITE, (0.22, 0.28, 0.52)),
        ("sunset", WHITE, (1.00, 0.72, 0.42)),
        ("winter", BLACK, (0.54, 0.57, 0.60)),
        ("pastel", RED, (1.0, 0.5, 0.5)),
        ("warm", WHITE, (1.00, 0.84, 0.62)),
        ("cold", WHITE, (0.66, 0.84, 1.00)),
    ],
)
def test_known_colours(name, colour, expected):
    torch.testing.assert_close(apply_style(name, colour), torch.tensor(expected))


@pytest.mark.parametrize("number", range(1, 6))
def test_palettes_turn_hues_and_keep_the_rest(number):
    """Against the standard library's hue, lightness and saturation."""
    degrees = PALETTES[number - 1]
    assert torch.equal(apply_style(f"palette {number}", 0.3 * WHITE), 0.3 * WHITE)
    for colour in COLOURS.values():
        hue, lightness, saturation = colorsys.rgb_to_hls(*colour)
        expected = colorsys.hls_to_rgb((hue + degrees / 360) % 1, lightness, saturation)
        got = apply_style(f"palette {number}", torch.tensor(colour))
        torch.testing.assert_close(got, torch.tensor(expected), atol=1e-5, rtol=0)
        assert (got - torch.tensor(colour)).abs().max() > 0.2


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'baroque' is no style of the world; choose one of: van"):
        apply_style("baroque", WHITE)
