"""DreamFusion (Poole et al. 2022): text to a 3D scene by score distillation."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.prompted import PromptedSystem


@threestudio.register("dreamfusion-system")
class DreamFusion(PromptedSystem):
    """Any guidance that gives one loss for one batch of images, with the usual regularisers."""

    @dataclass
    class Config(PromptedSystem.Config):
        """No further keys."""

    cfg: Config
