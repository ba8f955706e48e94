"""The view control of a frozen image model, taught by pairs of a moving scene."""

from __future__ import annotations

import threestudio

from .mapper_training import MapperTraining


@threestudio.register("view-mapper-system")
class ViewMapperSystem(MapperTraining):
    """Trains a ViewMapper; see `MapperTraining`."""

    controls = ("view",)
