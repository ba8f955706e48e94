"""Lambertian shading by one point light, with DreamFusion's random simplifications."""

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.materials.base import BaseMaterial
from threestudio.utils.ops import dot, get_activation
from threestudio.utils.rng import derive_seed

Shading = Literal["albedo", "textureless", "diffuse"]


@threestudio.register("diffuse-with-point-light-material")
class DiffuseWithPointLightMaterial(BaseMaterial):
    """colour = albedo (max(0, n . l) diffuse + ambient), DreamFusion eq. 2.

    While training a whole batch shows, by chance, the albedo alone, the shading of a white surface
    or both, so that neither texture nor shading can stand in for shape.
    """

    @dataclass
    class Config(BaseMaterial.Config):
        ambient_light_color: tuple[float, float, float] = (0.1, 0.1, 0.1)
        """Light from everywhere."""
        diffuse_light_color: tuple[float, float, float] = (0.9, 0.9, 0.9)
        """Light of the point light, at any distance."""
        ambient_only_steps: int = 1000
        """Steps with the albedo alone."""
        diffuse_prob: float = 0.75
        """Probability of any shading afterwards."""
        textureless_prob: float = 0.5
        """Probability, given shading, that the albedo is white."""
        albedo_activation: str = "sigmoid"
        """Activation of the features."""
        soft_shading: bool = False
        """Draw the share of the diffuse light in [0, 1) each step; the rest is ambient."""
        ambient_only_on_test: bool = False
        """Show the albedo alone in evaluation."""

    cfg: Config

    def configure(self) -> None:
        self.requires_normal = True
        self.ambient_light_color: Float[Tensor, 3]
        self.diffuse_light_color: Float[Tensor, 3]
        for name in ("ambient_light_color", "diffuse_light_color"):
            values = torch.tensor([float(value) for value in getattr(self.cfg, name)])
            self.register_buffer(name, values)
        self.ambient_only = False
        self._step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._step = global_step
        self.ambient_only = global_step < self.cfg.ambient_only_steps

    def forward(
        self,
        features: Float[Tensor, "*N Nf"],
        positions: Float[Tensor, "*N 3"],
        shading_normal: Float[Tensor, "*N 3"],
        light_positions: Float[Tensor, "*N 3"],
        ambient_ratio: float | None = None,
        shading: Shading | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "*N 3"]:
        """Return shaded colours.

        Args:
            features: at least three channels; the first three give the albedo.
            positions: world positions.
            shading_normal: unit normals, outward.
            light_positions: of each point's light, in the world.
            ambient_ratio: share of ambient light; overrides the configured colours.
            shading: which mode; drawn when None.

        Random: in training, from the role "shading" of the current step, shared by all ranks.
        """
        albedo = get_activation(self.cfg.albedo_activation)(features[..., :3])
        draw = random.Random(derive_seed("shading", self._step))
        soft, coin, textureless_coin = draw.random(), draw.random(), draw.random()
        diffuse, ambient = self.diffuse_light_color, self.ambient_light_color
        if ambient_ratio is None and self.training and self.cfg.soft_shading:
            ambient_ratio = 1.0 - soft
        if ambient_ratio is not None:
            diffuse = torch.full_like(diffuse, 1.0 - ambient_ratio)
            ambient = torch.full_like(ambient, ambient_ratio)

        if shading is None:
            shading = self._choose_shading(coin, textureless_coin)
        if shading == "albedo":
            # A zero keeps the normals in the graph, so that distributed training sees them used.
            return albedo + shading_normal.sum() * 0.0
        light_directions = F.normalize(light_positions - positions, dim=-1)
        light = dot(shading_normal, light_directions).clamp(min=0.0) * diffuse + ambient
        if shading == "textureless":
            return light.clamp(0.0, 1.0) + albedo * 0.0
        if shading == "diffuse":
            return (albedo * light).clamp(0.0, 1.0)
        raise ValueError(
            f"shading is {shading!r}; expected 'albedo', 'textureless', 'diffuse' or None."
        )

    def _choose_shading(self, coin: float, textureless_coin: float) -> Shading:
        if not self.training:
            return "albedo" if self.cfg.ambient_only_on_test else "diffuse"
        if self.ambient_only or coin > self.cfg.diffuse_prob:
            return "albedo"
        return "textureless" if textureless_coin < self.cfg.textureless_prob else "diffuse"

    def export(self, features: Float[Tensor, "*N Nf"], **kwargs: Any) -> dict[str, Tensor]:
        """Return the unshaded ``albedo``, clamped to [0, 1]."""
        albedo = get_activation(self.cfg.albedo_activation)(features[..., :3])
        return {"albedo": albedo.clamp(0.0, 1.0)}
