"""One colour in every direction."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

import threestudio
from threestudio.models.background.base import AugmentedBackground


@threestudio.register("solid-color-background")
class SolidColorBackground(AugmentedBackground):
    """A flat background, fixed or learned."""

    @dataclass
    class Config(AugmentedBackground.Config):
        color: tuple[float, float, float] = (1.0, 1.0, 1.0)
        """The colour, in [0, 1]; one value per channel."""
        learned: bool = False
        """Train the colour."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        color = torch.tensor([float(value) for value in self.cfg.color])
        if color.numel() != self.cfg.n_output_dims:
            raise ValueError(
                f"color has {color.numel()} values; expected n_output_dims = "
                f"{self.cfg.n_output_dims}. Give one value per channel."
            )
        self.env_color: Float[Tensor, Nc]
        if self.cfg.learned:
            self.env_color = nn.Parameter(color)
        else:
            self.register_buffer("env_color", color)

    def color(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"]:
        """Return the one colour for every ray."""
        return self.env_color.to(dirs.dtype).expand(*dirs.shape[:-1], -1)
