"""DreamFusion on a part of each image's rays, the pixels between them filled in."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

import threestudio
from threestudio.systems.dreamfusion import DreamFusion


def fill_between(
    sampled: Float[Tensor, "B h w C"], places: Int[Tensor, "h w"], height: int, width: int
) -> Float[Tensor, "B H W C"]:
    """Return whole images from a regular grid of their pixels, bilinearly; differentiable.

    Args:
        sampled: the pixels.
        places: where each stands in the whole image, row by row: row * width + column.
        height: rows of the whole image. width: its columns.

    Beyond the outermost pixels their colour is repeated.
    """
    rows, columns = places[:, 0] // width, places[0] % width
    down = _between(rows, height).to(sampled)
    across = _between(columns, width).to(sampled)
    grid = torch.stack(torch.broadcast_tensors(across[None, :], down[:, None]), dim=-1)
    images = F.grid_sample(
        sampled.permute(0, 3, 1, 2),
        grid.expand(len(sampled), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=True,
    )
    return images.permute(0, 2, 3, 1)


def _between(kept: Int[Tensor, "n"], size: int) -> Float[Tensor, "size"]:
    """Where each of ``size`` places lies among the kept ones, from -1 (first) to 1 (last)."""
    if len(kept) == 1:
        return torch.zeros(size, device=kept.device)
    steps = torch.arange(size, device=kept.device) - kept[0]
    return 2.0 * steps / (kept[-1] - kept[0]) - 1.0


@threestudio.register("efficient-dreamfusion-system")
class EffDreamFusion(DreamFusion):
    """Goes with `eff-random-camera-datamodule`, whose batches say which rays they hold."""

    @dataclass
    class Config(DreamFusion.Config):
        """No further keys."""

    cfg: Config

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Render the batch's cameras; ``comp_rgb`` is of the whole image, the rest of the rays."""
        out = super().forward(batch)
        places = batch.get("efficiency_mask")
        if places is None:
            return out
        size = int(batch["height"]), int(batch["width"])
        return {**out, "comp_rgb": fill_between(out["comp_rgb"], places, *size)}
