"""Base of the geometries that are small networks on an encoding of position.

Shapes: ``*N`` any number of leading dimensions of points; ``Ne`` channels of the encoding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.geometry.field_gradient import (
    analytic_gradient,
    check_normal_type,
    finite_difference,
)
from threestudio.models.mlp import evaluate_together
from threestudio.models.networks import get_encoding, get_mlp


class EncodedGeometry(BaseImplicitGeometry):
    """An encoding, a network of the field on it, and those of features and predicted normals.

    A subclass builds the field's own network between ``configure`` and `_build_heads`.
    """

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        n_input_dims: int = 3
        """Coordinates of a point."""
        n_feature_dims: int = 3
        """Channels handed to the material; 0 builds no feature network."""
        pos_encoding_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "HashGrid",
                "n_levels": 16,
                "n_features_per_level": 2,
                "log2_hashmap_size": 19,
                "base_resolution": 16,
                "per_level_scale": 1.447269237440378,
            }
        )
        """Encoding of the position in [0, 1]^3."""
        mlp_network_config: dict[str, Any] = field(
            default_factory=lambda: {
                "otype": "VanillaMLP",
                "activation": "ReLU",
                "output_activation": "none",
                "n_neurons": 64,
                "n_hidden_layers": 1,
            }
        )
        """Networks of the field, of features and of predicted normals."""
        normal_type: str | None = "finite_difference"
        """finite_difference, finite_difference_laplacian, pred, analytic or None."""

    cfg: Config

    def configure(self) -> None:
        """Build the encoding.

        Raises:
            ValueError: ``normal_type`` is none of the known ones.
        """
        super().configure()
        check_normal_type(self.cfg.normal_type)
        self.encoding = get_encoding(self.cfg.n_input_dims, self.cfg.pos_encoding_config)

    def _network(self, n_outputs: int) -> nn.Module:
        return get_mlp(self.encoding.n_output_dims, n_outputs, self.cfg.mlp_network_config)

    def _build_heads(self) -> None:
        if self.cfg.n_feature_dims > 0:
            self.feature_network = self._network(self.cfg.n_feature_dims)
        if self.cfg.normal_type == "pred":
            self.normal_network = self._network(3)

    def _features(
        self, points: Float[Tensor, "*N 3"], encoded: Float[Tensor, "n_points Ne"]
    ) -> dict[str, Tensor]:
        """``features``, or nothing without a feature network."""
        if self.cfg.n_feature_dims == 0:
            return {}
        features = self.feature_network(encoded)
        return {"features": features.view(*points.shape[:-1], self.cfg.n_feature_dims)}

    def _field_and_features(
        self,
        network: nn.Module,
        points: Float[Tensor, "*N 3"],
        encoded: Float[Tensor, "n_points Ne"],
    ) -> tuple[Float[Tensor, "*N 1"], dict[str, Tensor]]:
        """What `network` makes of the encoding, and `_features`, in one pass where that is fast."""
        shape = points.shape[:-1]
        if self.cfg.n_feature_dims == 0:
            return network(encoded).view(*shape, 1), {}
        field, features = evaluate_together([network, self.feature_network], encoded)
        return field.view(*shape, 1), {"features": features.view(*shape, self.cfg.n_feature_dims)}

    def _predicted_normal(
        self, points: Float[Tensor, "*N 3"], encoded: Float[Tensor, "n_points Ne"]
    ) -> Float[Tensor, "*N 3"]:
        return self.normal_network(encoded).view(*points.shape[:-1], 3)

    def _slope(
        self,
        scalar_field: Callable[[Tensor], Tensor],
        points: Float[Tensor, "*N 3"],
        values: Float[Tensor, "*N 1"],
        eps: float,
        keeps_graph: bool,
    ) -> Float[Tensor, "*N 3"]:
        """The field's slope by autograd or, inside the box, by finite differences."""
        kind = self.cfg.normal_type
        if kind == "analytic":
            return analytic_gradient(values, points, keeps_graph)
        is_central = kind == "finite_difference_laplacian"
        return finite_difference(scalar_field, points, values, eps, is_central, self.cfg.radius)
