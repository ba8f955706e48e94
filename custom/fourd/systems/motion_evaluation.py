"""Evaluation of a moving scene: a fixed grid of cameras and times, against the world's truth.

Legend: v views at equally spaced azimuths, t times from 0 to 1, both ends included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.metrics.motion import best_static_psnr, clip_psnr, compare_motions
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.renderers.scene import Scene
from custom.fourd.world.grammar import WorldScene
from custom.fourd.world.render import render

from .world_evaluation import TRUTH_SAMPLES_PER_AXIS

IMAGES_AT_ONCE = 4


@dataclass(frozen=True)
class ViewTimeGrid:
    """Cameras that stand still on one circle, each filming the whole clip."""

    azimuths_deg: Sequence[float]
    n_times: int
    size_px: int
    elevation_deg: float = 15.0
    distance: float = 3.0
    fovy_deg: float = 40.0

    @classmethod
    def around(cls, n_azimuths: int, n_times: int, size_px: int, **camera: float) -> ViewTimeGrid:
        """Azimuths a quarter of their spacing off the front, so that none is one of symmetry.

        Raises:
            ValueError: a count cannot work.
        """
        for name, count, least in (
            ("azimuths", n_azimuths, 1), ("times", n_times, 2), ("pixels", size_px, 1)
        ):  # fmt: skip
            if count < least:
                raise ValueError(f"the grid has {count} {name}; expected at least {least}.")
        azimuths = tuple(360 / n_azimuths * (index + 0.25) for index in range(n_azimuths))
        return cls(azimuths, n_times, size_px, **camera)

    @property
    def shape(self) -> tuple[int, int]:
        """Views and times."""
        return len(self.azimuths_deg), self.n_times

    def cameras(
        self,
    ) -> tuple[Float[Tensor, "n 4 4"], Float[Tensor, "n"], Float[Tensor, "n"]]:
        """c2w, fovy in radians and scene time of all n = v * t images, view by view."""
        azimuths = torch.tensor(self.azimuths_deg).repeat_interleave(self.n_times)
        elevations = torch.full_like(azimuths, self.elevation_deg)
        c2w = camera_from_orbit(elevations, azimuths, self.distance)
        fovy = torch.full_like(azimuths, math.radians(self.fovy_deg))
        times = torch.linspace(0, 1, self.n_times).repeat(len(self.azimuths_deg))
        return c2w, fovy, times


@dataclass
class Clips:
    """Images of a grid over white, in [0, 1], on the CPU."""

    rgb: Float[Tensor, "v t h w 3"]
    alpha: Float[Tensor, "v t h w 1"]


def film(scene: Scene | WorldScene, grid: ViewTimeGrid) -> Clips:
    """The clips of a trained scene, or of the world's true one."""
    c2w, fovy, times = grid.cameras()
    white = torch.ones(3)
    rgb, alpha = [], []
    for first in range(0, len(c2w), IMAGES_AT_ONCE):
        part = slice(first, first + IMAGES_AT_ONCE)
        where = (c2w[part], fovy[part], grid.size_px, grid.size_px, times[part])
        if isinstance(scene, WorldScene):
            images = render(scene, *where, samples_per_axis=TRUTH_SAMPLES_PER_AXIS)
        else:
            images = scene.render(*where, background=white)
        rgb.append(images.rgb.cpu())
        alpha.append(images.alpha.cpu())
    return Clips(*(torch.cat(parts).unflatten(0, grid.shape) for parts in (rgb, alpha)))


def motion_words(scene: WorldScene) -> list[str]:
    """The motions of a scene, each once, in the order of its objects."""
    return list(dict.fromkeys(item.motion for item in scene.objects if item.motion))


def motion_metrics(scene: WorldScene, clips: Clips, truth: Clips) -> dict[str, Any]:
    """Figures of a moving scene; see `custom.fourd.metrics.motion` for what they mean.

    Returns:
        `psnr_grid` and `psnr_best_static`, means over the grid in dB; `motion`, by motion word
        `correlation` and `amplitude_ratio`; `motion_correlation` and `motion_amplitude_ratio`,
        means over the words. Null where the words name no motion.
    """
    found = compare_motions(
        motion_words(scene), clips.rgb, clips.alpha, truth.rgb, truth.alpha
    )
    words = {
        word: {
            "correlation": _known(agreement.correlation),
            "amplitude_ratio": _known(agreement.amplitude_ratio),
        }
        for word, agreement in found.items()
    }
    return {
        "psnr_grid": float(clip_psnr(clips.rgb, truth.rgb).mean()),
        "psnr_best_static": float(best_static_psnr(truth.rgb).mean()),
        "motion": words,
        **{
            f"motion_{name}": _mean([values[name] for values in words.values()])
            for name in ("correlation", "amplitude_ratio")
        },
    }


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
