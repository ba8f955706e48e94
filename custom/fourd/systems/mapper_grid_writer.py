"""Generates time x view grids and writes them: a sheet, its cells, and a video for each sweep.

Legend: t times (columns of a sheet), v views (its rows), h x w pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from threestudio.utils.slug import safe_folder_name
from torch import Tensor

from custom.fourd.mappers.inference import TimeViewControls
from custom.fourd.mappers.prompt_templates import fill_template
from custom.fourd.metrics.image_quality import psnr

from .mapper_grid import GridOptions, GridPlan

PICTURE = {"type": "rgb", "kwargs": {"data_format": "HWC"}}


class GridWriter:
    """Generates grids and writes them through a system's savers.

    Args:
        system: with savers and a step.
        controls: what generates.
        options: see `GridOptions`.
    """

    def __init__(self, system: Any, controls: TimeViewControls, options: GridOptions) -> None:
        self.system, self.controls, self.options = system, controls, options
        self._folder: str | None = None

    @property
    def folder(self) -> str:
        """Folder of this test's grids below the save folder; none that exists is written into."""
        if self._folder is None:
            name, number = f"it{self.system.true_global_step}-grid", 1
            self._folder = name
            while (Path(self.system.get_save_dir()) / self._folder).exists():
                number += 1
                self._folder = f"{name}-{number}"
        return self._folder

    def write(self, plan: GridPlan) -> list[dict[str, Any]]:
        """Generate and write a grid for each prompt; returns what is to know of them."""
        found = []
        for place, wish in enumerate(self.options.prompts):
            prompt = fill_template(str(wish), plan.caption)
            images = self.controls.generate(
                plan.image, plan.times, plan.views, prompt, self.options.seed, plan.source_time,
                plan.source_view, self.options.batch_size,
            )  # fmt: skip
            slug, scene = _folder_name(prompt or "no prompt"), _folder_name(plan.name)
            # Truth shows the caption's scene, not an edited one.
            is_caption = prompt == plan.caption
            found.append(
                self._write(f"{self.folder}/{scene}/{place}-{slug}", plan, prompt, images,
                            plan.truth if is_caption else None)
            )  # fmt: skip
        return found

    def _write(
        self, folder: str, plan: GridPlan, prompt: str, images: Tensor, truth: Tensor | None
    ) -> dict[str, Any]:
        save, step = self.system, self.system.true_global_step
        n_times, n_views = images.shape[:2]
        rows = [_sheet_row(images[:, v], None if truth is None else truth[:, v])
                for v in range(n_views)]  # fmt: skip
        save.save_image_grid(f"{folder}/sheet.png", rows, name="grid", step=step)
        for t in range(n_times):
            for v in range(n_views):
                pair = [images[t, v], *([] if truth is None else [truth[t, v]])]
                cell = [{**PICTURE, "img": image} for image in pair]
                save.save_image_grid(f"{folder}/cells/v{v:02d}-t{t:02d}.png", [cell])
        for v in range(n_views if n_times > 1 else 0):
            self._video(folder, f"time-at-view{v:02d}", rf"v{v:02d}-t(\d+)\.png")
        for t in range(n_times if n_views > 1 else 0):
            self._video(folder, f"view-at-time{t:02d}", rf"v(\d+)-t{t:02d}\.png")
        facts = {**plan.facts(), "prompt": prompt, "seed": self.options.seed, "folder": folder,
                 "psnr": None}  # fmt: skip
        if truth is not None:
            flat = images.flatten(0, 1), truth.flatten(0, 1)
            facts["psnr"] = float(psnr(*flat).mean())
        save.save_json(f"{folder}/grid.json", facts)
        return facts

    def _video(self, folder: str, name: str, matcher: str) -> None:
        self.system.save_img_sequence(
            f"{folder}/{name}", f"{folder}/cells", matcher, save_format="mp4", fps=self.options.fps
        )


def _folder_name(text: str) -> str:
    return safe_folder_name(text).replace(" ", "_")


def _sheet_row(images: Tensor, truth: Tensor | None) -> list[dict[str, Any]]:
    """Generated cells of one view, then, behind a white column, the true ones."""
    row = [{**PICTURE, "img": image} for image in images]
    if truth is None:
        return row
    white = {**PICTURE, "img": torch.ones_like(images[0])}
    return [*row, white, *({**PICTURE, "img": image} for image in truth)]
