"""What every system does that fits a 4D field to videos with known cameras.

Every training step takes the rays that a data module of videos draws, each with its own scene time,
renders them, and compares the colours. What is trained is the same geometry, material, background
and renderer as in text to 4D, so evaluation, export, editing and distillation see the result as the
same kind of `Scene`; no diffusion model takes part.

Evaluation on held-out cameras is in `reconstruction_evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float
from threestudio.data.camera_config import validate_number
from threestudio.models.estimators import OccupancyGridEstimator
from threestudio.models.spatial_time_encoding import SpatialTimeEncoding
from threestudio.systems.base import BaseLift3DSystem
from threestudio.systems.distillation import Distillation
from threestudio.utils.misc import get_rank
from threestudio.utils.rng import generator
from torch import Tensor

from custom.fourd.data.motion_hull import has_fixed_cameras, moving_share
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.losses.reconstruction import (
    COLOR_LOSSES,
    color_loss,
    space_variation_loss,
    surface_variation_loss,
    time_variation_loss,
)
from custom.fourd.ops.camera import seen_share
from custom.fourd.renderers.scene import Scene

from .reconstruction_evaluation import ReconstructionEvaluation
from .training_clock import TrainingClock

N_VARIATION_POINTS = 2048
MIN_SHARE_OF_RAYS_INSIDE = 0.05


class VideoReconstruction(ReconstructionEvaluation, Distillation, TrainingClock, BaseLift3DSystem):
    """Fits a 4D field to the frames of a `VideoScene`; systems derive from it."""

    strict_optimizer_groups = True

    @dataclass
    class Config(BaseLift3DSystem.Config):
        color_loss: str = "mse"
        """What lambda_rgb weighs: "mse", or "charbonnier", which forgives single pixels"""
        variation_step: float = 0.02
        """how far apart lambda_tv_space and lambda_tv_surface compare points, in shares of the
        box's half-width"""
        variation_time_step: float = 0.05
        """how far apart lambda_tv_time compares scene times"""
        min_seen_share: float = 0.0
        """of the training cameras: how many must have a place in their image for anything to be
        there; 0: none. For rigs around something: in what few cameras see, nothing contradicts
        clouds that hang before their lenses. Meshes, made without the renderer, keep what is
        there"""
        min_moving_share: float = 0.0
        """of the training cameras that see a place: how many must see something change there for
        it to move; elsewhere the field is the same at all times, whatever noise its frames have.
        0: everything may move. Where a camera moves it is left out, with a line; places are the
        cells of the encoding's motion_cells"""

    cfg: Config

    def configure(self) -> None:
        super().configure()
        if self.cfg.color_loss not in COLOR_LOSSES:
            raise ValueError(
                f"system.color_loss is {self.cfg.color_loss!r}; expected one of "
                f"{', '.join(COLOR_LOSSES)}."
            )
        for key in ("variation_step", "variation_time_step"):
            validate_number(getattr(self.cfg, key), f"system.{key}", 1e-6, 1)
        validate_number(self.cfg.min_seen_share, "system.min_seen_share", 0, 1)
        validate_number(self.cfg.min_moving_share, "system.min_moving_share", 0, 1)
        if self.cfg.min_seen_share > 0:
            self._check_grid()
        if self.cfg.min_moving_share > 0:
            self._encoding_in_time()
        if getattr(getattr(self.background, "cfg", None), "random_aug", False):
            raise ValueError(
                "system.background.random_aug is true, but frames of a video have no alpha: a "
                "random background would contradict them. Set it to false."
            )

    @property
    def scene(self) -> Scene:
        """The scene as it stands."""
        return Scene(self.geometry, self.material, self.background, self.renderer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.cfg.min_seen_share > 0:
            self._close_unseen_cells()
        if self.cfg.min_moving_share > 0:
            self._hold_still()

    def _check_grid(self) -> None:
        """Refuse renderers in which no place can be closed."""
        grid = getattr(self.renderer, "estimator", None)
        marching = getattr(self.renderer, "base_renderer", self.renderer)
        prunes = getattr(marching.cfg, "grid_prune", False)
        if not (isinstance(grid, OccupancyGridEstimator) and prunes):
            raise ValueError(
                f"system.min_seen_share is {self.cfg.min_seen_share:g}, but the renderer keeps no "
                "occupancy grid in which places could be closed. Set "
                "system.renderer.estimator=occgrid and system.renderer.grid_prune=true, or "
                "system.min_seen_share=0."
            )

    def _close_unseen_cells(self) -> None:
        """Declare places empty that too few of the training cameras see."""
        grid = self.renderer.estimator
        frames: VideoScene = self.trainer.datamodule.scene
        rows = frames.train_rows()
        cameras = frames.c2w[rows], frames.intrinsics[rows]
        share = seen_share(grid.cell_centres, *cameras, frames.height, frames.width)
        # A share of seven cameras is no exact number.
        grid.close(share < self.cfg.min_seen_share - 1e-6)

    def _encoding_in_time(self) -> SpatialTimeEncoding:
        """The part of the geometry that can be held still."""
        parts = (part for part in self.geometry.modules() if isinstance(part, SpatialTimeEncoding))
        found = next((part for part in parts if part.moves is not None), None)
        if found is None or getattr(self.geometry, "unbounded", False):
            raise ValueError(
                f"system.min_moving_share is {self.cfg.min_moving_share:g}, but the geometry has "
                "no cells of a box that could be held still. Set "
                "system.geometry.pos_encoding_config.motion_cells, 32 for example, with otype "
                "HashGridSpatialTime, or system.min_moving_share=0."
            )
        return found

    def _hold_still(self) -> None:
        """Let time count only where enough of the training cameras see something change."""
        frames: VideoScene = self.trainer.datamodule.scene
        if not has_fixed_cameras(frames):
            threestudio.info("cameras move, so system.min_moving_share says nothing: all may move")
            return
        encoding = self._encoding_in_time()
        low, high = self.geometry.bbox
        points = low + encoding.motion_cell_centres * (high - low)
        share = moving_share(points, frames)
        moves = share >= self.cfg.min_moving_share - 1e-6
        encoding.moves.copy_(moves.view_as(encoding.moves))
        threestudio.info("%.0f%% of the box may move", 100 * float(moves.float().mean()))

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Render a flat batch of n rays, each with its own time.

        The renderer takes images; here each ray is an image of one pixel.

        Returns:
            The renderer's outputs, with "comp_rgb" [n 1 1 3] and so on.

        Random: in training one jitter per ray, role "ray-jitter" of the step, item = rank.
        """
        rays_o, rays_d = (batch[name][:, None, None] for name in ("rays_o", "rays_d"))
        return self.renderer(
            rays_o=rays_o,
            rays_d=rays_d,
            light_positions=batch["rays_o"],
            frame_times=batch["frame_times"],
            ray_jitter=self._jitter(len(rays_o)).to(rays_o),
            images_per_group=len(rays_o),
        )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """One step on rays with the colours that they should show; returns the weighted loss.

        Raises:
            ValueError: the rays are in NDC, or nearly all of them miss the scene's box.
        """
        self._check_rays(batch)
        out = self(batch)
        rgb = out["comp_rgb"][:, 0, 0].unflatten(0, (-1, batch.get("rays_per_pixel", 1))).mean(1)
        terms = {"loss_rgb": color_loss(rgb, batch["rgb"], self.cfg.color_loss)}
        terms.update(self._regularisers(out))
        terms.update(self._variation())
        if self._weight("lambda_tv_surface") > 0:
            terms["loss_tv_surface"] = self._surface_variation(batch, out)
        with torch.no_grad():
            mean_square = (rgb - batch["rgb"]).square().mean().clamp_min(1e-10)
            self.log("train/psnr", -10 * torch.log10(mean_square), prog_bar=True)
        self.log_weights()
        return {"loss": self.weighted_loss(terms)}

    def _jitter(self, n_rays: int) -> Float[Tensor, "n 1 1"]:
        # One stream for the batch: the renderer's own draw has one per image, here one per ray.
        stream = generator("ray-jitter", self.true_global_step, get_rank())
        return torch.rand(n_rays, 1, 1, generator=stream)

    def _variation(self) -> dict[str, Tensor]:
        """The variation terms whose weight is not zero, at random places of the box.

        Random: places, times and offsets, role "variation" of the step, item = rank.
        """
        in_space, in_time = (self._weight(f"lambda_tv_{axis}") > 0 for axis in ("space", "time"))
        if not (in_space or in_time):
            return {}
        stream = generator("variation", self.true_global_step, get_rank())
        draws = torch.rand(N_VARIATION_POINTS, 7, generator=stream).to(self.renderer.bbox)
        low, high = self.renderer.bbox
        points, times = low + draws[:, :3] * (high - low), draws[:, 3]
        terms = {}
        if in_space:
            offsets = self._beside(points, draws[:, 4:]) - points
            terms["loss_tv_space"] = space_variation_loss(self._values, points, times, offsets)
        if in_time:
            terms["loss_tv_time"] = time_variation_loss(
                self._values, points, times, self.cfg.variation_time_step
            )
        return terms

    def _values(
        self, points: Float[Tensor, "n 3"], frame_times: Float[Tensor, "n"]
    ) -> Float[Tensor, "n 4"]:
        """Opacity and colour dimmed by it: empty space has none."""
        towards_box = -torch.nn.functional.normalize(points, dim=-1)
        alphas, rgb = self._opacity_and_colour(points, frame_times, towards_box)
        return torch.cat([alphas, alphas * rgb], dim=-1)

    def _opacity_and_colour(
        self,
        points: Float[Tensor, "n 3"],
        frame_times: Float[Tensor, "n"],
        viewdirs: Float[Tensor, "n 3"],
    ) -> tuple[Float[Tensor, "n 1"], Float[Tensor, "n 3"]]:
        """Opacity of a thirtieth of the box, and colour."""
        out = self.geometry(points, output_normal=False, frame_times=frame_times)
        length = (self.renderer.bbox[1, 0] - self.renderer.bbox[0, 0]) / 30
        alphas = 1 - torch.exp(-out["density"] * length)
        rgb = self.material(viewdirs=viewdirs, positions=points, light_positions=points, **out)
        return alphas, rgb

    def _beside(
        self, points: Float[Tensor, "n 3"], draws: Float[Tensor, "n 3"]
    ) -> Float[Tensor, "n 3"]:
        """Places near others, inside the box; draws in [0, 1) are of what lies in between."""
        low, high = self.renderer.bbox
        reach = self.cfg.variation_step * 0.5 * (high - low)
        return (points + (draws * 2 - 1) * reach).clamp(low, high)

    def _surface_variation(
        self, batch: dict[str, Any], out: dict[str, Tensor]
    ) -> Float[Tensor, ""]:
        """How colours vary where rays end, on surfaces; it does not move these.

        Random: which rays, and how far beside, role "surface-variation" of the step, item = rank.
        """
        n_rays = len(batch["rays_o"])
        stream = generator("surface-variation", self.true_global_step, get_rank())
        # Fixed shapes: which rays end on a surface is weighed, not asked.
        chosen = torch.randperm(n_rays, generator=stream)[:N_VARIATION_POINTS]
        draws = torch.rand(len(chosen), 3, generator=stream).to(batch["rays_o"])
        chosen = chosen.to(batch["rays_o"].device)
        rays_o, rays_d, times = (
            batch[name][chosen] for name in ("rays_o", "rays_d", "frame_times")
        )
        opacity, depth = (out[name].detach().view(-1, 1)[chosen] for name in ("opacity", "depth"))
        low, high = self.renderer.bbox
        points = (rays_o + rays_d * depth / opacity.clamp_min(1e-3)).clamp(low, high)
        alphas, rgb = self._opacity_and_colour(points, times, rays_d)
        near_alphas, beside = self._opacity_and_colour(self._beside(points, draws), times, rays_d)
        weights = (opacity > 0.5) * alphas.detach() * near_alphas.detach()
        return surface_variation_loss(rgb, beside, weights[:, 0])

    def _check_rays(self, batch: dict[str, Any]) -> None:
        """Refuse rays that the field cannot see, once; a scheme of training cannot mend them."""
        if getattr(self, "_rays_are_checked", False):
            return
        if "world_rays_o" in batch:
            raise ValueError(
                "data.space is 'ndc'; this system marches rays in the world, where its depth is "
                "measured. Set data.space=world."
            )
        share = _share_inside(batch["rays_o"], batch["rays_d"], self.renderer.bbox)
        if share < MIN_SHARE_OF_RAYS_INSIDE:
            centre = batch["rays_o"].mean(dim=0).tolist()
            raise ValueError(
                f"{share:.1%} of the training rays meet the scene's box, which reaches "
                f"{float(self.renderer.bbox[1, 0]):g} from the origin; cameras stand around "
                f"({', '.join(f'{value:.2f}' for value in centre)}) and see content from "
                f"{batch['near']:.2f} to {batch['far']:.2f} away. Set system.geometry.radius."
            )
        self._rays_are_checked = True


def _share_inside(
    rays_o: Float[Tensor, "n 3"], rays_d: Float[Tensor, "n 3"], bbox: Float[Tensor, "2 3"]
) -> float:
    """How many rays meet the box, as a share of all."""
    from threestudio.models.renderers.volume_rendering import intersect_box

    t_enter, t_exit = intersect_box(rays_o, rays_d, bbox)
    return float((t_exit > t_enter).float().mean())
