"""Base class of materials: what colour a point shows."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from threestudio.utils.base import BaseModule


class BaseMaterial(BaseModule):
    """Turns the geometry's output at points into colours.

    Called as ``material(viewdirs=, positions=, light_positions=, **geometry_output, **batch)``; the
    batch's keys come in training only.
    """

    @dataclass
    class Config(BaseModule.Config):
        pass

    cfg: Config
    requires_normal: bool = False
    requires_tangent: bool = False

    def configure(self) -> None:
        pass

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return colours, one row per point."""
        raise NotImplementedError

    def export(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return texture maps by name (``albedo``, ...); nothing by default."""
        return {}
