"""Training images of which one patch is rendered in full, and the rest coarsely.

Shapes: ``B H W`` the image batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

import threestudio
from threestudio.models.background.base import BaseBackground
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.wrapper_renderer import WrapperRenderer
from threestudio.utils.rng import generator


@threestudio.register("patch-renderer")
class PatchRenderer(WrapperRenderer):
    """Renders every n-th ray, enlarges that to the whole image, and puts one sharp patch into it.

    Evaluation images are rendered whole.
    """

    @dataclass
    class Config(WrapperRenderer.Config):
        patch_size: int = 128
        """Edge of the patch in pixels; at most the image's."""
        global_detach: bool = False
        """Let no gradient pass through what is outside the patch."""
        global_downsample: int = 4
        """Every n-th row and column is rendered for the whole image."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        """Build the base renderer, which has the box and the parts.

        Raises:
            ValueError: a value of the configuration cannot work.
        """
        for key in ("patch_size", "global_downsample"):
            if self.cfg[key] < 1:
                raise ValueError(f"{key} is {self.cfg[key]}; expected a positive number of pixels.")
        super().configure(geometry, material, background)
        self._step = 0

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        self._step = global_step

    def forward(
        self,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        light_positions: Float[Tensor, "B 3"],
        bg_color: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Render images; arguments and outputs are the base renderer's.

        Images ``[B, H, W, ...]`` are put together from both renders; what is counted by samples is
        that of the coarse render alone. A background given per pixel is cut like the rays.

        Random: the place of the patch, role "patch" of the step, shared by all images and ranks.
        """
        base = self.base_renderer
        if not self.training:
            return base(rays_o, rays_d, light_positions, bg_color, **kwargs)
        height, width = rays_o.shape[1:3]
        stride = min(self.cfg.global_downsample, height, width)
        coarse = (slice(None), slice(None, None, stride), slice(None, None, stride))
        patch = (slice(None), *self._patch(height, width))

        def render(cut: tuple[slice, slice, slice]) -> dict[str, Tensor]:
            color = bg_color
            if color is not None and color.ndim == 4:
                color = color[cut]
            return base(rays_o[cut], rays_d[cut], light_positions, color, **kwargs)

        whole, sharp = render(coarse), render(patch)
        shape = rays_o[coarse].shape[:3]
        output = dict(whole)
        for key, value in whole.items():
            if isinstance(value, Tensor) and value.ndim == 4 and value.shape[:3] == shape:
                enlarged = _enlarged(value, (height, width))
                if self.cfg.global_detach:
                    enlarged = enlarged.detach()
                output[key] = _with_patch(enlarged, sharp[key], patch)
        return output

    def _patch(self, height: int, width: int) -> tuple[slice, slice]:
        rows, columns = min(self.cfg.patch_size, height), min(self.cfg.patch_size, width)
        stream = generator("patch", self._step)
        top = int(torch.randint(height - rows + 1, (), generator=stream))
        left = int(torch.randint(width - columns + 1, (), generator=stream))
        return slice(top, top + rows), slice(left, left + columns)


def _enlarged(image: Float[Tensor, "B h w C"], size: tuple[int, int]) -> Float[Tensor, "B H W C"]:
    channels_first = image.permute(0, 3, 1, 2)
    larger = F.interpolate(channels_first, size, mode="bilinear", align_corners=False)
    return larger.permute(0, 2, 3, 1)


def _with_patch(
    image: Float[Tensor, "B H W C"], patch: Tensor, place: tuple[slice, slice, slice]
) -> Float[Tensor, "B H W C"]:
    mixed = image.clone()
    mixed[place] = patch
    return mixed
