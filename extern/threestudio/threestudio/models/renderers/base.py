"""Base classes of renderers."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.scene_parts import BorrowsSceneParts, SceneParts
from threestudio.utils.base import BaseModule


class Renderer(BorrowsSceneParts, BaseModule):
    """Turns rays (or cameras) into images of a geometry with a material before a background."""

    @dataclass
    class Config(BaseModule.Config):
        radius: float = 1.0
        """Half-width of the scene's box in world units."""
        samples_per_axis: int = 1
        """Rays per axis of a pixel in images of a finished scene, which are their means; 1 casts
        one through the centre. For who makes rays from cameras: a renderer takes them as given."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        self.sub_modules = SceneParts(geometry, material, background)
        if self.cfg.samples_per_axis < 1:
            raise ValueError(
                f"renderer.samples_per_axis is {self.cfg.samples_per_axis}; expected 1 or more "
                "rays per axis of a pixel."
            )
        radius = float(self.cfg.radius)
        self.bbox: Float[Tensor, "2 3"]
        self.register_buffer("bbox", torch.tensor([[-radius] * 3, [radius] * 3]))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Render; see the subclass for arguments and outputs."""
        raise NotImplementedError

    def set_geometry(self, geometry: BaseImplicitGeometry) -> None:
        """Render another geometry from now on."""
        self.sub_modules.geometry = geometry

    def set_material(self, material: BaseMaterial) -> None:
        """Use another material from now on."""
        self.sub_modules.material = material

    def set_background(self, background: BaseBackground) -> None:
        """Use another background from now on."""
        self.sub_modules.background = background


class VolumeRenderer(Renderer):
    """A renderer of rays."""


class DeferredVolumeRenderer(VolumeRenderer):
    """A renderer of rays whose colours are made from an image of features."""


class Rasterizer(Renderer):
    """A renderer of meshes, from model-view-projection matrices."""
