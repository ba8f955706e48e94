"""The geometry's features as colour."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.networks import get_mlp
from threestudio.utils.ops import get_activation


@threestudio.register("no-material")
class NoMaterial(BaseMaterial):
    """Activates the features; a network comes between when the config describes one."""

    @dataclass
    class Config(BaseMaterial.Config):
        n_output_dims: int = 3
        """Colour channels."""
        color_activation: str = "sigmoid"
        """Activation that gives the colour."""
        input_feature_dims: int | None = None
        """Features that the network takes; used together with ``mlp_network_config``."""
        mlp_network_config: dict[str, Any] | None = None
        """A network from features to colour, or none."""
        requires_normal: bool = False
        """Ask the geometry for normals, for output only."""

    cfg: Config

    def configure(self) -> None:
        self.use_network = (
            self.cfg.input_feature_dims is not None and self.cfg.mlp_network_config is not None
        )
        if self.use_network:
            self.network = get_mlp(
                self.cfg.input_feature_dims, self.cfg.n_output_dims, self.cfg.mlp_network_config
            )
        self.requires_normal = self.cfg.requires_normal

    def forward(self, features: Float[Tensor, "*N Nf"], **kwargs: Any) -> Float[Tensor, "*N Nc"]:
        """Return colours; without a network the features must have ``n_output_dims`` channels."""
        activation = get_activation(self.cfg.color_activation)
        if self.use_network:
            flat = self.network(features.reshape(-1, features.shape[-1]))
            return activation(flat).view(*features.shape[:-1], self.cfg.n_output_dims)
        if features.shape[-1] != self.cfg.n_output_dims:
            raise ValueError(
                f"no-material got {features.shape[-1]} features; expected n_output_dims = "
                f"{self.cfg.n_output_dims}. Set system.geometry.n_feature_dims to the same number, "
                "or describe a network (input_feature_dims and mlp_network_config)."
            )
        return activation(features)

    def export(self, features: Float[Tensor, "*N Nf"], **kwargs: Any) -> dict[str, Tensor]:
        """Return the first three channels, clamped to [0, 1], as ``albedo``."""
        return {"albedo": self(features, **kwargs)[..., :3].clamp(0, 1)}
