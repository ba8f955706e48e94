"""Colour that depends on where a point is seen from."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.networks import get_encoding, get_mlp
from threestudio.utils.ops import get_activation


@threestudio.register("neural-radiance-material")
class NeuralRadianceMaterial(BaseMaterial):
    """A network from the features and the encoded viewing direction to colour, as in NeRF."""

    @dataclass
    class Config(BaseMaterial.Config):
        input_feature_dims: int = 8
        """Features of the geometry."""
        color_activation: str = "sigmoid"
        """Activation of the network's output."""
        dir_encoding_config: dict[str, Any] = field(
            default_factory=lambda: {"otype": "SphericalHarmonics", "degree": 3}
        )
        """Encoding of the direction, mapped from [-1, 1] to [0, 1]."""
        mlp_network_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP",
                "activation": "ReLU",
                "n_neurons": 16,
                "n_hidden_layers": 2,
            }
        )
        """The network; it takes the features first, then the encoded direction."""

    cfg: Config

    def configure(self) -> None:
        self.encoding = get_encoding(3, self.cfg.dir_encoding_config)
        self.n_input_dims = self.cfg.input_feature_dims + self.encoding.n_output_dims
        self.network = get_mlp(self.n_input_dims, 3, self.cfg.mlp_network_config)

    def forward(
        self,
        features: Float[Tensor, "*N Nf"],
        viewdirs: Float[Tensor, "*N 3"],
        **kwargs: Any,
    ) -> Float[Tensor, "*N 3"]:
        """Return colours.

        Args:
            features: of the geometry, ``input_feature_dims`` of them.
            viewdirs: unit directions from the camera to the points, in the world.

        Raises:
            ValueError: another number of features.
        """
        if features.shape[-1] != self.cfg.input_feature_dims:
            raise ValueError(
                f"neural-radiance-material got {features.shape[-1]} features; expected "
                f"input_feature_dims = {self.cfg.input_feature_dims}. Set "
                "system.geometry.n_feature_dims to the same number."
            )
        directions = self.encoding((viewdirs.reshape(-1, 3) + 1.0) / 2.0)
        inputs = torch.cat([features.reshape(-1, features.shape[-1]), directions], dim=-1)
        color = get_activation(self.cfg.color_activation)(self.network(inputs))
        return color.view(*features.shape[:-1], 3)
