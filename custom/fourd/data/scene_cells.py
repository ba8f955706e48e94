"""Cells of a trained scene, rendered when they are asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from threestudio.utils.misc import get_device
from torch import Tensor

from ..renderers.scene import Scene, load_scene
from .pair_cells import CellSource, OrbitCameras, cell_bytes


class SceneCells(CellSource):
    """Renders of a checkpoint or an exported scene file, without the scene's own background.

    Args:
        path: what `load_scene` reads. The caption is that of the words that the scene was made
            from, unless another is set before it is prepared.
        scene_id, frame_times, cameras, height, width: see `CellSource`.
    """

    def __init__(
        self,
        path: Path,
        scene_id: str,
        frame_times: Float[Tensor, "t"],
        cameras: OrbitCameras,
        height: int,
        width: int,
    ) -> None:
        super().__init__(scene_id, "", frame_times, cameras, height, width)
        self.path = path
        self.scene: Scene | None = None

    def prepare(self) -> None:
        """Load the scene.

        Raises:
            ValueError: the file is damaged, unsafe, or carries no config; see `load_scene`.
        """
        self.scene = load_scene(self.path, device=get_device())
        recipe = self.scene.recipe
        self.caption = self.caption or ("" if recipe is None else recipe.prompt)
        super().prepare()

    def read_cell(self, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Render one cell by itself, so that no other cell of a batch can touch its last bit."""
        place = slice(camera_id, camera_id + 1)
        images = self.scene.render(
            self.cameras.c2w[place],
            self.cameras.fovy[place],
            self.height,
            self.width,
            self.frame_times[time_id : time_id + 1],
            background=torch.zeros(3),
        )
        return cell_bytes(images.rgb[0], images.alpha[0])
