"""What renderers and exporters borrow: geometry, material and background.

They belong to the system, which trains and saves them, so they are deliberately not submodules of
those that borrow them.
"""

from dataclasses import dataclass

from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial


@dataclass
class SceneParts:
    """The parts of a scene."""

    geometry: BaseImplicitGeometry
    material: BaseMaterial
    background: BaseBackground


class BorrowsSceneParts:
    """Mixin that gives the parts in ``sub_modules``, a `SceneParts`, under their own names."""

    sub_modules: SceneParts

    @property
    def geometry(self) -> BaseImplicitGeometry:
        return self.sub_modules.geometry

    @property
    def material(self) -> BaseMaterial:
        return self.sub_modules.material

    @property
    def background(self) -> BaseBackground:
        return self.sub_modules.background
