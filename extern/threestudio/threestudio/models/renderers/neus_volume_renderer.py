"""Volume rendering of a signed distance (NeuS, Wang et al. 2021; VolSDF, Yariv et al. 2021).

Shapes: ``Ns`` samples of all rays, as in `nerf_volume_renderer`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.nerf_volume_renderer import NeRFVolumeRenderer
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples

ALPHA_EPS = 1e-5
LARGEST_ALPHA = 1.0 - 1e-6  # beyond it the optical depth -log(1 - alpha) has no slope in fp32
INV_STD_RANGE = (1e-6, 1e6)
VOLSDF_LARGEST_INV_STD = 80.0


class LearnedVariance(nn.Module):
    """How sharply the distance becomes a surface: 1 / std = exp(10 value), one number."""

    def __init__(self, init_val: float) -> None:
        super().__init__()
        self._inv_std = nn.Parameter(torch.tensor(float(init_val)))

    @property
    def inv_std(self) -> Float[Tensor, ""]:
        """One over the standard deviation, in 1 / world units."""
        return torch.exp(self._inv_std * 10.0)


def neus_alpha(
    sdf: Float[Tensor, "Ns 1"],
    cosine: Float[Tensor, "Ns 1"],
    lengths: Float[Tensor, "Ns 1"],
    inv_std: Float[Tensor, ""],
    anneal: float = 1.0,
) -> Float[Tensor, "Ns 1"]:
    """Return the opacity of each sample (NeuS, eq. 13), from the distances at its two ends.

    Args:
        sdf: distance at the middle of the sample.
        cosine: ray direction times outward unit normal; negative where the ray enters.
        lengths: of the samples, world units.
        inv_std: sharpness.
        anneal: 0 counts every sample as half entering, which is smooth; 1 is exact. Samples where
            the ray leaves are transparent at 1.
    """
    entering = F.relu(0.5 - 0.5 * cosine) * (1.0 - anneal) + F.relu(-cosine) * anneal
    half = 0.5 * lengths * entering
    before = torch.sigmoid((sdf + half) * inv_std)
    after = torch.sigmoid((sdf - half) * inv_std)
    return ((before - after + ALPHA_EPS) / (before + ALPHA_EPS)).clamp(0.0, 1.0)


def volsdf_density(
    sdf: Float[Tensor, "Ns 1"], inv_std: Float[Tensor, ""]
) -> Float[Tensor, "Ns 1"]:
    """Return a density from a distance: 1 / beta times the Laplace CDF of -sdf, beta = 1 / inv_std.

    VolSDF, eq. 2 and 3; ``inv_std`` counts as at most 80.
    """
    sharpness = inv_std.clamp(max=VOLSDF_LARGEST_INV_STD)
    tail = 0.5 * torch.exp(-sdf.abs() * sharpness)
    return sharpness * torch.where(sdf > 0, tail, 1.0 - tail)


@threestudio.register("neus-volume-renderer")
class NeuSVolumeRenderer(NeRFVolumeRenderer):
    """Renders a geometry with `forward_sdf`; everything but the opacity is the NeRF renderer's.

    ``variance`` is trained: give the optimizer a group ``renderer``. In training the output also
    has ``sdf``, ``sdf_grad`` per sample and, always, the number ``inv_std``. Normals are asked for
    whatever the material.
    """

    @dataclass
    class Config(NeRFVolumeRenderer.Config):
        learned_variance_init: float = 0.3
        """Start of the sharpness: inv_std = exp(10 * this)."""
        cos_anneal_end_steps: int = 0
        """Steps over which the exact cosine comes in, see `neus_alpha`; 0 has it from the start."""
        use_volsdf: bool = False
        """VolSDF's density instead of NeuS's opacity."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        """Build the renderer.

        Raises:
            ValueError: the geometry has no signed distance, or gives no normals.
        """
        if not hasattr(geometry, "forward_sdf"):
            raise ValueError(
                f"neus-volume-renderer got a {type(geometry).__name__}; expected a geometry with a "
                "signed distance, such as implicit-sdf. Use nerf-volume-renderer for a density."
            )
        if getattr(geometry.cfg, "normal_type", "given") is None:
            raise ValueError(
                "system.geometry.normal_type is null; expected for example finite_difference, "
                "since neus-volume-renderer reads the normals."
            )
        super().configure(geometry, material, background)
        self.variance = LearnedVariance(self.cfg.learned_variance_init)
        self.cos_anneal_ratio = 1.0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set how exact the cosine is, then refresh the occupancy."""
        end = self.cfg.cos_anneal_end_steps
        self.cos_anneal_ratio = 1.0 if end == 0 else min(1.0, global_step / end)
        super().update_step(epoch, global_step, on_load_weights)

    @property
    def needs_normals(self) -> bool:
        """The opacity depends on the angle at which a ray meets the surface."""
        return True

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Render; see `NeRFVolumeRenderer.forward`. Adds ``inv_std``."""
        return {**super().forward(*args, **kwargs), "inv_std": self.variance.inv_std}

    def _sharpness(self) -> Float[Tensor, ""]:
        return self.variance.inv_std.clamp(*INV_STD_RANGE)

    def _density(self, points: Tensor, times: Tensor | None) -> Float[Tensor, "n 1"]:
        """What a step through each point would meet head on, for occupancy and pruning."""
        sdf = self.geometry.forward_sdf(points)
        lengths = torch.full_like(sdf, self.render_step_size)
        return self._as_density(sdf, -torch.ones_like(sdf), lengths)

    def _shade(
        self,
        rays: RayBatch,
        samples: RaySamples,
        light_positions: Float[Tensor, "B 3"],
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        result = super()._shade(rays, samples, light_positions, batch)
        cosine = (result["t_dirs"] * result["normal"]).sum(dim=-1, keepdim=True)
        lengths = (samples.t_ends - samples.t_starts)[:, None]
        return {**result, "density": self._as_density(result["sdf"], cosine, lengths)}

    def _as_density(
        self, sdf: Float[Tensor, "n 1"], cosine: Float[Tensor, "n 1"], lengths: Float[Tensor, "n 1"]
    ) -> Float[Tensor, "n 1"]:
        """The density whose 1 - exp(-density length) is the sample's opacity."""
        if self.cfg.use_volsdf:
            return volsdf_density(sdf, self._sharpness())
        alpha = neus_alpha(sdf, cosine, lengths, self._sharpness(), self.cos_anneal_ratio)
        # The one sample of a batch that meets nothing has no length, and must stay transparent.
        return -torch.log1p(-alpha.clamp(max=LARGEST_ALPHA)) / lengths.clamp(min=1e-10)
