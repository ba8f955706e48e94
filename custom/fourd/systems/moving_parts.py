"""The parameters that hold a scene's motion, and in which steps they and the others train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class MovingParts:
    """The encodings of a geometry that depend on scene time, except those that are static.

    Args:
        geometry: its encodings follow the contract: `static` and `set_temp_param_grad`.
    """

    def __init__(self, geometry: Any) -> None:
        modules = geometry.modules() if isinstance(geometry, nn.Module) else ()
        self.encodings = [
            module
            for module in modules
            if hasattr(module, "set_temp_param_grad") and getattr(module, "static", True) is False
        ]

    def __bool__(self) -> bool:
        return bool(self.encodings)

    def train(self, moves: bool, is_video: bool) -> None:
        """Let the parameters of motion train in this step, or not.

        A parameter that requires no gradient gets none, so the optimizer passes it over: neither
        decay nor momentum moves it.

        Args:
            moves: they train.
            is_video: the step shows a clip; upstream's encodings may read it.
        """
        for encoding in self.encodings:
            encoding.is_video = is_video
            encoding.set_temp_param_grad(moves)

    def freeze_others(self, parts: Iterable[Any]) -> None:
        """Freeze all parameters of a scene but those of motion, which train from now on.

        Raises:
            ValueError: nothing in the geometry moves, so nothing would be left to train.
        """
        if not self.encodings:
            raise ValueError(
                "system.freeze_static_modules is true, but no part of the geometry moves; expected "
                "an encoding over space and time that is not static. Set "
                "system.geometry.pos_encoding_config.static=false, or freeze_static_modules=false."
            )
        for part in parts:
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.train(moves=True, is_video=True)
