"""A density field on a regular grid of numbers."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import threestudio
from threestudio.models.geometry.base import BaseImplicitGeometry, contract_to_unisphere
from threestudio.models.geometry.field_gradient import check_normal_type, finite_difference
from threestudio.utils.ops import get_activation

NORMAL_TYPES = ("finite_difference", "finite_difference_laplacian", "pred")
NORMAL_EPS = 1e-3


@threestudio.register("volume-grid")
class VolumeGrid(BaseImplicitGeometry):
    """density = activation(exp(scale) grid(x) + bias(x)); the other channels are features.

    Values lie at cell centres of the box and are blended trilinearly; beyond the outermost centres
    they fade to zero over half a cell. The bias ``blob`` is scale (1 - |x| / std). The factor
    exp(scale) is trained where the bias is a number, else it is 1.
    """

    @dataclass
    class Config(BaseImplicitGeometry.Config):
        grid_size: tuple[int, int, int] = (100, 100, 100)
        """Cells along z, y and x."""
        n_feature_dims: int = 3
        """Channels handed to the material."""
        density_activation: str | None = "softplus"
        """Activation of the biased density."""
        density_bias: float | str = "blob"
        """blob or a number."""
        density_blob_scale: float = 5.0
        """Height of the blob."""
        density_blob_std: float = 0.5
        """Width of the blob in world units."""
        normal_type: str | None = "finite_difference"
        """finite_difference, finite_difference_laplacian, pred or None."""
        isosurface_threshold: Any = "auto"
        """Density of the extracted surface, or "auto"."""

    cfg: Config

    def configure(self) -> None:
        """Build the grid, all zeros.

        Raises:
            ValueError: a value of the configuration cannot work.
        """
        super().configure()
        size = tuple(int(cells) for cells in self.cfg.grid_size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(
                f"grid_size is {size}; expected three positive numbers of cells, such as "
                "[100, 100, 100]."
            )
        check_normal_type(self.cfg.normal_type, NORMAL_TYPES)
        bias = self.cfg.density_bias
        if bias != "blob" and not isinstance(bias, (int, float)):
            raise ValueError(f"density_bias is {bias!r}; expected blob or a number.")
        self.grid_size = size
        self.grid: Float[Tensor, "1 Nc z y x"]
        self.grid = nn.Parameter(torch.zeros(1, 1 + self.cfg.n_feature_dims, *size))
        self.density_scale: Float[Tensor, ""]
        if bias == "blob":
            self.register_buffer("density_scale", torch.zeros(()))
        else:
            self.density_scale = nn.Parameter(torch.zeros(()))
        if self.cfg.normal_type == "pred":
            self.normal_grid = nn.Parameter(torch.zeros(1, 3, *size))

    def get_density_bias(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 1"] | float:
        """Return what is added to the grid's density at world points; points are constants."""
        if self.cfg.density_bias != "blob":
            return float(self.cfg.density_bias)
        distance = points.detach().norm(dim=-1, keepdim=True)
        return self.cfg.density_blob_scale * (1.0 - distance / self.cfg.density_blob_std)

    def get_trilinear_feature(
        self, points: Float[Tensor, "*N 3"], grid: Float[Tensor, "1 Nc z y x"]
    ) -> Float[Tensor, "*N Nc"]:
        """Return the blended channels of a grid at world points."""
        unit = contract_to_unisphere(points, self.bbox, self.unbounded)
        places = (unit * 2.0 - 1.0).reshape(1, 1, 1, -1, 3)
        values = F.grid_sample(grid, places.to(grid), mode="bilinear", align_corners=False)
        return values.reshape(grid.shape[1], -1).transpose(0, 1).view(*points.shape[:-1], -1)

    def _activated(
        self, points: Float[Tensor, "*N 3"], density: Float[Tensor, "*N 1"]
    ) -> Float[Tensor, "*N 1"]:
        raw = density * self.density_scale.exp() + self.get_density_bias(points)
        return get_activation(self.cfg.density_activation)(raw)

    def forward(
        self, points: Float[Tensor, "*N 3"], output_normal: bool = False
    ) -> dict[str, Tensor]:
        """Evaluate density, features and, on request, normals.

        Args:
            points: world positions.
            output_normal: add ``normal`` and ``shading_normal``.

        Returns:
            density ``[*N, 1]`` per world unit; features ``[*N, Nf]``; normal and shading_normal
            ``[*N, 3]``, unit length, pointing out of the object (down the density).
        """
        values = self.get_trilinear_feature(points, self.grid)
        density = self._activated(points, values[..., :1])
        output = {"density": density, "features": values[..., 1:]}
        if output_normal and self.cfg.normal_type is not None:
            if self.cfg.normal_type == "pred":
                normal = self.get_trilinear_feature(points, self.normal_grid)
            else:
                is_central = self.cfg.normal_type == "finite_difference_laplacian"
                normal = -finite_difference(
                    self.forward_density, points, density, NORMAL_EPS, is_central
                )
            normal = F.normalize(normal, dim=-1)
            output.update(normal=normal, shading_normal=normal)
        return output

    def forward_density(self, points: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 1"]:
        """Return the density alone."""
        return self._activated(points, self.get_trilinear_feature(points, self.grid)[..., :1])

    def forward_field(self, points: Float[Tensor, "*N 3"]) -> tuple[Float[Tensor, "*N 1"], None]:
        """Return (density, None): the field to extract; its grid does not deform."""
        return self.forward_density(points), None

    def forward_level(
        self, field: Float[Tensor, "*N 1"], threshold: float
    ) -> Float[Tensor, "*N 1"]:
        """Return threshold - density: negative inside."""
        return -(field - threshold)

    def export(self, points: Float[Tensor, "*N 3"], **kwargs: Any) -> dict[str, Tensor]:
        """Return the features at surface points, or nothing without any."""
        if self.cfg.n_feature_dims == 0:
            return {}
        return {"features": self.get_trilinear_feature(points, self.grid)[..., 1:]}
