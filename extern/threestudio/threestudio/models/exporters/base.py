"""Base class of exporters."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.scene_parts import BorrowsSceneParts, SceneParts
from threestudio.utils.base import BaseObject


@dataclass
class ExporterOutput:
    """One file to write: the system calls ``save_<save_type>(save_name, **params)``."""

    save_name: str
    save_type: str
    params: dict[str, Any]


class Exporter(BorrowsSceneParts, BaseObject):
    """Turns a trained scene into files."""

    @dataclass
    class Config(BaseObject.Config):
        save_video: bool = False
        """Render the test views before exporting."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        self.sub_modules = SceneParts(geometry, material, background)

    def attach(self, system: Any) -> None:
        """Called once, before the views: for exporters that need more than the three parts."""

    def see_view(self, batch: dict[str, Any]) -> None:
        """Called with the first test view, which tells cameras and image size, or with all."""

    def __call__(self, *args: Any, **kwargs: Any) -> Iterable[ExporterOutput]:
        """Return the files to write; each is written before the next one is asked for."""
        raise NotImplementedError


@threestudio.register("dummy-exporter")
class DummyExporter(Exporter):
    """Exports nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[ExporterOutput]:
        return []
