"""Batches of pairs: cells laid over a background, colours jittered alike in both, and deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from threestudio.data.camera_sampling import ItemSpan
from threestudio.utils.rng import rand_items
from torch import Tensor

from .pair_cells import CellMemory, CellSource, delta_view
from .pair_places import pair_places
from .pair_sampling import PairChoice

LUMA = (0.299, 0.587, 0.114)
RANDOM_BACKGROUNDS = ("random", "random_gray")
WHITE = (1.0, 1.0, 1.0)


def draw_backgrounds(background: Any, span: ItemSpan) -> Float[Tensor, "n 3"]:
    """Return the background of each pair, one colour for both of its frames.

    Args:
        background: a colour in [0, 1], "random" for any colour or "random_gray" for any grey;
            random from the role "pair-background".
    """
    if background == "random":
        return rand_items((span.count, 3), "pair-background", span.step, span.first)
    if background == "random_gray":
        grey = rand_items((span.count, 1), "pair-background", span.step, span.first)
        return grey.expand(-1, 3)
    return torch.tensor([float(value) for value in background]).expand(span.count, 3)


def scoring_background(background: Any) -> Float[Tensor, "3"]:
    """Return the colour behind scored images: the config's, or white where that is random."""
    colour = WHITE if background in RANDOM_BACKGROUNDS else background
    return torch.tensor([float(value) for value in colour])


def draw_jitter(
    strength: float, span: ItemSpan
) -> tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 3"]]:
    """Return each pair's change of colour, rgb -> matrix @ rgb + offset; both frames share it.

    Brightness, contrast (about mid-grey) and saturation are scaled by U[1 - s, 1 + s], and the hue
    turns by U[-s, s] radians; random from the role "pair-jitter".

    Args:
        strength: s, in [0, 0.5].
    """
    unit = rand_items((span.count, 4), "pair-jitter", span.step, span.first) * 2 - 1
    brightness, contrast, saturation = (1 + strength * unit[:, :3]).unbind(dim=1)
    luma = torch.tensor(LUMA).expand(3, 3)
    matrix = saturation[:, None, None] * torch.eye(3) + (1 - saturation)[:, None, None] * luma
    matrix = _hue_turns(strength * unit[:, 3]) @ matrix
    matrix = (brightness * contrast)[:, None, None] * matrix
    return matrix, ((1 - contrast) * 0.5)[:, None].expand(-1, 3)


def _hue_turns(angle_rad: Float[Tensor, "n"]) -> Float[Tensor, "n 3 3"]:
    """Turns about the axis of greys (Rodrigues)."""
    axis = torch.full((3,), 3**-0.5)
    x, y, z = axis
    zero = torch.zeros(())
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3)
    sin, cos = angle_rad.sin()[:, None, None], angle_rad.cos()[:, None, None]
    return cos * torch.eye(3) + sin * cross + (1 - cos) * torch.outer(axis, axis)


def lay_over(
    cells: UInt8[Tensor, "n h w 4"],
    backgrounds: Float[Tensor, "n 3"],
    jitter: tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 3"]] | None = None,
) -> tuple[Float[Tensor, "n h w 3"], Float[Tensor, "n h w 1"]]:
    """Return colour over a background and alpha, in [0, 1].

    Args:
        jitter: changes the colour of what the cells show, and the background not; see
            `draw_jitter`.
    """
    values = cells.float() / 255.0
    colour, alpha = values[..., :3], values[..., 3:]
    if jitter is not None:
        matrix, offset = jitter
        colour = torch.einsum("nij,nhwj->nhwi", matrix, colour) + alpha * offset[:, None, None]
        colour = colour.clamp_min(0.0).minimum(alpha)
    return (colour + (1 - alpha) * backgrounds[:, None, None]).clamp(0, 1), alpha


def pair_batch(
    sources: Sequence[CellSource],
    memory: CellMemory,
    choice: PairChoice,
    backgrounds: Float[Tensor, "n 3"],
    jitter: tuple[Float[Tensor, "n 3 3"], Float[Tensor, "n 3"]] | None = None,
) -> dict[str, Any]:
    """Return a batch of pairs; see `FourdPairDataModule` for its keys.

    Args:
        sources: scenes by their places. memory: of cells that cost much. choice: which pairs.
        backgrounds: colour behind both frames of each pair. jitter: see `draw_jitter`.
    """
    chosen = [sources[place] for place in choice.scene.tolist()]
    batch: dict[str, Any] = {"scene_id": [source.scene_id for source in chosen]}
    batch["caption"] = [source.caption for source in chosen]
    sides = {"cond": (choice.frame_i, choice.camera_a), "target": (choice.frame_j, choice.camera_b)}
    for side, (frames, cameras) in sides.items():
        places = zip(chosen, frames.tolist(), cameras.tolist(), strict=True)
        cells = torch.stack([memory.read(*place) for place in places])
        rgb, alpha = lay_over(cells, backgrounds, jitter)
        batch[f"{side}_rgb"], batch[f"{side}_alpha"] = rgb, alpha
    batch |= pair_places(sources, choice)
    batch["delta_time"] = batch["time_j"] - batch["time_i"]
    batch["delta_view"] = delta_view(batch["camera_a"], batch["camera_b"])
    batch["background"] = backgrounds
    batch |= {"scene_index": choice.scene, "pair_kind": choice.kind}
    batch |= {"index_i": choice.frame_i, "index_j": choice.frame_j}
    batch |= {"index_a": choice.camera_a, "index_b": choice.camera_b}
    return batch | _cached(chosen, choice)


def _cached(chosen: list[CellSource], choice: PairChoice) -> dict[str, Tensor]:
    """Latents of the targets and features of the conditions, where all scenes have them."""
    target = zip(chosen, choice.frame_j.tolist(), choice.camera_b.tolist(), strict=True)
    cond = zip(chosen, choice.frame_i.tolist(), choice.camera_a.tolist(), strict=True)
    found = {
        "target_latents": [source.read_latents(j, b) for source, j, b in target],
        "cond_features": [source.read_features(i, a) for source, i, a in cond],
    }
    return {
        key: torch.stack(rows)
        for key, rows in found.items()
        if all(row is not None for row in rows)
    }
