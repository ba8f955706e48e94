"""A signed distance on an encoding of position."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.geometry.base import contract_to_unisphere
from threestudio.models.geometry.encoded_geometry import EncodedGeometry
from threestudio.models.geometry.field_gradient import differentiable
from threestudio.models.geometry.shape_distance import shape_distance
from threestudio.utils.misc import broadcast
from threestudio.utils.rng import generator

INIT_LEARNING_RATE = 1e-3


@threestudio.register("implicit-sdf")
class ImplicitSDF(EncodedGeometry):
    """sdf = MLP(encoding(x)) + bias(x), negative inside; features come from a second MLP.

    The bias, or `initialize_shape`, gives the optimisation a sphere or an ellipsoid to begin with.
    """

    @dataclass
    class Config(EncodedGeometry.Config):
        finite_difference_normal_eps: Any = 0.01
        """Step of the finite differences in world units, or "progressive": the cell of the finest
        active level of a ProgressiveBandHashGrid (Neuralangelo)."""
        shape_init: str | None = None
        """What `initialize_shape` fits: "sphere" or "ellipsoid"; None fits nothing."""
        shape_init_params: Any = None
        """Radius of the sphere, or three half-axes of the ellipsoid, world units."""
        shape_init_mesh_up: str = "+z"
        """Accepted for upstream's configs; meshes are not fitted."""
        shape_init_mesh_front: str = "+x"
        """The same."""
        force_shape_init: bool = False
        """Fit although weights were loaded."""
        shape_init_steps: int = 1000
        """Optimizer steps of the fit."""
        shape_init_points: int = 10000
        """Points of each step, uniform in the box."""
        sdf_bias: float | str = 0.0
        """A number, or "sphere" or "ellipsoid" whose distance is added."""
        sdf_bias_params: Any = None
        """As ``shape_init_params``."""
        isosurface_remove_outliers: bool = False
        """Drop small connected parts; a distance rarely has any."""

    cfg: Config

    def configure(self) -> None:
        """Build encoding and networks.

        Raises:
            ValueError: a value of the configuration cannot work.
        """
        super().configure()
        self.sdf_network = self._network(1)
        self._build_heads()
        # What the shapes cannot be is said now, not after the priors were loaded.
        probe = self.bbox.new_zeros(1, 3)
        self.get_shifted_sdf(probe, probe[:, :1])
        if self.cfg.shape_init is not None:
            shape_distance(self.cfg.shape_init, self.cfg.shape_init_params, probe, "shape_init")
        self.finite_difference_normal_eps: float = 0.0
        self.update_step(0, 0)

    # Step-dependent state and the start

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the step of the finite differences; a function of the step alone."""
        eps = self.cfg.finite_difference_normal_eps
        if isinstance(eps, (int, float)):
            self.finite_difference_normal_eps = float(eps)
            return
        config = self.cfg.pos_encoding_config
        if eps != "progressive" or config.get("otype") != "ProgressiveBandHashGrid":
            raise ValueError(
                f"finite_difference_normal_eps is {eps!r} with the encoding "
                f"{config.get('otype')!r}; expected a number, or 'progressive' with a "
                "ProgressiveBandHashGrid."
            )
        grown = max(global_step - config["start_step"], 0) // config["update_steps"]
        level = min(config["start_level"] + grown, config["n_levels"])
        cells = config["base_resolution"] * config["per_level_scale"] ** (level - 1)
        self.finite_difference_normal_eps = 2.0 * self.cfg.radius / cells

    def initialize_shape(self) -> None:
        """Fit the distance to ``shape_init``, on the device where the parameters are.

        Does nothing without one, or after ``weights`` were loaded unless ``force_shape_init``. All
        ranks fit the same points and then take rank 0's parameters.

        Random: the points, role "shape-init", step = step of the fit.
        """
        shape = self.cfg.shape_init
        if shape is None or (self.cfg.weights is not None and not self.cfg.force_shape_init):
            return
        if self.cfg.sdf_bias != 0.0:
            threestudio.warn(
                "shape_init and sdf_bias are both set; the bias stays on top of the fitted shape."
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=INIT_LEARNING_RATE)
        with torch.enable_grad():
            for step in range(self.cfg.shape_init_steps):
                stream = generator("shape-init", step)
                unit = torch.rand(self.cfg.shape_init_points, 3, generator=stream).to(self.bbox)
                points = self.bbox[0] + unit * (self.bbox[1] - self.bbox[0])
                wanted = shape_distance(shape, self.cfg.shape_init_params, points, "shape_init")
                loss = F.mse_loss(self.forward_sdf(points), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        optimizer.zero_grad()
        for parameter in self.parameters():
            broadcast(parameter.data, src=0)

    def get_shifted_sdf(
        self, points: Float[Tensor, "*N 3"], sdf: Float[Tensor, "*N 1"]
    ) -> Float[Tensor, "*N 1"]:
        """Return the network's distance with the bias at world points added."""
        bias = self.cfg.sdf_bias
        if isinstance(bias, (int, float)):
            return sdf + float(bias)
        return sdf + shape_distance(bias, self.cfg.sdf_bias_params, points, "sdf_bias")

    # Evaluation

    def _encode(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "n_points Ne"]:
        unit = contract_to_unisphere(points, self.bbox, self.unbounded)
        return self.encoding(unit.reshape(-1, self.cfg.n_input_dims))

    def _sdf(self, points: Tensor, encoded: Tensor) -> Float[Tensor, "*N 1"]:
        raw = self.sdf_network(encoded).view(*points.shape[:-1], 1)
        return self.get_shifted_sdf(points, raw)

    def forward(
        self, points: Float[Tensor, "*N 3"], output_normal: bool = False
    ) -> dict[str, Tensor]:
        """Evaluate distance, features and, on request, normals.

        Args:
            points: world positions; outside the box the encoding is undefined (a bounded scene).
            output_normal: add ``normal``, ``shading_normal`` and ``sdf_grad``.

        Returns:
            sdf ``[*N, 1]`` in world units, negative inside; features ``[*N, Nf]``; sdf_grad
            ``[*N, 3]`` as found, and normal and shading_normal, the same at unit length, pointing
            out of the object.
        """
        keeps_graph = torch.is_grad_enabled()
        is_analytic = output_normal and self.cfg.normal_type == "analytic"
        with differentiable(points, is_analytic) as points:
            encoded = self._encode(points)
            sdf = self._sdf(points, encoded)
            output = {"sdf": sdf, **self._features(points, encoded)}
            if output_normal and self.cfg.normal_type is not None:
                if self.cfg.normal_type == "pred":
                    gradient = self._predicted_normal(points, encoded)
                else:
                    eps = self.finite_difference_normal_eps
                    gradient = self._slope(self.forward_sdf, points, sdf, eps, keeps_graph)
                normal = F.normalize(gradient, dim=-1)
                output.update(normal=normal, shading_normal=normal, sdf_grad=gradient)
        if not keeps_graph:
            output = {key: value.detach() for key, value in output.items()}
        return output

    def forward_sdf(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 1"]:
        """Return the distance alone."""
        return self._sdf(points, self._encode(points))

    def forward_field(self, points: Float[Tensor, "*N 3"]) -> tuple[Float[Tensor, "*N 1"], None]:
        """Return (distance, None): the field to extract; its grid does not deform."""
        return self.forward_sdf(points), None

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """Return distance - threshold: negative inside."""
        return field - threshold

    def export(self, points: Float[Tensor, "*N 3"], **kwargs: Any) -> dict[str, Tensor]:
        """Return the features at surface points, or nothing without a feature network."""
        return self._features(points, self._encode(points))
