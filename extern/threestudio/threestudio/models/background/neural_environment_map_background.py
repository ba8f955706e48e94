"""A background learned as a function of direction."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.background.base import AugmentedBackground
from threestudio.models.networks import get_encoding, get_mlp
from threestudio.utils.ops import get_activation


@threestudio.register("neural-environment-map-background")
class NeuralEnvironmentMapBackground(AugmentedBackground):
    """Spherical harmonics of the direction through a small network."""

    @dataclass
    class Config(AugmentedBackground.Config):
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
                "output_activation": "none",
                "n_neurons": 16,
                "n_hidden_layers": 2,
            }
        )
        """The network."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.encoding = get_encoding(3, self.cfg.dir_encoding_config)
        self.network = get_mlp(
            self.encoding.n_output_dims, self.cfg.n_output_dims, self.cfg.mlp_network_config
        )

    def color(self, dirs: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W Nc"]:
        """Return the network's colour along unit directions."""
        unit = (dirs.reshape(-1, 3) + 1.0) / 2.0
        color = self.network(self.encoding(unit))
        color = color.view(*dirs.shape[:-1], self.cfg.n_output_dims)
        return get_activation(self.cfg.color_activation)(color).to(dirs.dtype)
