"""Global styles of the world: what they make of a pixel's colour.

Every style is a function of colour alone, so that the styled world is as exact, from every camera
and at every time, as the world itself. Background pixels are styled like any other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)
SEPIA_DARK, SEPIA_LIGHT = (0.16, 0.09, 0.04), (1.00, 0.92, 0.76)
STARRY_DARK, STARRY_MIDDLE, STARRY_LIGHT = (
    (0.05, 0.09, 0.30),
    (0.20, 0.45, 0.75),
    (0.98, 0.85, 0.35),
)
NIGHT, SUNSET_DARK, SUNSET_LIGHT = (0.22, 0.28, 0.52), (0.25, 0.04, 0.18), (1.00, 0.72, 0.42)
PASTEL_SHARE, SNOW_SHARE = 0.5, 0.6
SNOW = (0.90, 0.95, 1.00)
WARM, COLD = (1.00, 0.84, 0.62), (0.66, 0.84, 1.00)

PALETTES = (60, 120, 180, 240, 300)
"""The palettes that a random one is drawn from: hues turned by so many degrees. Greys, and so a
grey background, stay what they are; lightness and saturation (of HSL) as well."""


def _between(share: Tensor, dark: tuple, light: tuple) -> Tensor:
    low, high = share.new_tensor(dark), share.new_tensor(light)
    return low + share * (high - low)


def _luminance(rgb: Tensor) -> Tensor:
    return (rgb * rgb.new_tensor(LUMINANCE)).sum(-1, keepdim=True)


def _sepia(rgb: Tensor) -> Tensor:
    return _between(_luminance(rgb), SEPIA_DARK, SEPIA_LIGHT)


def _van_gogh(rgb: Tensor) -> Tensor:
    """The colours of his starry night: dark blue over light blue to yellow, by luminance."""
    light = _luminance(rgb)
    lower = _between((2 * light).clamp_max(1), STARRY_DARK, STARRY_MIDDLE)
    upper = _between((2 * light - 1).clamp_min(0), STARRY_MIDDLE, STARRY_LIGHT)
    return torch.where(light < 0.5, lower, upper)


def _neon(rgb: Tensor) -> Tensor:
    """Light turned into dark and dark into light, hues kept."""
    return (rgb + 1 - rgb.amax(-1, keepdim=True) - rgb.amin(-1, keepdim=True)).clamp(0, 1)


def _turned(degrees: int) -> Callable[[Tensor], Tensor]:
    """Turn hues: by 120 degrees, channels move on by one; by 180, largest and least exchange."""
    thirds = {60: 2, 120: 1, 180: 0, 240: 2, 300: 1}[degrees]

    def turn(rgb: Tensor) -> Tensor:
        moved = rgb.roll(thirds, dims=-1)
        if degrees % 120 == 0:
            return moved
        return rgb.amax(-1, keepdim=True) + rgb.amin(-1, keepdim=True) - moved

    return turn


def _tinted(tint: tuple) -> Callable[[Tensor], Tensor]:
    return lambda rgb: rgb * rgb.new_tensor(tint)


STYLES: dict[str, Callable[[Tensor], Tensor]] = {
    "van gogh": _van_gogh,
    "sepia": _sepia,
    "monochrome": lambda rgb: _luminance(rgb).expand_as(rgb),
    "negative": lambda rgb: 1 - rgb,
    "neon": _neon,
    "night": _tinted(NIGHT),
    "sunset": lambda rgb: _between(rgb, SUNSET_DARK, SUNSET_LIGHT),
    "winter": lambda rgb: rgb + SNOW_SHARE * (rgb.new_tensor(SNOW) - rgb),
    "pastel": lambda rgb: rgb + PASTEL_SHARE * (1 - rgb),
    "warm": _tinted(WARM),
    "cold": _tinted(COLD),
}

STYLES |= {f"palette {number}": _turned(degrees) for number, degrees in enumerate(PALETTES, 1)}


def apply_style(name: str, rgb: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch 3"]:
    """Colours in [0, 1] in a style.

    Raises:
        ValueError: the style is unknown.
    """
    if name not in STYLES:
        raise ValueError(f"'{name}' is no style of the world; choose one of: {', '.join(STYLES)}.")
    return STYLES[name](rgb)
