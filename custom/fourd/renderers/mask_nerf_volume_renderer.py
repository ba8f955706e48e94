"""A volume renderer whose gradients pass through a limited number of samples.

What fills the memory of a training step is not the samples but what the networks keep of each for
their backward pass. Here a random subset is evaluated as in training and the rest without a graph;
the image is composited from both and is the plain renderer's image.

Shapes: ``B H W`` the image batch; ``Ns`` samples of all rays, of which ``K`` keep a gradient.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float, Int
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.nerf_volume_renderer import NeRFVolumeRenderer
from threestudio.models.renderers.volume_rendering import RayBatch, RaySamples
from threestudio.utils.misc import get_rank
from threestudio.utils.rng import generator
from torch import Tensor


@threestudio.register("mask-nerf-volume-renderer")
class MaskNerfVolumeRenderer(NeRFVolumeRenderer):
    """`nerf-volume-renderer` with a budget of samples that keep a gradient.

    Of Ns samples K are drawn without replacement. With dL/df_i the derivative by a sample's density
    and colour, which is exact, the plain gradient is the sum of dL/df_i df_i/dtheta over all
    samples; here it is Ns / K times the sum over the drawn ones, whose expectation is the same.
    The published renderer leaves Ns / K out, so that crowded steps count for less;
    ``rescale_gradients: false`` does that.
    """

    @dataclass
    class Config(NeRFVolumeRenderer.Config):
        train_max_nums: float = 6e6
        """Samples with a gradient per scene time of a step, over all its cameras; 0 means all. A
        clip of 16 frames has 16 times this, an image or view group once."""
        train_max_nums_static: float | None = None
        """The same for steps that are not clips; null takes train_max_nums."""
        rescale_gradients: bool = True
        """Scale the gradients of the drawn samples so that they are right on average; false is the
        published way."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        super().configure(geometry, material, background)
        for name in ("train_max_nums", "train_max_nums_static"):
            value = getattr(self.cfg, name)
            if value is not None and value < 0:
                raise ValueError(
                    f"{name} is {value:g}; expected a number of samples, or 0 for no limit."
                )
        if self.cfg.return_normal_perturb:
            raise ValueError(
                "return_normal_perturb is true; it would evaluate every sample with a gradient "
                "again, whatever train_max_nums allows. Use renderer_type nerf-volume-renderer."
            )
        self._budget: int | None = None
        self._block = 0

    def gradient_budget(
        self,
        frame_times: Float[Tensor, "..."] | None,
        is_video: bool,
        num_frames: int | None = None,
    ) -> int | None:
        """Samples with a gradient that a whole step may have; None for all.

        Args:
            frame_times: scene times of the step's images; each distinct one has its own share.
            is_video: whether the step renders a clip.
            num_frames: how many distinct times these are, where the batch says so. It saves
                counting them, for which the host waits for a GPU.
        """
        per_time = self.cfg.train_max_nums
        if not is_video and self.cfg.train_max_nums_static is not None:
            per_time = self.cfg.train_max_nums_static
        if per_time == 0:
            return None
        if frame_times is None:
            return int(per_time)
        if num_frames is None:
            num_frames = frame_times.unique().numel()
        return int(per_time) * int(num_frames)

    def forward(
        self,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        light_positions: Float[Tensor, "B 3"],
        bg_color: Tensor | None = None,
        frame_times: Float[Tensor, "B"] | None = None,
        ray_jitter: Float[Tensor, "B H W"] | None = None,
        gradient_budget: int | None = None,
        block: int = 0,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Render images; see `NeRFVolumeRenderer.forward`.

        Args:
            gradient_budget: samples with a gradient in this call; None takes `gradient_budget`.
            block: which piece of the step's images this is; names the random stream.
            **kwargs: "is_video" of the batch chooses the budget, "num_frames" tells its times.

        Random: besides the jitter the samples with a gradient, role "gradient-samples", one stream
        per block and rank. The forward values do not depend on it.
        """
        if gradient_budget is None:
            is_video = bool(kwargs.get("is_video", False))
            num_frames = kwargs.get("num_frames")
            gradient_budget = self.gradient_budget(frame_times, is_video, num_frames)
        self._budget, self._block = gradient_budget, block
        return super().forward(
            rays_o, rays_d, light_positions, bg_color, frame_times, ray_jitter, **kwargs
        )

    def _shade(
        self,
        rays: RayBatch,
        samples: RaySamples,
        light_positions: Float[Tensor, "B 3"],
        batch: dict[str, Any],
    ) -> dict[str, Tensor]:
        n_samples, budget = samples.n_samples, self._budget
        keeps_graph = self.training and torch.is_grad_enabled()
        if not keeps_graph or budget is None or n_samples <= budget:
            return super()._shade(rays, samples, light_positions, batch)
        if self._samplers.of(samples.t_starts.device, self.training).is_static:
            chosen, rest, scale = self._choose_of_list(samples, budget)
        else:
            chosen = self._choose(n_samples, budget, samples.ray_indices.device)
            is_rest = torch.ones(n_samples, dtype=torch.bool, device=chosen.device)
            is_rest[chosen] = False
            rest, scale = is_rest.nonzero()[:, 0], n_samples / budget
        if not self.cfg.rescale_gradients:
            scale = 1.0
        # The part with a graph first: under autocast the other would leave casts of the weights
        # behind that carry no gradient.
        kept = super()._shade(rays, samples.select(chosen), light_positions, batch)
        with torch.no_grad():
            bare = super()._shade(rays, samples.select(rest), light_positions, batch)
        return {
            key: _merge(value, bare[key], chosen, rest, scale)
            if _is_per_sample(value, budget)
            else value
            for key, value in kept.items()
        }

    def _choose(self, n_samples: int, count: int, device: torch.device) -> Int[Tensor, "K"]:
        """Draw indices without replacement, ascending; on the device, for there may be millions."""
        order = torch.randperm(n_samples, generator=self._stream(device), device=device)
        return order[:count].sort().values

    def _choose_of_list(
        self, samples: RaySamples, count: int
    ) -> tuple[Int[Tensor, "K"], Int[Tensor, "n_rest"], Float[Tensor, ""]]:
        """Draw from a list of fixed length, padding only where nothing else is left.

        Returns:
            the drawn ones and the others, ascending, and how many there are for each one drawn.
        """
        device, is_padding = samples.t_starts.device, samples.is_padding
        keys = torch.rand(samples.n_samples, generator=self._stream(device), device=device)
        order = (keys + is_padding).argsort()
        scale = ((~is_padding).sum() / count).clamp(min=1.0)
        return order[:count].sort().values, order[count:].sort().values, scale

    def _stream(self, device: torch.device) -> torch.Generator:
        item = get_rank() * 1000 + self._block
        return generator("gradient-samples", self._step, item, device)


def _is_per_sample(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count


def _merge(
    kept: Float[Tensor, "K *C"],
    bare: Float[Tensor, "n_rest *C"],
    chosen: Int[Tensor, "K"],
    rest: Int[Tensor, "n_rest"],
    scale: float | Float[Tensor, ""],
) -> Float[Tensor, "Ns *C"]:
    """Put two parts back in the order of the samples; gradients of ``kept`` are times ``scale``."""
    if kept.requires_grad and (isinstance(scale, Tensor) or scale != 1.0):
        # A node of its own: a hook on `kept` itself would also scale what reaches it through
        # other outputs made from it.
        kept = kept.view_as(kept)
        kept.register_hook(lambda grad: grad * scale)
    merged = bare.new_empty((chosen.numel() + rest.numel(), *bare.shape[1:]))
    return merged.index_copy_(0, rest, bare).index_copy(0, chosen, kept)
