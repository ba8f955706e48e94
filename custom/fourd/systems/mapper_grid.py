"""Time x view grids of a test: every cell generated from one image, beside the truth where known.

Legend: t times (columns of a sheet), v views (its rows), h x w pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor

from custom.fourd.data.pair_batch import lay_over
from custom.fourd.data.pair_cells import orbit_cameras, wrapped_deg
from custom.fourd.data.video_cells import fitted_cell
from custom.fourd.data.video_frames import read_picture
from custom.fourd.mappers.inference import TimeViewControls
from custom.fourd.mappers.prompt_templates import checked_templates

from .mapper_scores import spread
from .mapper_truth import SceneTruth

_SAME_TIME, _SAME_ANGLE_DEG = 1e-4, 1e-2


@dataclass
class GridOptions:
    """Keys of `system.grid`."""

    n_times: int = 8
    """columns: so many of a scene's times, evenly; 0 writes no grid"""
    n_views: int = 4
    """rows: so many of a scene's azimuths, evenly"""
    times: list | None = None
    """scene times in [0, 1] in place of n_times"""
    azimuths_deg: list | None = None
    """azimuths in degrees in place of n_views"""
    source_time: float = 0.0
    """scene time of the image that all cells are made from"""
    source_azimuth_deg: float = 0.0
    """its azimuth in degrees"""
    image: str | None = None
    """a picture to start from in place of the scenes; nothing is scored then"""
    caption: str = ""
    """what that picture shows, for the prompts"""
    prompts: list = field(default_factory=lambda: ["{caption}"])
    """captions, each for a grid of its own, such as "{caption} made of wood"; they are put into
    system.prompt_template"""
    n_scenes: int = 1
    """at most so many scenes get grids"""
    seed: int = 0
    """of the noise that all cells start from"""
    batch_size: int = 16
    """cells at a time"""
    fps: int = 8
    """frames per second of the videos"""


@dataclass(frozen=True)
class GridPlan:
    """A grid before it is generated."""

    name: str
    caption: str
    image: Float[Tensor, "h w 3"]
    source_time: float
    source_view: dict[str, Tensor]
    times: Float[Tensor, "t"]
    views: dict[str, Tensor]
    truth: Float[Tensor, "t v h w 3"] | None
    """where every cell of it is known"""

    def facts(self) -> dict[str, Any]:
        """What a reader of the files needs to know."""
        return {
            "scene": self.name,
            "caption": self.caption,
            "source_time": self.source_time,
            "source_azimuth_deg": float(self.source_view["azimuth"][0]),
            "times": [round(value, 6) for value in self.times.tolist()],
            "azimuths_deg": [round(value, 4) for value in self.views["azimuth"].tolist()],
            "elevation_deg": float(self.source_view["elevation"][0]),
        }


def check_options(options: GridOptions) -> GridOptions:
    """Refuse options that cannot work.

    Raises:
        ValueError: naming the key.
    """
    for key in ("n_times", "n_views", "n_scenes"):
        if getattr(options, key) < 0:
            raise ValueError(f"system.grid.{key} is {getattr(options, key)}; expected 0 or more.")
    checked_templates(list(options.prompts), "system.grid.prompts")
    for value in [*(options.times or []), options.source_time]:
        if not 0 <= float(value) <= 1:
            raise ValueError(f"system.grid has the time {value}; expected scene times in [0, 1].")
    if options.image is not None and not Path(options.image).expanduser().is_file():
        raise ValueError(
            f"system.grid.image is {options.image!r}, and there is no such file; expected a "
            "picture."
        )
    return options


def planned_grids(
    options: GridOptions, truths: Sequence[SceneTruth], cfg: Any, controls: TimeViewControls
) -> Iterator[GridPlan]:
    """The grids of a test, in order; those of scenes, or the one of a picture.

    Args:
        truths: of the scenes. cfg: of the pair source: the size of images, the cameras of pictures.
        controls: what is not controlled has one row, or one column.
    """
    if options.image is not None:
        yield _of_picture(options, cfg, controls)
        return
    for truth in list(truths)[: options.n_scenes]:
        yield _of_scene(options, truth, controls)


def _of_picture(options: GridOptions, cfg: Any, controls: TimeViewControls) -> GridPlan:
    path = Path(str(options.image)).expanduser()
    cell = torch.from_numpy(fitted_cell(read_picture(path), cfg.height, cfg.width, cfg.fit))
    image, _ = lay_over(cell[None], torch.ones(1, 3))
    times, azimuths = _wished(options, controls, None, options.source_azimuth_deg)
    elevation = _first(cfg.elevations_deg)

    def cameras(angles: Sequence[float]) -> dict[str, Tensor]:
        found = orbit_cameras([elevation], angles, cfg.camera_distance, cfg.fovy_deg)
        return found.select(torch.arange(len(found)))

    return GridPlan(
        path.stem, options.caption, image[0], options.source_time,
        cameras([options.source_azimuth_deg]), torch.tensor(times), cameras(azimuths), None,
    )  # fmt: skip


def _of_scene(options: GridOptions, truth: SceneTruth, controls: TimeViewControls) -> GridPlan:
    source = truth.source
    time_id = int((source.frame_times - options.source_time).abs().argmin())
    gaps = wrapped_deg(source.cameras.azimuth - options.source_azimuth_deg).abs()
    camera_id = int(gaps.argmin())
    camera = source.cameras.select(torch.tensor([camera_id]))
    times, azimuths = _wished(options, controls, truth, float(camera["azimuth"][0]), camera_id)
    if not controls.follows_time:
        times = [float(source.frame_times[time_id])]
    image, _ = truth.images([(time_id, camera_id)])
    true = _true_grid(truth, camera_id, times, azimuths)
    return GridPlan(
        source.scene_id, source.caption, image[0], float(source.frame_times[time_id]), camera,
        torch.tensor(times), _turned(camera, azimuths), true,
    )  # fmt: skip


def _wished(
    options: GridOptions,
    controls: TimeViewControls,
    truth: SceneTruth | None,
    azimuth_deg: float,
    camera_id: int = 0,
) -> tuple[list[float], list[float]]:
    """Times and azimuths of a grid."""
    times = [k / options.n_times for k in range(options.n_times)]
    azimuths = [azimuth_deg + 360.0 * k / options.n_views for k in range(options.n_views)]
    if truth is not None:
        level = truth.level_cameras(camera_id)
        times = spread(truth.source.frame_times.tolist(), options.n_times)
        if len(level) > 1:
            azimuths = spread(truth.source.cameras.azimuth[level].tolist(), options.n_views)
    if options.times is not None:
        times = [float(value) for value in options.times]
    if options.azimuths_deg is not None:
        azimuths = [float(value) for value in options.azimuths_deg]
    if not controls.follows_time:
        times = [options.source_time]
    if not controls.follows_view:
        azimuths = [azimuth_deg]
    return times, azimuths


def _turned(camera: Mapping[str, Tensor], azimuths_deg: Sequence[float]) -> dict[str, Tensor]:
    """A camera at other azimuths."""
    made = orbit_cameras(
        [float(camera["elevation"][0])],
        azimuths_deg,
        float(camera["radius"][0]),
        float(torch.rad2deg(camera["fovy"][0])),
    )
    return made.select(torch.arange(len(made)))


def _true_grid(
    truth: SceneTruth, camera_id: int, times: Sequence[float], azimuths: Sequence[float]
) -> Tensor | None:
    source, level = truth.source, truth.level_cameras(camera_id)
    time_ids = [_place(source.frame_times - time, _SAME_TIME) for time in times]
    angles = source.cameras.azimuth[level]
    view_ids = [_place(wrapped_deg(angles - angle), _SAME_ANGLE_DEG) for angle in azimuths]
    if None in time_ids or None in view_ids:
        return None
    images, _ = truth.images([(t, level[v]) for t in time_ids for v in view_ids])
    return images.unflatten(0, (len(times), len(azimuths)))


def _place(differences: Tensor, least: float) -> int | None:
    place = int(differences.abs().argmin())
    return place if float(differences[place].abs()) <= least else None


def _first(value: Any) -> float:
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return float(plain[0] if isinstance(plain, (list, tuple)) else plain)
