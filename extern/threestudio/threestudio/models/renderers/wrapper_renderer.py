"""Base of the renderers that give pieces of their images to another renderer."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.base import VolumeRenderer
from threestudio.models.scene_parts import SceneParts


class WrapperRenderer(VolumeRenderer):
    """A renderer of rays over another one, ``base_renderer``, whose box and parts are its own."""

    @dataclass
    class Config(VolumeRenderer.Config):
        base_renderer_type: str = ""
        """Registered name of the renderer that renders the pieces."""
        base_renderer: dict = field(default_factory=dict)
        """Its configuration."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        """Build the base renderer, which has the box and the parts.

        Raises:
            ValueError: ``base_renderer_type`` names none.
        """
        if not self.cfg.base_renderer_type:
            raise ValueError(
                "base_renderer_type is empty; expected a renderer's name, such as "
                "'nerf-volume-renderer'."
            )
        # `Updateable` finds it by its name, so its occupancy needs no call from here.
        self.base_renderer = threestudio.find(self.cfg.base_renderer_type)(
            self.base_config(), geometry=geometry, material=material, background=background
        )

    def base_config(self) -> dict[str, Any]:
        """Return the configuration that the base renderer is built with."""
        return self.cfg.base_renderer

    @property
    def sub_modules(self) -> SceneParts:
        """Geometry, material and background, which the base renderer borrows."""
        return self.base_renderer.sub_modules

    @property
    def bbox(self) -> Float[Tensor, "2 3"]:
        """The scene's box."""
        return self.base_renderer.bbox
