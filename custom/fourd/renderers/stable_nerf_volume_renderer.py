"""Training images rendered in interleaved blocks, so that what is only passing stays small.

Shapes: ``B H W`` the image batch; block (i, j) of Y x X holds the pixels [:, i::Y, j::X], a small
image of the whole view, so that all blocks meet about equally many samples.
"""

from dataclasses import dataclass
from typing import Any

import threestudio
import torch
from jaxtyping import Float, Int
from threestudio.models.background.base import BaseBackground, background_of_batch
from threestudio.models.geometry.base import BaseImplicitGeometry
from threestudio.models.materials.base import BaseMaterial
from threestudio.models.renderers.nerf_volume_renderer import NeRFVolumeRenderer
from threestudio.models.renderers.wrapper_renderer import WrapperRenderer
from torch import Tensor

from .mask_nerf_volume_renderer import MaskNerfVolumeRenderer


@threestudio.register("stable-nerf-volume-renderer")
class StableNerfVolumeRenderer(WrapperRenderer):
    """Renders training images block by block with another renderer, evaluation images at once.

    The images are those of the base renderer: jitter and background are drawn for whole images.
    Over `mask-nerf-volume-renderer` each block has its equal share of the step's budget of samples
    with a gradient. Checkpoints are those of the base renderer too: nothing in the names of their
    entries tells which of the renderers wrote them.
    """

    @dataclass
    class Config(WrapperRenderer.Config):
        base_renderer_type: str = "mask-nerf-volume-renderer"
        """Registered name of the renderer of the blocks."""
        mode: str = "interval"
        """How an image is cut; only "interval"."""
        block_nums: Any = (3, 3)
        """Blocks along the height and the width."""
        radius: float | None = None
        """Replaces base_renderer.radius, if given."""
        num_samples_per_ray: int | None = None
        """Replaces base_renderer.num_samples_per_ray, if given, so that one override fits all
        renderers."""

    cfg: Config

    def configure(
        self,
        geometry: BaseImplicitGeometry,
        material: BaseMaterial,
        background: BaseBackground,
    ) -> None:
        if self.cfg.mode != "interval":
            raise ValueError(f"mode is {self.cfg.mode!r}; expected 'interval', the only one.")
        blocks = [int(number) for number in self.cfg.block_nums]
        if len(blocks) != 2 or min(blocks) < 1:
            raise ValueError(
                f"block_nums is {blocks}; expected two positive numbers, such as [3, 3]."
            )
        self._block_nums = blocks[0], blocks[1]
        super().configure(geometry, material, background)

    def base_config(self) -> dict[str, Any]:
        """Return the base renderer's configuration with the keys that this one replaces."""
        replaced = {name: getattr(self.cfg, name) for name in ("radius", "num_samples_per_ray")}
        given = {name: value for name, value in replaced.items() if value is not None}
        return {**self.cfg.base_renderer, **given}

    # The base renderer's state under the base renderer's names

    @property
    def estimator(self) -> Any:
        """Where the base renderer keeps what is empty."""
        return self.base_renderer.estimator

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the base renderer alone would give it."""
        return self.base_renderer.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        inner = f"{prefix}base_renderer."
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if not key.startswith(inner):
                state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Rendering

    def forward(
        self,
        rays_o: Float[Tensor, "B H W 3"],
        rays_d: Float[Tensor, "B H W 3"],
        light_positions: Float[Tensor, "B 3"],
        bg_color: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Render images; arguments, randomness and outputs are the base renderer's.

        The samples of a block follow each other in the per-sample outputs; ``ray_indices`` counts
        the rays of the whole images. A block that meets nothing adds one sample of no length.
        """
        if not self.training:
            return self.base_renderer(rays_o, rays_d, light_positions, bg_color, **kwargs)
        shape, device = rays_o.shape[:3], rays_o.device
        if bg_color is None:
            bg_color = background_of_batch(self.background, rays_d, kwargs)
        shared, jitter = self._shared_arguments(rays_o, kwargs)
        numbers = torch.arange(shape.numel(), device=device).view(shape)
        parts, pixels = [], []
        for number, cut in enumerate(self._blocks(*shape[1:])):
            own: dict[str, Any] = {} if jitter is None else {"ray_jitter": jitter[cut]}
            if "gradient_budget" in shared:
                own["block"] = number
            parts.append(
                self.base_renderer(
                    rays_o[cut],
                    rays_d[cut],
                    light_positions,
                    bg_color if bg_color.ndim == 2 else bg_color[cut],
                    **kwargs,
                    **shared,
                    **own,
                )
            )
            pixels.append(numbers[cut])
        return _join(parts, pixels, (shape[1], shape[2]))

    def _blocks(self, height: int, width: int) -> list[tuple[slice, slice, slice]]:
        """Cuts of an image batch; no more blocks than there are rows and columns."""
        rows, columns = min(self._block_nums[0], height), min(self._block_nums[1], width)
        return [
            (slice(None), slice(i, None, rows), slice(j, None, columns))
            for i in range(rows)
            for j in range(columns)
        ]

    def _shared_arguments(
        self, rays_o: Tensor, batch: dict[str, Any]
    ) -> tuple[dict[str, Any], Float[Tensor, "B H W"] | None]:
        """What all blocks get beyond the batch, and the jitter that is cut like the rays."""
        base = self.base_renderer
        jitter = base.draw_jitter(rays_o) if isinstance(base, NeRFVolumeRenderer) else None
        if not isinstance(base, MaskNerfVolumeRenderer):
            return {}, jitter
        is_video = bool(batch.get("is_video", False))
        budget = base.gradient_budget(batch.get("frame_times"), is_video, batch.get("num_frames"))
        if budget is None:
            return {}, jitter
        n_blocks = len(self._blocks(*rays_o.shape[1:3]))
        return {"gradient_budget": max(1, budget // n_blocks)}, jitter


def _join(
    parts: list[dict[str, Tensor]], pixels: list[Int[Tensor, "B h w"]], size: tuple[int, int]
) -> dict[str, Tensor]:
    """One output from those of the blocks; ``pixels`` holds the number of each ray in the whole."""
    first_image = torch.cat([index[0].reshape(-1) for index in pixels])
    place = torch.argsort(first_image)
    output: dict[str, Tensor] = {}
    for key, first in parts[0].items():
        values = [part[key] for part in parts]
        if key == "ray_indices":
            numbers = [index.reshape(-1)[value] for index, value in zip(pixels, values)]
            output[key] = torch.cat(numbers)
        elif _is_image(first, pixels[0]):
            rows = torch.cat([value.flatten(1, 2) for value in values], dim=1)
            output[key] = rows.index_select(1, place).unflatten(1, size)
        elif isinstance(first, Tensor) and first.ndim > 0:
            output[key] = torch.cat(values)
        else:
            output[key] = first
    return output


def _is_image(value: Any, pixels: Int[Tensor, "B h w"]) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.shape[:3] == pixels.shape
