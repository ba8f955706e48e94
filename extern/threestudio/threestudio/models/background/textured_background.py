"""A background painted on a sphere."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.utils.ops import get_activation
from threestudio.utils.rng import generator


@threestudio.register("textured-background")
class TexturedBackground(BaseBackground):
    """A trained picture of all directions: angle from +z across, azimuth down.

    Its first and last rows meet at azimuth 180 degrees, where neighbours are not blended.
    """

    @dataclass
    class Config(BaseBackground.Config):
        n_output_dims: int = 3
        """Colour channels."""
        height: int = 64
        """Texels over a full turn of azimuth."""
        width: int = 64
        """Texels from straight up (+z) to straight down."""
        color_activation: str = "sigmoid"
        """Activation of the texels."""

    cfg: Config

    def configure(self) -> None:
        """Draw the texels from N(0, 1), role "texture-init".

        Raises:
            ValueError: a size is not positive.
        """
        height, width = self.cfg.height, self.cfg.width
        if min(height, width) < 1:
            raise ValueError(
                f"the background's height is {height} and its width {width}; expected at least "
                "one texel each."
            )
        shape = (1, self.cfg.n_output_dims, height, width)
        self.texture: Float[Tensor, "1 Nc h w"]
        self.texture = nn.Parameter(torch.randn(shape, generator=generator("texture-init", 0)))

    def forward(self, dirs: Float[Tensor, "*B 3"]) -> Float[Tensor, "*B Nc"]:
        """Return the colour along unit directions, texels blended bilinearly."""
        x, y, z = dirs.reshape(-1, 3).unbind(-1)
        from_up = torch.atan2((x * x + y * y).sqrt(), z) / torch.pi
        azimuth = torch.atan2(y, x) / (2 * torch.pi) + 0.5
        places = torch.stack([from_up, azimuth], dim=-1) * 2.0 - 1.0
        texels = F.grid_sample(
            self.texture,
            places.view(1, -1, 1, 2).to(self.texture),
            mode="bilinear",
            padding_mode="reflection",
            align_corners=False,
        )
        color = texels[0, :, :, 0].transpose(0, 1).view(*dirs.shape[:-1], -1)
        return get_activation(self.cfg.color_activation)(color).to(dirs.dtype)
