"""A resampler whose tokens look at squares of the image from the beginning.

What an image prompt shows where is learned late: queries must find patches by position, and until
they do, all tokens say the same. Here some dimensions of the vision encoder's position embedding,
of the resampler's queries and of both sides of its attention begin as codes of places, so that
token k looks at square k of the image, with each of the four blocks at another quarter of it.
Training may change all of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.models.embeddings import IPAdapterPlusImageProjection
    from transformers import CLIPVisionModelWithProjection

HARMONICS = (1, 2, 3, 4)
CODE_SIZE = 4 * len(HARMONICS)
"""Cosine and sine of each harmonic, along both axes."""
QUARTERS = ((-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5))
"""Rows and columns of patches from a square's middle, one for each block of the resampler."""
GAIN = 1.3
"""Of attention's codes: the patch that is meant gets about two thirds of the weight."""
OTHERS_SCALE, POSITIONS_STD = 0.3, 0.05
"""What remains of attention's other rows, and of the position embedding's other dimensions."""


def place_codes(
    rows: Float[Tensor, "n"], columns: Float[Tensor, "n"], edge: int
) -> Float[Tensor, "n 16"]:
    """Codes of places in an image of `edge` x `edge` patches, in patches from its corner.

    A turn is two edges long, so that places at opposite edges differ.
    """
    angles = [k * math.pi * place / edge for place in (rows, columns) for k in HARMONICS]
    return torch.stack([f(angle) for angle in angles for f in (torch.cos, torch.sin)], dim=1)


def shift_of_codes(rows: float, columns: float, edge: int) -> Float[Tensor, "16 16"]:
    """The matrix that takes a place's code to that of a place so many patches further."""
    turns = []
    for distance in (rows, columns):
        for k in HARMONICS:
            angle = k * math.pi * distance / edge
            cos, sin = math.cos(angle), math.sin(angle)
            turns.append(torch.tensor(((cos, -sin), (sin, cos))))
    return torch.block_diag(*turns)


@torch.no_grad()
def look_at_squares(
    vision: CLIPVisionModelWithProjection, resampler: IPAdapterPlusImageProjection
) -> None:
    """Let token k of an untrained adapter look at square k of the image, in rows from the top.

    Draws from torch's global generator.

    Raises:
        ValueError: the tokens are no square number, or their squares are not 2 x 2 patches.
    """
    position = vision.vision_model.embeddings.position_embedding.weight
    edge, squares = math.isqrt(len(position) - 1), math.isqrt(resampler.latents.shape[1])
    if squares**2 != resampler.latents.shape[1] or edge != 2 * squares:
        raise ValueError(
            f"{resampler.latents.shape[1]} tokens over {edge} x {edge} patches: expected one token "
            "for each square of 2 x 2 patches; change num_tokens or the patch size."
        )
    code = slice(0, CODE_SIZE)
    position.normal_(std=POSITIONS_STD)
    position[1:, code] = place_codes(*_grid(edge, 0.5, 1.0), edge)
    resampler.latents[0, :, code] = place_codes(*_grid(squares, 1.0, 2.0), edge)
    resampler.proj_in.bias[code] = 0
    _set_code(resampler.proj_in.weight, torch.eye(CODE_SIZE))
    for block, quarter in zip(resampler.layers, QUARTERS, strict=True):
        attention = block.attn
        shift = shift_of_codes(*quarter, edge)
        for weight, codes in (
            (attention.to_q.weight, shift),
            (attention.to_k.weight, torch.eye(CODE_SIZE)),
        ):
            weight.mul_(OTHERS_SCALE)
            _set_code(weight, GAIN * codes)


def _grid(count: int, first: float, step: float) -> tuple[Tensor, Tensor]:
    """Rows and columns of `count` x `count` places."""
    places = first + step * torch.arange(count)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    return rows.flatten(), columns.flatten()


def _set_code(weight: Tensor, codes: Tensor) -> None:
    weight[:CODE_SIZE] = 0
    weight[:CODE_SIZE, :CODE_SIZE] = codes
