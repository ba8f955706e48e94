"""Features as colour in the first three channels, and as they are in the others."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import get_activation


@threestudio.register("hybrid-rgb-latent-material")
class HybridRGBLatentMaterial(BaseMaterial):
    """Colours beside latents: three activated channels, then the rest untouched."""

    @dataclass
    class Config(BaseMaterial.Config):
        n_output_dims: int = 3
        """Channels in all, at least 3."""
        color_activation: str = "sigmoid"
        """Activation of the first three channels."""
        requires_normal: bool = True
        """Ask the geometry for normals, for output only."""

    cfg: Config

    def configure(self) -> None:
        self.requires_normal = self.cfg.requires_normal

    def forward(self, features: Float[Tensor, "*N Nc"], **kwargs: Any) -> Float[Tensor, "*N Nc"]:
        """Return the channels; the features must have ``n_output_dims`` of them.

        Raises:
            ValueError: another number of features.
        """
        if features.shape[-1] != self.cfg.n_output_dims:
            raise ValueError(
                f"hybrid-rgb-latent-material got {features.shape[-1]} features; expected "
                f"n_output_dims = {self.cfg.n_output_dims}. Set system.geometry.n_feature_dims to "
                "the same number."
            )
        color = get_activation(self.cfg.color_activation)(features[..., :3])
        return torch.cat([color, features[..., 3:]], dim=-1)

    def export(self, features: Float[Tensor, "*N Nc"], **kwargs: Any) -> dict[str, Tensor]:
        """Return the colour channels, clamped to [0, 1], as ``albedo``."""
        return {"albedo": self(features)[..., :3].clamp(0.0, 1.0)}
