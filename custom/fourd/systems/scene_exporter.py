"""A trained scene as files that other programs open: `scene-exporter`.

`python launch.py --config CONFIG --export resume=CKPT` writes, into `save/it{N}-export/`:

| format | file | what |
|---|---|---|
| mp4, gif | `scene.mp4`, `scene.gif` | a camera path while time goes on |
| sheet | `scene-sheet.png` | views in rows, times in columns |
| html | `scene.html` | one offline page with sliders for time and view |
| glb | `scene.glb` | a mesh per time with vertex colours, animated (glTF 2.0) |
| obj | `scene.obj` | the mesh at one time, with vertex colours |
| scene | `scene.safetensors` | the scene with its config, for `load_scene` |
| cameras | `transforms.json`, `frames/` | the path's poses and frames, as nerfstudio reads them |

No diffusion model is loaded. An earlier export is never overwritten: its folder's name gets a
number. A scene at rest gives a turntable, a page without time and a mesh that stands still.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import threestudio
import torch
from jaxtyping import Float
from threestudio.launcher.progress import ProgressDisplay
from threestudio.models.exporters.base import Exporter, ExporterOutput
from threestudio.utils.config import config_to_primitive
from threestudio.utils.misc import get_rank
from torch import Tensor

from custom.fourd.data.camera_path import CameraPath, camera_path, transforms_json
from custom.fourd.ops.camera import camera_from_orbit
from custom.fourd.renderers.scene import Scene
from custom.fourd.renderers.scene_file import recipe_of
from custom.fourd.renderers.scene_mesh import SceneMeshes, scene_meshes

from .exports.animated_glb import animated_glb
from .exports.clips import contact_sheet, write_gif, write_mp4, write_png
from .exports.page import scene_page
from .exports.settings import MESH_FORMATS, SceneExportConfig, check_export_config

TURNTABLE_VIEWS = 48  # of the page of a scene at rest
FRONT_VIEW = {"elevation_deg": 15.0, "distance": 3.0, "fovy_deg": 40.0, "height": 256, "width": 256}


@threestudio.register("scene-exporter")
class SceneExporter(Exporter):
    """Videos, a page, meshes, poses and the scene itself; see the table of this module."""

    @dataclass
    class Config(SceneExportConfig):
        pass

    cfg: Config

    def configure(self, *args: Any, **kwargs: Any) -> None:
        super().configure(*args, **kwargs)
        check_export_config(self.cfg)
        self.scene: Scene | None = None
        self._view: dict[str, Any] = {}
        self._batch_moves = False

    # What the system tells

    def attach(self, system: Any) -> None:
        """Take the renderer, and the config and step that the scene file records."""
        prompt = (system.cfg.get("prompt_processor") or {}).get("prompt", "")
        recipe = recipe_of(
            config_to_primitive(system.cfg), system.true_global_step, prompt or "", system.profile
        )
        self.scene = Scene(self.geometry, self.material, self.background, system.renderer, recipe)

    def see_view(self, batch: dict[str, Any]) -> None:
        """Take cameras and image size of the first test view as defaults."""
        if self._view:
            return
        self._batch_moves = batch.get("frame_times") is not None
        self._view = {
            "elevation_deg": float(batch["elevation"].reshape(-1)[0]),
            "distance": float(batch["camera_distances"].reshape(-1)[0]),
            "fovy_deg": float(torch.rad2deg(batch["fovy"].reshape(-1)[0])),
            "height": int(batch["height"]),
            "width": int(batch["width"]),
        }

    def _setting(self, name: str) -> Any:
        chosen = getattr(self.cfg, name)
        return self._view.get(name, FRONT_VIEW[name]) if chosen is None else chosen

    @property
    def _camera(self) -> dict[str, float]:
        return {name: self._setting(name) for name in ("elevation_deg", "distance", "fovy_deg")}

    @property
    def _moves(self) -> bool:
        """Whether the scene has a time: by its geometry, or else by the test views."""
        return bool(getattr(self.geometry, "is_dynamic", self._batch_moves))

    @property
    def _seconds(self) -> float:
        return self.cfg.n_frames / self.cfg.fps

    # Writing

    def __call__(self) -> Iterator[ExporterOutput]:
        """Make and return one file after the other; see the table of this module.

        Raises:
            ValueError: meshes alone were asked for, and nothing reaches the threshold. Beside other
                formats that is a warning, which names the range of the field and what to set.
        """
        if get_rank() != 0:
            return
        if self.scene is None:
            raise ValueError(
                "scene-exporter needs the system's renderer; expected a system that calls "
                "exporter.attach(system), as BaseLift3DSystem does."
            )
        makers = {
            ("scene",): self._scene_file,
            ("mp4", "gif", "cameras"): self._clip_files,
            ("sheet", "html"): self._grid_files,
            MESH_FORMATS: self._mesh_files,
        }
        for names, make in makers.items():
            wanted = [name for name in names if name in self.cfg.formats]
            if wanted:
                started = time.monotonic()
                yield from make(wanted)
                threestudio.info(
                    "exported %s in %.1f s", ", ".join(wanted), time.monotonic() - started
                )

    def _file(self, suffix: str, write: Any) -> ExporterOutput:
        name = f"{self.cfg.save_name}{suffix}"
        return ExporterOutput(name, "with_writer", {"write": write})

    def _scene_file(self, wanted: Sequence[str]) -> Iterator[ExporterOutput]:
        yield self._file(".safetensors", self.scene.save)

    def _clip_files(self, wanted: Sequence[str]) -> Iterator[ExporterOutput]:
        path = camera_path(
            self.cfg.path, self.cfg.n_frames, azimuth_deg=self.cfg.azimuth_deg, **self._camera
        )
        frames = self._render("the path", path.c2w, path.fovy, path.frame_times)
        writers = {"mp4": write_mp4, "gif": write_gif}
        for name in wanted:
            if name in writers:
                write = partial(writers[name], frames=frames, fps=self.cfg.fps)
                yield self._file(f".{name}", write)
        if "cameras" in wanted:
            yield from self._pose_files(path, frames)

    def _pose_files(self, path: CameraPath, frames: np.ndarray) -> Iterator[ExporterOutput]:
        names = [f"frames/{index:04d}.png" for index in range(len(frames))]
        for name, frame in zip(names, frames, strict=True):
            yield ExporterOutput(name, "with_writer", {"write": partial(write_png, frame=frame)})
        payload = transforms_json(path, *frames.shape[1:3], names)
        if not self._moves:
            for frame in payload["frames"]:
                del frame["time"]
        yield ExporterOutput("transforms.json", "json", {"payload": payload})

    def _grid_files(self, wanted: Sequence[str]) -> Iterator[ExporterOutput]:
        """The page's grid of views and times, of which the sheet shows a part."""
        cfg, moves = self.cfg, self._moves
        if "html" in wanted:
            n_views = cfg.page_views if moves else max(cfg.page_views, TURNTABLE_VIEWS)
            n_times = cfg.page_times if moves else 1
        else:
            n_views = cfg.sheet_views if moves else cfg.sheet_views * cfg.sheet_times
            n_times = cfg.sheet_times if moves else 1
        azimuths = [cfg.azimuth_deg + 360.0 / n_views * index for index in range(n_views)]
        times = _even_times(n_times)
        frames = self._render_grid(azimuths, times)
        if "sheet" in wanted:
            yield self._sheet(frames, azimuths, times)
        if "html" in wanted:
            recipe = self.scene.recipe
            facts = ["a moving 3D scene" if moves else "a 3D scene", f"{recipe.global_step} steps"]
            if recipe.profile:
                facts.append(f"profile {recipe.profile}")
            text = scene_page(
                frames, [a % 360 for a in azimuths], times, self._seconds, recipe.prompt, facts
            )
            yield self._file(".html", lambda path: Path(path).write_text(text, encoding="utf-8"))

    def _sheet(
        self, frames: np.ndarray, azimuths: Sequence[float], times: Sequence[float]
    ) -> ExporterOutput:
        cfg = self.cfg
        if self._moves:
            rows = _spread(len(azimuths), cfg.sheet_views, wraps=True)
            columns = _spread(len(times), cfg.sheet_times)
            tiles = frames[rows][:, columns]
            row_labels = [f"{azimuths[row] % 360:.0f}\u00b0" for row in rows]
            column_labels = [f"t = {times[column]:.2f}" for column in columns]
        else:  # a scene at rest has views only, row after row
            views = _spread(len(azimuths), cfg.sheet_views * cfg.sheet_times, wraps=True)
            per_row = -(-len(views) // cfg.sheet_views)
            views = views[: len(views) // per_row * per_row]
            tiles = frames[views, 0].reshape(-1, per_row, *frames.shape[2:])
            row_labels = [f"{azimuths[view] % 360:.0f}\u00b0" for view in views[::per_row]]
            column_labels = [""] * per_row
        sheet = contact_sheet(tiles, row_labels, column_labels)
        return self._file("-sheet.png", partial(write_png, frame=sheet))

    def _mesh_files(self, wanted: Sequence[str]) -> Iterator[ExporterOutput]:
        times = self._mesh_times(wanted)
        with self._progress("meshes", len(times or [0])) as report:
            found = scene_meshes(
                self.scene, times, self.cfg.mesh_resolution, self.cfg.mesh_threshold, report
            )
        if found.is_empty:
            sentence = f"no mesh for {' and '.join(wanted)}: {found.advice()}"
            if set(self.cfg.formats) <= set(MESH_FORMATS):
                raise ValueError(sentence)
            threestudio.warn(sentence)
            return
        self._report_meshes(found)
        meshes = list(found.meshes)
        single = meshes.pop() if "obj" in wanted and times is not None else meshes[0]
        if "glb" in wanted and any(mesh is not None for mesh in meshes):
            recipe = self.scene.recipe
            facts = {"prompt": recipe.prompt, "threshold": found.threshold,
                     "times": times[: len(meshes)] if times else [0.0]}  # fmt: skip
            data = animated_glb(meshes, self._seconds, facts)
            yield self._file(".glb", lambda path: Path(path).write_bytes(data))
        if "obj" in wanted and single is None:
            threestudio.warn("no mesh for obj at time %g: %s", self.cfg.obj_time, found.advice())
        elif "obj" in wanted:
            params = {"mesh": single, "save_vertex_color": True}
            yield ExporterOutput(f"{self.cfg.save_name}.obj", "obj", params)

    def _mesh_times(self, wanted: Sequence[str]) -> list[float] | None:
        """Times of the animation, then that of the single mesh; None for a scene at rest."""
        if not self._moves:
            return None
        times = _even_times(self.cfg.mesh_times) if "glb" in wanted else []
        return times + ([self.cfg.obj_time] if "obj" in wanted else [])

    def _report_meshes(self, found: SceneMeshes) -> None:
        counts = [0 if mesh is None else len(mesh.v_pos) for mesh in found.meshes]
        threestudio.info(
            "meshes: %d with %d to %d vertices, at threshold %.4g of a field in [%.4g, %.4g]",
            len(counts), min(counts), max(counts), found.threshold, *found.field_range,
        )  # fmt: skip
        if min(counts) == 0:
            threestudio.warn(
                "%d of %d times have no surface at threshold %.4g; a lower "
                "system.exporter.mesh_threshold may show one.",
                counts.count(0), len(counts), found.threshold,
            )  # fmt: skip

    # Rendering

    def _render_grid(self, azimuths: Sequence[float], times: Sequence[float]) -> np.ndarray:
        shape = len(azimuths), len(times)
        azimuth = torch.tensor(azimuths).repeat_interleave(shape[1])
        camera = self._camera
        c2w = camera_from_orbit(
            torch.full_like(azimuth, camera["elevation_deg"]), azimuth, camera["distance"]
        )
        fovy = torch.deg2rad(torch.full_like(azimuth, camera["fovy_deg"]))
        frames = self._render("views and times", c2w, fovy, torch.tensor(times).repeat(shape[0]))
        return frames.reshape(*shape, *frames.shape[1:])

    def _render(
        self,
        title: str,
        c2w: Float[Tensor, "n 4 4"],
        fovy: Float[Tensor, "n"],
        frame_times: Float[Tensor, "n"],
    ) -> np.ndarray:
        """Images as uint8 [n, h, w, 3], one after the other, so that memory holds one view."""
        height, width = self._setting("height"), self._setting("width")
        color = self.cfg.background
        background = None if color is None else torch.tensor([float(c) for c in color])
        frames = np.empty((len(c2w), height, width, 3), np.uint8)
        with self._progress(title, len(c2w)) as report:
            for index in range(len(c2w)):
                one = slice(index, index + 1)
                images = self.scene.render(
                    c2w[one], fovy[one], height, width,
                    frame_times[one] if self._moves else None, background,
                )  # fmt: skip
                frames[index] = (images.rgb[0] * 255 + 0.5).to(torch.uint8).cpu().numpy()
                report(index + 1)
        return frames

    def _progress(self, title: str, total: int) -> _Progress:
        return _Progress(title, total)


class _Progress:
    """Shows how far a part of the export is; gives a function to report with."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total
        self.display = ProgressDisplay()

    def __enter__(self) -> Any:
        self.display.begin("exporting", self.total)
        return self._report

    def _report(self, done: int) -> None:
        if self.display.is_due() or (done == self.total and self.display.live):
            self.display.show(f"{self.title} {done}/{self.total}", done)

    def __exit__(self, *_: object) -> None:
        self.display.end()


def _even_times(count: int) -> list[float]:
    """Times evenly over [0, 1], ends included; 0 alone."""
    return [index / (count - 1) for index in range(count)] if count > 1 else [0.0]


def _spread(available: int, wanted: int, wraps: bool = False) -> list[int]:
    """Indices spread evenly over what there is; without ``wraps`` both ends are among them."""
    count = min(available, wanted)
    if wraps:
        return [index * available // count for index in range(count)]
    return [round(index * (available - 1) / max(count - 1, 1)) for index in range(count)]
