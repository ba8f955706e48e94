"""Volume rendering of a density field with empty space skipped.

Shapes: ``B H W`` the image batch, ``n_rays`` = B H W, ``Ns`` samples of all rays.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import threestudio
from threestudio.models.background.base import (
    BaseBackground,
    background_in_slices,
    background_of_batch,
)
from threestudio.models.estimators import OccupancyGridEstimator
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.importance_sampling import ImportanceEstimator, ProposalEstimator
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.proposal_network import ProposalNetwork
from threestudio.models.renderers.base import VolumeRenderer
from threestudio.models.renderers.compositing import composite_samples, per_sample_outputs
from threestudio.models.renderers.image_rays import check_image_rays, flat_rays
from threestudio.models.renderers.quantile_samples import check_sampling, sample_quantiles
from threestudio.models.renderers.ray_samplers import DynamicSampler, March
from threestudio.models.renderers.sampler_choice import SamplerChoice
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples, visible_samples
from threestudio.utils.device_copy import upload
from threestudio.utils.misc import get_rank
from threestudio.utils.ops import chunk_batch
from threestudio.utils.rng import generator, rand_items

ALPHA_THRESHOLD = 0.01
EARLY_STOP_EPS = 1e-4
NORMAL_PERTURB_STD = 0.01
DYNAMIC_OCCUPANCY_TIMES = 4


@threestudio.register("nerf-volume-renderer")
class NeRFVolumeRenderer(VolumeRenderer):
    """NeRF's quadrature, by default at equal steps and only where the occupancy grid allows.

    Candidates along every ray are looked up in the grid, the survivors are evaluated in one flat
    list, and weights come from a running sum over that list. `volume_rendering` has the formulas.
    Two other estimators choose the samples of a ray by a density that is asked before.

    In training on a GPU the list has a length that is known before the samples are (`sampler`), so
    that nothing waits for the device; `static_samples` says what that means for the samples.
    """

    @dataclass
    class Config(VolumeRenderer.Config):
        num_samples_per_ray: int = 512
        """Steps across the box's diagonal: step length = 1.732 * 2 * radius / this."""
        eval_chunk_size: int = 160000
        """Samples per evaluation of the field where no gradient is kept."""
        ray_chunk_size: int = 0
        """Rays per pass of the bookkeeping; 0 lets the program choose."""
        randomized: bool = True
        """Jitter the samples in training."""
        near_plane: float = 0.0
        """Nothing nearer than this is seen, world units."""
        far_plane: float = 1e10
        """Nothing farther than this is seen, world units."""
        return_comp_normal: bool = False
        """Give ``comp_normal`` in training too."""
        return_normal_perturb: bool = False
        """Give ``normal_perturb``: normals at positions moved by N(0, 0.01^2)."""
        estimator: str = "occgrid"
        """Where samples lie: "occgrid" at equal steps where the grid is occupied, "importance" at
        quantiles of the geometry's own density, "proposal" at those of a network that learns it."""
        grid_prune: bool = True
        """Skip samples in empty cells; False evaluates every candidate."""
        prune_alpha_threshold: bool = True
        """Drop samples of alpha < 0.01, or behind T < 1e-4, by a first pass without gradient; of
        "occgrid"."""
        occupancy_resolution: int = 32
        """Cells per axis."""
        occupancy_update_interval: int = 16
        """Steps between updates of the grid."""
        occupancy_warmup_steps: int = 256
        """Steps in which updates ask every cell."""
        occupancy_times: int = 0
        """Scene times that an update covers; 0 takes 1 for static and 4 for dynamic geometry."""
        occupancy_margin: int = 0
        """Cells around occupied ones that are sampled too, so that a trained scene can grow."""
        sampler: str = "auto"
        """Who marches and sums up: "dynamic" with lists as long as there are samples, for which the
        host waits; "static" in training with lists of fixed length, which never wait; "nerfacc"
        with that package, on a GPU. "auto" is static on a GPU or with a budget, else dynamic."""
        sample_budget: float = 0
        """Most samples with a gradient of one training pass (of `stable-nerf-volume-renderer` of
        one block); where there are more, all rays are sampled more coarsely. 0 lets the program
        follow the number that there is."""
        proposal_network_config: Any = None
        """Of "proposal": encoding_config and network_config of its network."""
        prop_optimizer_config: Any = None
        """Of "proposal": the optimizer of its network, in the grammar of system.optimizer."""
        prop_scheduler_config: Any = None
        """Of "proposal": the schedule of its learning rate; null keeps it."""
        num_samples_per_ray_proposal: int = 64
        """Of "proposal": places per ray at which its network is asked."""
        num_samples_per_ray_importance: int = 64
        """Of "importance": places per ray at which the density is asked before; they are rendered
        too, besides num_samples_per_ray."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        super().configure(geometry, material, background)
        check_sampling(self.cfg, geometry)
        self._samplers = SamplerChoice(self.cfg)
        if self.cfg.estimator == "occgrid":
            self.estimator = OccupancyGridEstimator(self.bbox, self.cfg.occupancy_resolution)
        elif self.cfg.estimator == "importance":
            self.estimator = ImportanceEstimator()
        else:
            self.estimator = ProposalEstimator()
            self.prop_net = ProposalNetwork(
                self.bbox,
                self._is_unbounded,
                self.cfg.proposal_network_config,
                self.cfg.prop_optimizer_config,
                self.cfg.prop_scheduler_config,
            )
        self.render_step_size = 1.732 * 2 * self.cfg.radius / self.cfg.num_samples_per_ray
        self.randomized = self.cfg.randomized
        self._step = 0
        self._occupancy_step: int | None = None

    def train(self, mode: bool = True) -> "NeRFVolumeRenderer":
        """Set training or evaluation; only training jitters."""
        self.randomized = mode and self.cfg.randomized
        return super().train(mode)

    @property
    def needs_normals(self) -> bool:
        """Whether the geometry is asked for normals at the samples."""
        return self.material.requires_normal

    # Occupancy

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Refresh the occupancy grid when its interval is due, once per step."""
        self._step = global_step
        due = global_step % self.cfg.occupancy_update_interval == 0
        keeps_grid = self.cfg.estimator == "occgrid" and self.cfg.grid_prune
        if on_load_weights or not self.training or not keeps_grid or not due:
            return
        if self._occupancy_step == global_step:
            return  # the walk over attributes may come by twice; the grid decays once
        self._occupancy_step = global_step
        self.update_occupancy(global_step)

    def update_occupancy(self, step: int) -> None:
        """Ask the geometry for its density at random points of the cells, at several times.

        Random: role "occupancy" of the step. No rendering state enters.
        """
        n_times = self.cfg.occupancy_times
        if n_times <= 0:
            dynamic = getattr(self.geometry, "is_dynamic", False)
            n_times = DYNAMIC_OCCUPANCY_TIMES if dynamic else 1
        self.estimator.update(
            lambda points, times: self._density(points, times) * self.render_step_size,
            step=step,
            warmup_steps=self.cfg.occupancy_warmup_steps,
            n_times=n_times,
            threshold=ALPHA_THRESHOLD,
            chunk_size=self.cfg.eval_chunk_size,
            margin=self.cfg.occupancy_margin,
        )

    # Rendering

    def forward(
        self,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        light_positions: Float[Tensor, "B 3"],
        bg_color: Tensor | None = None,
        frame_times: Float[Tensor, "B"] | None = None,
        ray_jitter: Float[Tensor, "B H W"] | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Render images.

        Args:
            rays_o: ray origins in the world.
            rays_d: unit ray directions in the world.
            light_positions: one light per image, in the world.
            bg_color: ``[B, C]`` or ``[B, H, W, C]``, instead of the background.
            frame_times: scene time of each image, or one for all, in [0, 1]; None is the
                geometry's default.
            ray_jitter: instead of `draw_jitter`, for callers that render an image in pieces.
            **kwargs: the rest of the batch, handed to the material in training.

        Returns:
            Always: comp_rgb = comp_rgb_fg + comp_rgb_bg (1 - opacity), comp_rgb_fg (premultiplied),
            comp_rgb_bg ``[B, H, W, C]``; opacity, depth (sum of w t, not divided by opacity),
            z_variance (0 where opacity <= 0.5) ``[B, H, W, 1]``.
            In training, per sample: weights, t_points, t_intervals ``[Ns, 1]``, t_dirs, points
            ``[Ns, 3]``, ray_indices ``[Ns]`` and all that the geometry gives.
            comp_normal ``[B, H, W, 3]``, (n + 1) / 2 * opacity, in evaluation when there are
            normals, in training with ``return_comp_normal``.
            deformation ``[B, H, W, 3]``, in training where the geometry displaces points: the sum
            of w displacement, in units of the geometry.

        With "proposal" a training pass also trains the proposal network, when that is due.

        Random: in training one jitter per ray, role "ray-jitter", item = image over all ranks.
        Where samples lie, and which are dropped, is not differentiable.
        """
        frame_times = check_image_rays(rays_o, rays_d, light_positions, frame_times)
        batch_size, height, width = rays_o.shape[:3]
        if self.training:
            if ray_jitter is None:
                ray_jitter = self.draw_jitter(rays_o)
            output = self._render_for_training(
                rays_o, rays_d, light_positions, frame_times, ray_jitter, kwargs
            )
            background = bg_color
            if background is None:
                background = background_of_batch(self.background, rays_d, kwargs)
        else:
            output = self._render_for_evaluation(rays_o, rays_d, light_positions, frame_times)
            background = bg_color
            if background is None:
                background = background_in_slices(self.background, rays_d, self.cfg.eval_chunk_size)
        output = {
            key: value.view(batch_size, height, width, -1) if key in _IMAGE_KEYS else value
            for key, value in output.items()
        }
        if background.ndim == 2:
            background = background[:, None, None, :]
        background = background.expand_as(output["comp_rgb_fg"])
        comp_rgb = output["comp_rgb_fg"] + background * (1.0 - output["opacity"])
        return {"comp_rgb": comp_rgb, "comp_rgb_bg": background, **output}

    def _render_for_training(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        light_positions: Tensor,
        frame_times: Tensor | None,
        ray_jitter: Tensor | None,
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        rays = flat_rays(rays_o, rays_d, frame_times)
        sampler = self._samplers.of(rays_o.device, is_training=True)
        jitter = None if ray_jitter is None else ray_jitter.reshape(-1)
        samples = self._sample(rays, jitter, sampler)
        result = self._shade(rays, samples, light_positions, batch)
        output = self._composite(rays, samples, result, sampler)
        if self._learns_proposals:
            loss = self.estimator.loss(result["weights"].detach())
            if sampler.is_static:
                loss = loss / self._share_of_hits(samples)
            self.prop_net.learn(loss)
        output.update(per_sample_outputs(samples, result, sampler.is_static))
        if self.cfg.return_normal_perturb:
            stream = generator("normal-perturb", self._step, item=get_rank())
            noise = upload(torch.randn(result["points"].shape, generator=stream), rays_o.device)
            moved = self._geometry(
                result["points"] + noise * NORMAL_PERTURB_STD, rays.times(samples), True
            )
            output["normal_perturb"] = moved["normal"]
        return output

    def _render_for_evaluation(
        self,
        rays_o: Tensor,
        rays_d: Tensor,
        light_positions: Tensor,
        frame_times: Tensor | None,
    ) -> dict[str, Tensor]:
        """Rays in slices, which bounds the memory of the samples whatever the image size."""
        rays = flat_rays(rays_o, rays_d, frame_times)
        pieces = []
        sampler = self._samplers.of(rays_o.device, is_training=False)
        size = self.cfg.ray_chunk_size or max(1, 2**22 // self.cfg.num_samples_per_ray)
        for part in rays.split(size):
            samples = self._sample(part, None, sampler)
            result = self._shade(part, samples, light_positions, {})
            pieces.append(self._composite(part, samples, result, sampler))
        return {key: torch.cat([piece[key] for piece in pieces]) for key in pieces[0]}

    def _sample(self, rays: RayBatch, jitter: Tensor | None, sampler: DynamicSampler) -> RaySamples:
        """The samples to be shaded, never none."""
        if self.cfg.estimator != "occgrid":
            return sampler.not_empty(self._sample_quantiles(rays, jitter, sampler.is_static))
        how = March(
            self.bbox,
            self.render_step_size,
            self.cfg.num_samples_per_ray,
            occupied=self.estimator.binaries[0] if self.cfg.grid_prune else None,
            near_plane=self.cfg.near_plane,
            far_plane=self.cfg.far_plane,
            ray_chunk_size=self.cfg.ray_chunk_size,
        )
        samples = sampler.march(rays, how, jitter)
        if self.cfg.prune_alpha_threshold and samples.n_samples > 0:
            samples = sampler.select(samples, self._is_visible(rays, samples), len(rays.origins))
        return sampler.not_empty(samples)

    def _sample_quantiles(
        self, rays: RayBatch, jitter: Tensor | None, with_misses: bool
    ) -> RaySamples:
        """Samples of the estimators that ask a density first; every ray that can see has as many.

        A ray reaches from plane to plane and, where the geometry is bounded, from face to face of
        the box.
        """
        name = self.cfg.estimator
        if name == "proposal":
            self.estimator.anneal = self.prop_net.anneal

        def density(points: Tensor, times: Tensor | None) -> Float[Tensor, "n"]:
            if name == "proposal":
                return self.prop_net.density(points)
            return self._density(points, times)[:, 0]

        return sample_quantiles(
            rays,
            None if self._is_unbounded else self.bbox,
            self.estimator,
            density,
            self.cfg[f"num_samples_per_ray_{name}"],
            self.cfg.num_samples_per_ray,
            near_plane=self.cfg.near_plane,
            far_plane=self.cfg.far_plane,
            jitter=jitter,
            requires_grad=self._learns_proposals,
            chunk_size=0 if self.training else self.cfg.eval_chunk_size,
            with_misses=with_misses,
        )

    @property
    def _is_unbounded(self) -> bool:
        return getattr(self.geometry, "unbounded", False)

    @property
    def _learns_proposals(self) -> bool:
        """Whether this pass trains the proposal network."""
        if self.cfg.estimator != "proposal" or not self.training:
            return False
        return torch.is_grad_enabled() and self.prop_net.is_due

    def _share_of_hits(self, samples: RaySamples) -> Float[Tensor, ""]:
        """The share of the rays that see anything, where all have equally many samples."""
        has_length = ~samples.is_padding.view(-1, self.cfg.num_samples_per_ray)
        return has_length.any(dim=-1).float().mean().clamp(min=1e-6)

    def draw_jitter(self, rays_o: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B H W"] | None:
        """Draw where in its first step each ray begins, in [0, 1); None where nothing is random.

        Random: role "ray-jitter" of the step, item = image over all ranks.
        """
        if not self.randomized:
            return None
        shape = rays_o.shape[:3]
        first = get_rank() * shape[0]
        return rand_items(shape, "ray-jitter", self._step, first, rays_o.device, rays_o.dtype)

    @torch.no_grad()
    def _is_visible(self, rays: RayBatch, samples: RaySamples) -> Bool[Tensor, "Ns"]:
        """Which samples are opaque enough and not hidden, by a pass without gradient."""
        points, times = rays.points(samples), rays.times(samples)
        density = chunk_batch(self._density, self.cfg.eval_chunk_size, points, times)
        limit = self.estimator.mean_occupancy.clamp(max=ALPHA_THRESHOLD)
        if not self.cfg.grid_prune:
            limit = ALPHA_THRESHOLD
        n_rays = rays.origins.shape[0]
        return visible_samples(density[:, 0], samples, n_rays, limit, EARLY_STOP_EPS)

    def _shade(
        self,
        rays: RayBatch,
        samples: RaySamples,
        light_positions: Float[Tensor, "B 3"],
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Geometry and colour at the samples; in slices where no gradient is kept."""

        def shade(points: Tensor, viewdirs: Tensor, images: Tensor, times: Tensor | None) -> dict:
            geometry = self._geometry(points, times, self.needs_normals)
            rgb = self.material(
                viewdirs=viewdirs,
                positions=points,
                light_positions=light_positions.index_select(0, images),
                **geometry,
                **batch,
            )
            return {**geometry, "rgb": rgb}

        points = rays.points(samples)
        viewdirs = rays.directions.index_select(0, samples.ray_indices)
        images = rays.images(samples)
        times = rays.times(samples)
        if torch.is_grad_enabled() and self.training:
            result = shade(points, viewdirs, images, times)
        else:
            result = chunk_batch(shade, self.cfg.eval_chunk_size, points, viewdirs, images, times)
        return {**result, "points": points, "t_dirs": viewdirs}

    def _composite(
        self,
        rays: RayBatch,
        samples: RaySamples,
        result: dict[str, Tensor],
        sampler: DynamicSampler,
    ) -> dict[str, Tensor]:
        shows_normal = not self.training or self.cfg.return_comp_normal
        return composite_samples(
            samples,
            result,
            rays.origins.shape[0],
            sampler,
            with_normal=shows_normal and "normal" in result,
            with_displacement=self.training and "displacement" in result,
        )

    # Calls of the geometry, with a time where it takes one

    def _geometry(self, points: Tensor, times: Tensor | None, output_normal: bool) -> dict:
        if times is not None and _takes_times(type(self.geometry).forward):
            return self.geometry(points, output_normal=output_normal, frame_times=times)
        return self.geometry(points, output_normal=output_normal)

    def _density(self, points: Tensor, times: Tensor | None) -> Float[Tensor, "n 1"]:
        if times is not None and _takes_times(type(self.geometry).forward_density):
            return self.geometry.forward_density(points, frame_times=times)
        return self.geometry.forward_density(points)


_IMAGE_KEYS = ("comp_rgb_fg", "opacity", "depth", "z_variance", "comp_normal", "deformation")


def _takes_times(function: Any) -> bool:
    return "frame_times" in inspect.signature(function).parameters
