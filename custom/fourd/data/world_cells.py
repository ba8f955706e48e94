"""Cells of a scene of the procedural world, by the exact renderer."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..world.grammar import parse_caption
from ..world.motion import returns_to_start
from ..world.render import composite_layers, render_layers
from .pair_cells import CellSource, OrbitCameras, cell_bytes


class WorldCells(CellSource):
    """The true images of a caption; a cell is within half of 1/255 of the exact renderer.

    Args:
        caption: a sentence of the world.
        scene_id, frame_times, cameras, height, width: see `CellSource`.

    Raises:
        CaptionError: (a ValueError) the sentence is not of the world.
    """

    def __init__(
        self,
        caption: str,
        scene_id: str,
        frame_times: Float[Tensor, "t"],
        cameras: OrbitCameras,
        height: int,
        width: int,
    ) -> None:
        self.world_scene = parse_caption(caption)
        super().__init__(scene_id, caption, frame_times, cameras, height, width)
        self.loops = returns_to_start(self.world_scene)

    def read_cell(self, time_id: int, camera_id: int) -> UInt8[Tensor, "h w 4"]:
        """Render one cell."""
        place = slice(camera_id, camera_id + 1)
        # Colour and alpha alone: `render` would trace once more, for depth and normals.
        cover, shade = render_layers(
            self.world_scene,
            self.cameras.c2w[place],
            self.cameras.fovy[place],
            self.height,
            self.width,
            self.frame_times[time_id : time_id + 1],
        )
        colour, alpha = composite_layers(self.world_scene, cover, shade, torch.zeros(3))
        return cell_bytes(colour[0], alpha[0])
