"""Time and view control of a frozen image model, each a word of its own, trained together."""

from __future__ import annotations

import threestudio

from .mapper_training import MapperTraining


@threestudio.register("time-view-mapper-system")
class TimeViewMapperSystem(MapperTraining):
    """Trains a TimeMapper and a ViewMapper in one prompt; see `MapperTraining`."""

    controls = ("time", "view")
