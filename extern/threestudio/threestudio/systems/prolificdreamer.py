"""ProlificDreamer (Wang et al. 2023): text to a 3D scene by variational score distillation."""

from dataclasses import dataclass

import threestudio
from threestudio.systems.prompted import PromptedSystem


@threestudio.register("prolificdreamer-system")
class ProlificDreamer(PromptedSystem):
    """The first of ProlificDreamer's three stages, a radiance field.

    The guidance trains a second score beside the scene, so ``guidance`` belongs into the
    optimizer's groups; it is stored in the checkpoint, and only a training reads it.
    """

    @dataclass
    class Config(PromptedSystem.Config):
        stage: str = "coarse"
        """Upstream's label of the stage; only `coarse` (a radiance field) exists."""
        visualize_samples: bool = False
        """Not provided; true is refused."""

    cfg: Config

    def configure(self) -> None:
        """Build the scene.

        Raises:
            ValueError: for the stages that rasterise a mesh, and for ``visualize_samples``.
        """
        if self.cfg.stage != "coarse":
            raise ValueError(
                f"system.stage is {self.cfg.stage!r}; expected 'coarse', since the stages "
                "'geometry' and 'texture' rasterise a mesh with nvdiffrast, which this runtime "
                "does not provide. Export a mesh of the coarse stage with --export instead."
            )
        if self.cfg.visualize_samples:
            raise ValueError(
                "system.visualize_samples is true; expected false, since samples of the guidance's "
                "two models are not drawn. Set system.freq.guidance_eval with "
                "stable-diffusion-guidance to see what a model makes of the renders."
            )
        super().configure()
