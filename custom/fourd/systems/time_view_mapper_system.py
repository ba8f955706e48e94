"""Time and view control of a frozen image model, each a word of its own, trained together."""

from __future__ import annotations

import threestudio

from custom.fourd.mappers.composition import Composition

from .mapper_training import MapperTraining


@threestudio.register("time-view-mapper-system")
class TimeViewMapperSystem(MapperTraining):
    """Trains a TimeMapper and a ViewMapper in one prompt; see `MapperTraining`.

    With ``compose.mode=joint_token`` it trains one mapper that is told both.
    """

    controls = ("time", "view")

    def controls_of(self, composition: Composition) -> tuple[str, ...]:
        return ("joint",) if composition.mode == "joint_token" else self.controls
