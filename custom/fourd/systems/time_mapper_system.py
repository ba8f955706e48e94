"""The time control of a frozen image model, taught by pairs of a moving scene."""

from __future__ import annotations

import threestudio

from .mapper_training import MapperTraining


@threestudio.register("time-mapper-system")
class TimeMapperSystem(MapperTraining):
    """Trains a TimeMapper; see `MapperTraining`."""

    controls = ("time",)
