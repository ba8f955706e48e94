"""A density field on an encoding of position (and of time, where the encoding takes it)."""

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.geometry.base import (
    BaseGeometry,
    BaseImplicitGeometry,
    contract_to_unisphere,
)
from threestudio.models.networks import get_encoding, get_mlp
from threestudio.utils.ops import get_activation

NORMAL_TYPES = ("finite_difference", "finite_difference_laplacian", "pred", "analytic")
ANNEAL_KEYS = ("min_anneal_step", "max_anneal_step", "start_val", "end_val")


@threestudio.register("implicit-volume")
class ImplicitVolume(BaseImplicitGeometry):
    """density = activation(MLP(encoding(x)) + bias(x)); features come from a second MLP.

    The bias is a blob at the origin that gives the optimisation somewhere to begin:
    ``blob_magic3d`` scale (1 - |x| / std), ``blob_dreamfusion`` scale exp(-|x|^2 / 2 std^2).
    """

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        n_input_dims: int = 3
        """Coordinates of a point."""
        n_feature_dims: int = 3
        """Channels handed to the material; 0 builds no feature network."""
        density_activation: str | None = "softplus"
        """Activation of the biased density."""
        density_bias: float | str = "blob_magic3d"
        """blob_magic3d, blob_dreamfusion or a number."""
        density_blob_scale: float = 10.0
        """Height of the blob."""
        density_blob_std: float = 0.5
        """Width of the blob in world units."""
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
        """Networks of density, features and predicted normals."""
        normal_type: str | None = "finite_difference"
        """finite_difference, finite_difference_laplacian, pred, analytic or None."""
        finite_difference_normal_eps: float = 0.01
        """Step of the finite differences in world units."""
        isosurface_threshold: Any = 25.0
        """Density of the extracted surface, or "auto"."""
        anneal_density_blob_std_config: dict[str, Any] | None = None
        """min_anneal_step, max_anneal_step, start_val, end_val of density_blob_std; linear."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        if self.cfg.normal_type is not None and self.cfg.normal_type not in NORMAL_TYPES:
            raise ValueError(
                f"normal_type is {self.cfg.normal_type!r}; expected one of "
                f"{', '.join(NORMAL_TYPES)} or null."
            )
        self.density_blob_std = float(self.cfg.density_blob_std)
        self._check_anneal_config()
        self._anneal_step: int | None = None
        self.encoding = get_encoding(self.cfg.n_input_dims, self.cfg.pos_encoding_config)
        n_encoded = self.encoding.n_output_dims
        network_config = self.cfg.mlp_network_config
        self.density_network = get_mlp(n_encoded, 1, network_config)
        if self.cfg.n_feature_dims > 0:
            self.feature_network = get_mlp(n_encoded, self.cfg.n_feature_dims, network_config)
        if self.cfg.normal_type == "pred":
            self.normal_network = get_mlp(n_encoded, 3, network_config)
        self._encoding_takes_times = "frame_times" in inspect.signature(
            self.encoding.forward
        ).parameters
        inner = getattr(self.encoding, "encoding", self.encoding)
        self._encoding_displaces = "out_all" in inspect.signature(inner.forward).parameters

    @property
    def is_dynamic(self) -> bool:
        """Whether the encoding holds a part that moves with time and is not frozen as static."""
        return any(getattr(part, "static", True) is False for part in self.encoding.modules())

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the blob's width to its schedule's value at this step: no history enters.

        Evaluation of loaded weights runs at step 0; there the step of the weights stays in force.
        """
        if self.cfg.anneal_density_blob_std_config is None:
            return
        if not self.training and global_step == 0 and self._anneal_step is not None:
            return
        self._anneal_step = global_step
        self.density_blob_std = self._scheduled_blob_std(global_step)

    def _scheduled_blob_std(self, step: int) -> float:
        config = self.cfg.anneal_density_blob_std_config
        first, last, start, end = (float(config[key]) for key in ANNEAL_KEYS)
        progress = min(max((step - first) / max(last - first, 1.0), 0.0), 1.0)
        return start + (end - start) * progress

    def _check_anneal_config(self) -> None:
        config = self.cfg.anneal_density_blob_std_config
        if config is not None and set(config) != set(ANNEAL_KEYS):
            raise ValueError(
                f"anneal_density_blob_std_config has the keys {sorted(config)}; "
                f"expected exactly {', '.join(ANNEAL_KEYS)}."
            )

    def get_activated_density(
        self, points: Float[Tensor, "*N 3"], density: Float[Tensor, "*N 1"]
    ) -> tuple[Float[Tensor, "*N 1"], Float[Tensor, "*N 1"]]:
        """Return (biased network output, density); ``points`` are in world units."""
        bias = self.cfg.density_bias
        radius2 = None if not isinstance(bias, str) else points.square().sum(-1, keepdim=True)
        density_bias: float | Tensor
        if bias == "blob_dreamfusion":
            exponent = -0.5 * radius2 / self.density_blob_std**2
            density_bias = self.cfg.density_blob_scale * torch.exp(exponent)
        elif bias == "blob_magic3d":
            # The root's slope is infinite at the origin, where analytic normals may be asked for.
            distance = radius2.clamp(min=1e-20).sqrt()
            density_bias = self.cfg.density_blob_scale * (1 - distance / self.density_blob_std)
        elif isinstance(bias, (int, float)):
            density_bias = float(bias)
        else:
            raise ValueError(
                f"density_bias is {bias!r}; expected blob_magic3d, blob_dreamfusion or a number."
            )
        raw_density = density + density_bias
        return raw_density, get_activation(self.cfg.density_activation)(raw_density)

    def _encode(
        self,
        points: Float[Tensor, "*N 3"],
        frame_times: Float[Tensor, "*N"] | None,
        **kwargs: Any,
    ) -> Float[Tensor, "n_points Ne"]:
        unit = contract_to_unisphere(points, self.bbox, self.unbounded)
        flat = unit.reshape(-1, self.cfg.n_input_dims)
        if frame_times is None or not self._encoding_takes_times:
            return self.encoding(flat, **kwargs)
        return self.encoding(flat, frame_times=frame_times.reshape(-1, 1), **kwargs)

    def _encode_with_displacement(
        self, points: Float[Tensor, "*N 3"], frame_times: Float[Tensor, "*N"] | None
    ) -> tuple[Float[Tensor, "n_points Ne"], Float[Tensor, "n_points 3"] | None]:
        if not self._encoding_displaces:
            return self._encode(points, frame_times), None
        return self._encode(points, frame_times, out_all=True)

    def forward(
        self,
        points: Float[Tensor, "*N 3"],
        output_normal: bool = False,
        frame_times: Float[Tensor, "*N"] | None = None,
    ) -> dict[str, Tensor]:
        """Evaluate density, features and, on request, normals.

        Args:
            points: world positions; outside the box the encoding is undefined (a bounded scene).
            output_normal: add ``normal`` and ``shading_normal``.
            frame_times: scene time in [0, 1] of each point; None is the encoding's own default.

        Returns:
            density ``[*N, 1]`` per world unit; features ``[*N, Nf]``; normal and shading_normal
            ``[*N, 3]``, unit length, pointing out of the object (down the density); displacement
            ``[*N, 3]`` where the encoding moves points, in units of the unit cube.
        """
        grad_enabled = torch.is_grad_enabled()
        if output_normal and self.cfg.normal_type == "analytic":
            # Evaluation runs without gradients, but the normal is one.
            torch.set_grad_enabled(True)
            points = points if points.requires_grad else points.detach().requires_grad_(True)
        try:
            encoded, displacement = self._encode_with_displacement(points, frame_times)
            density = self.density_network(encoded).view(*points.shape[:-1], 1)
            _, density = self.get_activated_density(points, density)
            output = {"density": density}
            if displacement is not None:
                output["displacement"] = displacement.view(*points.shape[:-1], 3)
            if self.cfg.n_feature_dims > 0:
                features = self.feature_network(encoded)
                output["features"] = features.view(*points.shape[:-1], self.cfg.n_feature_dims)
            if output_normal and self.cfg.normal_type is not None:
                normal = self._normal(points, density, encoded, frame_times, grad_enabled)
                output.update(normal=normal, shading_normal=normal)
        finally:
            torch.set_grad_enabled(grad_enabled)
        if not grad_enabled:
            output = {key: value.detach() for key, value in output.items()}
        return output

    def _normal(
        self,
        points: Float[Tensor, "*N 3"],
        density: Float[Tensor, "*N 1"],
        encoded: Float[Tensor, "n_points Ne"],
        frame_times: Float[Tensor, "*N"] | None,
        grad_enabled: bool,
    ) -> Float[Tensor, "*N 3"]:
        kind = self.cfg.normal_type
        if kind == "pred":
            normal = self.normal_network(encoded).view(*points.shape[:-1], 3)
        elif kind == "analytic":
            normal = -torch.autograd.grad(
                density,
                points,
                grad_outputs=torch.ones_like(density),
                create_graph=grad_enabled,
                retain_graph=True,
            )[0]
        else:
            normal = self._finite_difference(points, density, frame_times)
        return F.normalize(normal, dim=-1)

    def _finite_difference(
        self,
        points: Float[Tensor, "*N 3"],
        density: Float[Tensor, "*N 1"],
        frame_times: Float[Tensor, "*N"] | None,
    ) -> Float[Tensor, "*N 3"]:
        eps = self.cfg.finite_difference_normal_eps
        offsets = torch.eye(3, dtype=points.dtype, device=points.device) * eps
        central = self.cfg.normal_type == "finite_difference_laplacian"
        if central:
            offsets = torch.cat([offsets, -offsets])
        shifted = points[..., None, :] + offsets
        shifted = shifted.clamp(-self.cfg.radius, self.cfg.radius)
        times = None
        if frame_times is not None:
            times = frame_times.reshape(*points.shape[:-1], 1).expand(shifted.shape[:-1])
        values = self.forward_density(shifted, times)[..., 0]
        if central:
            return -0.5 * (values[..., :3] - values[..., 3:]) / eps
        return -(values - density) / eps

    def forward_density(
        self, points: Float[Tensor, "*N 3"], frame_times: Float[Tensor, "*N"] | None = None
    ) -> Float[Tensor, "*N 1"]:
        """Return the density alone; arguments as in `forward`."""
        encoded = self._encode(points, frame_times)
        density = self.density_network(encoded).view(*points.shape[:-1], 1)
        return self.get_activated_density(points, density)[1]

    def forward_field(
        self, points: Float[Tensor, "*N 3"], frame_times: Float[Tensor, "*N"] | None = None
    ) -> tuple[Float[Tensor, "*N 1"], None]:
        """Return (density, None): the field to extract; its grid does not deform."""
        return self.forward_density(points, frame_times), None

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """Return threshold - density: negative inside."""
        return -(field - threshold)

    def export(
        self,
        points: Float[Tensor, "*N 3"],
        frame_times: Float[Tensor, "*N"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the features at surface points, or nothing without a feature network."""
        if self.cfg.n_feature_dims == 0:
            return {}
        features = self.feature_network(self._encode(points, frame_times))
        return {"features": features.view(*points.shape[:-1], self.cfg.n_feature_dims)}

    @staticmethod
    def create_from(
        other: BaseGeometry, cfg: dict | None = None, copy_net: bool = True, **kwargs: Any
    ) -> "ImplicitVolume":
        """Copy another implicit volume: encoding and density always, features with ``copy_net``."""
        if not isinstance(other, ImplicitVolume):
            raise TypeError(
                f"implicit-volume cannot be made from a {type(other).__name__}; expected another "
                "implicit-volume in system.geometry_convert_from."
            )
        instance = ImplicitVolume(cfg, **kwargs)
        instance.encoding.load_state_dict(other.encoding.state_dict())
        instance.density_network.load_state_dict(other.density_network.state_dict())
        same_features = instance.cfg.n_feature_dims == other.cfg.n_feature_dims
        if copy_net and instance.cfg.n_feature_dims > 0 and same_features:
            instance.feature_network.load_state_dict(other.feature_network.state_dict())
        return instance
