"""The package nerfacc as marcher and compositor, where it is installed and there is a GPU.

nerfacc walks our occupancy grid's cells in one kernel and sums flat samples in others. Its lists
are as long as there are samples, so each pass waits for the device.

Shapes: as in `volume_rendering`.
"""

import importlib
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threestudio.models.renderers.ray_samplers import DynamicSampler, March
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples, intersect_box
from threestudio.stand_ins.finder import is_installed

# nerfacc takes the later of a plane of all rays and one of each ray; this one never is.
NO_PLANE = -1e10
INSTEAD = "Use system.renderer.sampler: auto, which needs neither."


def require_nerfacc() -> ModuleType:
    """Return the package.

    Raises:
        ValueError: it is not installed, or there is no GPU, without which it computes nothing.
    """
    if not is_installed("nerfacc"):
        raise ValueError(
            "system.renderer.sampler is 'nerfacc', but the package nerfacc is not installed; "
            f"expected it beside a CUDA build of torch (pip install nerfacc). {INSTEAD}"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            "system.renderer.sampler is 'nerfacc', but there is no CUDA device, without which "
            f"nerfacc marches no rays. {INSTEAD}"
        )
    return importlib.import_module("nerfacc")


class NerfaccSampler(DynamicSampler):
    """Marches and composites by nerfacc's public classes and functions.

    Args:
        package: nerfacc, 0.5 or later; or what has its `OccGridEstimator`,
            `render_weight_from_density` and `accumulate_along_rays`.
    """

    def __init__(self, package: Any) -> None:
        self._package = package
        self._grids: dict[tuple, Any] = {}

    @torch.no_grad()
    def march(
        self, rays: RayBatch, how: March, jitter: Float[Tensor, "n_rays"] | None
    ) -> RaySamples:
        """Return samples at the same distances as `march_rays`, but for rounding at cell faces.

        nerfacc's steps start at a plane, ours where a ray enters the box, so each ray gets a plane
        half a step before its first middle. Not differentiable.
        """
        t_enter, _ = intersect_box(
            rays.origins, rays.directions, how.bbox, how.near_plane, how.far_plane
        )
        phase = torch.full_like(t_enter, 0.5) if jitter is None else jitter
        ray_indices, t_starts, t_ends = self._grid(how).sampling(
            rays.origins,
            rays.directions,
            near_plane=NO_PLANE,
            far_plane=how.far_plane,
            t_min=t_enter + (phase - 0.5) * how.step_size,
            render_step_size=how.step_size,
        )
        return RaySamples(ray_indices.long(), t_starts, t_ends)

    def _grid(self, how: March) -> Any:
        """nerfacc's grid, holding the cells of ours; full without one."""
        device = how.bbox.device
        n_axis = 1 if how.occupied is None else how.occupied.shape[0]
        key = (n_axis, device)
        if key not in self._grids:
            grid = self._package.OccGridEstimator(how.bbox.flatten().cpu(), n_axis, levels=1)
            self._grids[key] = grid.to(device)
        grid = self._grids[key]
        if how.occupied is None:
            grid.binaries.fill_(True)
        else:
            grid.binaries.copy_(how.occupied[None])
        return grid

    def render_weights(
        self, densities: Float[Tensor, "n_samples"], samples: RaySamples, n_rays: int
    ) -> Float[Tensor, "n_samples"]:
        """Return nerfacc's compositing weights; differentiable with respect to the densities."""
        weights, _, _ = self._package.render_weight_from_density(
            samples.t_starts,
            samples.t_ends,
            densities,
            ray_indices=samples.ray_indices,
            n_rays=n_rays,
        )
        return weights

    def accumulate_along_rays(
        self,
        weights: Float[Tensor, "n_samples"],
        values: Float[Tensor, "n_samples C"],
        ray_indices: Int[Tensor, "n_samples"],
        n_rays: int,
    ) -> Float[Tensor, "n_rays C"]:
        """Return nerfacc's sums of weights times values; differentiable."""
        return self._package.accumulate_along_rays(
            weights, values=values, ray_indices=ray_indices, n_rays=n_rays
        )
