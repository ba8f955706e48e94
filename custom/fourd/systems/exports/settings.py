"""What `scene-exporter` can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from threestudio.models.exporters.base import Exporter
from threestudio.suggest import did_you_mean

from custom.fourd.data.camera_path import PATHS

FORMATS = ("scene", "mp4", "gif", "cameras", "sheet", "html", "glb", "obj")
"""In the order of writing: what is quick and precious comes first."""
MESH_FORMATS = ("glb", "obj")


@dataclass
class SceneExportConfig(Exporter.Config):
    """Keys of `scene-exporter`."""

    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    """What to write, of mp4, gif, sheet, html, glb, obj, scene, cameras."""
    save_name: str = "scene"
    """Stem of the files."""
    path: str = "orbit"
    """Of the videos and poses: "orbit", "fixed" or "motion_smooth", see `data.camera_path`."""
    n_frames: int = 48
    """Frames of the path; motion_smooth takes the next multiple of 8, less 4."""
    fps: int = 15
    """Frames per second; n_frames / fps is also how long the page and the mesh play."""
    azimuth_deg: float = 0.0
    """Where the path begins; 0 is the front."""
    elevation_deg: float | None = None
    """Of all cameras; null takes that of the test views."""
    distance: float | None = None
    """Of all cameras from the origin, in scene units; null takes that of the test views."""
    fovy_deg: float | None = None
    """Vertical field of view; null takes that of the test views."""
    height: int | None = None
    """Of all images in pixels; null takes that of the test views."""
    width: int | None = None
    """Of all images in pixels; null takes that of the test views."""
    background: Any = field(default_factory=lambda: [1.0, 1.0, 1.0])
    """Colour behind the scene, in [0, 1]; null takes the scene's own background."""
    page_views: int = 12
    """Views of the page around the scene; one of a scene at rest has at least 48."""
    page_times: int = 16
    """Scene times of the page, evenly over [0, 1], ends included."""
    sheet_views: int = 4
    """Rows of the contact sheet."""
    sheet_times: int = 8
    """Columns of the contact sheet."""
    mesh_times: int = 16
    """Scene times of the animated mesh, evenly over [0, 1], ends included."""
    mesh_resolution: int = 48
    """Cells of the meshes along the longest side of where the scene ever is."""
    mesh_threshold: float | None = None
    """Level of the surface; null takes the density that best separates full from empty."""
    obj_time: float = 0.0
    """Scene time in [0, 1] of the single mesh."""


def check_export_config(cfg: SceneExportConfig) -> None:
    """Check every key that has a range.

    Raises:
        ValueError: naming the key, its value and what was expected.
    """
    unknown = [name for name in cfg.formats if name not in FORMATS]
    if unknown or not cfg.formats:
        what = f"has {unknown[0]!r}" if unknown else "is empty"
        hint = did_you_mean(str(unknown[0]), FORMATS) if unknown else ""
        raise ValueError(
            f"system.exporter.formats {what}; expected some of {', '.join(FORMATS)}.{hint}"
        )
    if cfg.path not in PATHS:
        raise ValueError(
            f"system.exporter.path is {cfg.path!r}; expected one of {', '.join(PATHS)}."
        )
    counts = ("n_frames", "fps", "page_views", "page_times", "sheet_views", "sheet_times",
              "mesh_times")  # fmt: skip
    for name in (*counts, "height", "width"):
        value = getattr(cfg, name)
        if value is not None and value < 1:
            raise ValueError(f"system.exporter.{name} is {value}; expected at least 1.")
    if not 0.0 <= cfg.obj_time <= 1.0:
        raise ValueError(
            f"system.exporter.obj_time is {cfg.obj_time}; expected a scene time in [0, 1]."
        )
    color = cfg.background
    if color is not None and (len(color) != 3 or not all(0 <= c <= 1 for c in color)):
        raise ValueError(
            f"system.exporter.background is {color}; expected three numbers in [0, 1], or null "
            "for the scene's own background."
        )
