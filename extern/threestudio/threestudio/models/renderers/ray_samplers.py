"""Who marches rays, drops samples and sums them up: lists of any length, or of a fixed one.

A sampler has five methods, which `nerf-volume-renderer` calls in turn: `march`, `select`,
`not_empty`, `render_weights`, `accumulate_along_rays`. `nerfacc_sampler` holds a third, and
`sampler_choice` chooses.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from threestudio.models.renderers import volume_rendering
from threestudio.models.renderers.sample_budget import SampleBudget
from threestudio.models.renderers.static_samples import march_rays_static, select_static
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples
from threestudio.utils.ops import validate_empty_rays

# Samples before the alpha test, which are asked for their density without a gradient, take little
# memory; a budget allows so many times more of them.
FIRST_PASS_FACTOR = 8


@dataclass(frozen=True)
class March:
    """How rays are marched; see `volume_rendering.march_rays`."""

    bbox: Float[Tensor, "2 3"]
    step_size: float
    n_steps: int
    occupied: Bool[Tensor, "R R R"] | None
    near_plane: float
    far_plane: float
    ray_chunk_size: int


class DynamicSampler:
    """Lists as long as there are samples. Their lengths make the host wait for a GPU."""

    is_static = False

    @torch.no_grad()
    def march(
        self, rays: RayBatch, how: March, jitter: Float[Tensor, "n_rays"] | None
    ) -> RaySamples:
        """Return the samples at equal steps in occupied cells. Not differentiable."""
        return volume_rendering.march_rays(
            rays.origins,
            rays.directions,
            how.bbox,
            how.step_size,
            how.n_steps,
            jitter=jitter,
            occupied=how.occupied,
            near_plane=how.near_plane,
            far_plane=how.far_plane,
            ray_chunk_size=how.ray_chunk_size,
        )

    def select(
        self, samples: RaySamples, keep: Bool[Tensor, "n_samples"], n_rays: int
    ) -> RaySamples:
        """Return the kept samples."""
        return samples.select(keep.nonzero()[:, 0])

    def not_empty(self, samples: RaySamples) -> RaySamples:
        """Return the samples, or one without length where there are none."""
        return RaySamples(
            *validate_empty_rays(samples.ray_indices, samples.t_starts, samples.t_ends)
        )

    def render_weights(
        self, densities: Float[Tensor, "n_samples"], samples: RaySamples, n_rays: int
    ) -> Float[Tensor, "n_samples"]:
        """Return the compositing weights; differentiable with respect to the densities."""
        lengths = samples.t_ends - samples.t_starts
        return volume_rendering.render_weights(densities, lengths, samples.ray_indices, n_rays)

    def accumulate_along_rays(
        self,
        weights: Float[Tensor, "n_samples"],
        values: Float[Tensor, "n_samples C"],
        ray_indices: Int[Tensor, "n_samples"],
        n_rays: int,
    ) -> Float[Tensor, "n_rays C"]:
        """Return the sums of weights times values; differentiable."""
        return volume_rendering.accumulate_along_rays(weights, values, ray_indices, n_rays)


class StaticSampler(DynamicSampler):
    """Lists of fixed lengths, see `static_samples`: no shape depends on data, and nothing waits.

    Args:
        limit: longest list of samples that keep a gradient; 0 sets none.

    Attributes:
        first_pass, samples: budgets of what `march` and `select` give; ``samples`` serves both
            where nothing is selected.
    """

    is_static = True

    def __init__(self, limit: int, selects: bool) -> None:
        self.samples = SampleBudget(limit)
        self.first_pass = SampleBudget(limit * FIRST_PASS_FACTOR) if selects else self.samples

    def march(
        self, rays: RayBatch, how: March, jitter: Float[Tensor, "n_rays"] | None
    ) -> RaySamples:
        """Return the samples at equal steps in occupied cells, and repeats without length."""
        return march_rays_static(
            rays.origins,
            rays.directions,
            how.bbox,
            how.step_size,
            how.n_steps,
            self.first_pass,
            jitter=jitter,
            occupied=how.occupied,
            near_plane=how.near_plane,
            far_plane=how.far_plane,
            ray_chunk_size=how.ray_chunk_size,
        )

    def select(
        self, samples: RaySamples, keep: Bool[Tensor, "n_samples"], n_rays: int
    ) -> RaySamples:
        """Return the kept samples, and repeats without length."""
        return select_static(samples, keep, n_rays, self.samples)

    def not_empty(self, samples: RaySamples) -> RaySamples:
        """Return the samples: a list of fixed length is never empty."""
        return samples

    def render_weights(
        self, densities: Float[Tensor, "n_samples"], samples: RaySamples, n_rays: int
    ) -> Float[Tensor, "n_samples"]:
        """As of the base class; whatever the density at a repeat, its weight is zero."""
        densities = torch.where(samples.is_padding, 0.0, densities)
        return super().render_weights(densities, samples, n_rays)
