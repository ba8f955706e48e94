"""A density field on an encoding of position (and of time, where the encoding takes it)."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.geometry.base import BaseGeometry, contract_to_unisphere
from threestudio.models.geometry.encoded_geometry import EncodedGeometry
from threestudio.models.geometry.field_gradient import differentiable
from threestudio.utils.ops import get_activation

ANNEAL_KEYS = ("min_anneal_step", "max_anneal_step", "start_val", "end_val")


@threestudio.register("implicit-volume")
class ImplicitVolume(EncodedGeometry):
    """density = activation(MLP(encoding(x)) + bias(x)); features come from a second MLP.

    The bias is a blob at the origin that gives the optimisation somewhere to begin:
    ``blob_magic3d`` scale (1 - |x| / std), ``blob_dreamfusion`` scale exp(-|x|^2 / 2 std^2).
    """

    @dataclass
    class Config(EncodedGeometry.Config):
        density_activation: str | None = "softplus"
        """Activation of the biased density."""
        density_bias: float | str = "blob_magic3d"
        """blob_magic3d, blob_dreamfusion or a number."""
        density_blob_scale: float = 10.0
        """Height of the blob."""
        density_blob_std: float = 0.5
        """Width of the blob in world units."""
        finite_difference_normal_eps: float = 0.01
        """Step of the finite differences in world units."""
        isosurface_threshold: Any = 25.0
        """Density of the extracted surface, or "auto"."""
        anneal_density_blob_std_config: dict[str, Any] | None = None
        """min_anneal_step, max_anneal_step, start_val, end_val of density_blob_std; linear."""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        self.density_blob_std = float(self.cfg.density_blob_std)
        self._check_anneal_config()
        self._anneal_step: int | None = None
        self.density_network = self._network(1)
        self._build_heads()
        self._encoding_takes_times = (
            "frame_times" in inspect.signature(self.encoding.forward).parameters
        )
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
        keeps_graph = torch.is_grad_enabled()
        is_analytic = output_normal and self.cfg.normal_type == "analytic"
        with differentiable(points, is_analytic) as points:
            encoded, displacement = self._encode_with_displacement(points, frame_times)
            raw, features = self._field_and_features(self.density_network, points, encoded)
            _, density = self.get_activated_density(points, raw)
            output = {"density": density, **features}
            if displacement is not None:
                output["displacement"] = displacement.view(*points.shape[:-1], 3)
            if output_normal and self.cfg.normal_type is not None:
                normal = self._normal(points, density, encoded, frame_times, keeps_graph)
                output.update(normal=normal, shading_normal=normal)
        if not keeps_graph:
            output = {key: value.detach() for key, value in output.items()}
        return output

    def _normal(
        self,
        points: Float[Tensor, "*N 3"],
        density: Float[Tensor, "*N 1"],
        encoded: Float[Tensor, "n_points Ne"],
        frame_times: Float[Tensor, "*N"] | None,
        keeps_graph: bool,
    ) -> Float[Tensor, "*N 3"]:
        if self.cfg.normal_type == "pred":
            return F.normalize(self._predicted_normal(points, encoded), dim=-1)

        def density_at(moved: Float[Tensor, "*N k 3"]) -> Float[Tensor, "*N k 1"]:
            times = None
            if frame_times is not None:
                times = frame_times.reshape(*points.shape[:-1], 1).expand(moved.shape[:-1])
            return self.forward_density(moved, times)

        eps = self.cfg.finite_difference_normal_eps
        return F.normalize(-self._slope(density_at, points, density, eps, keeps_graph), dim=-1)

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
        return self._features(points, self._encode(points, frame_times))

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
