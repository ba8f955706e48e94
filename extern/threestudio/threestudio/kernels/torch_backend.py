"""The PyTorch twin of the hash grid: it defines the semantics of every back end.

Pure torch operations: any floating dtype, any device, differentiable twice with respect to
positions and table. The forward pass holds one level at a time; autograd keeps the corner weights
and values of all levels for the backward pass.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from threestudio.kernels.grid_layout import HASH_PRIMES, GridLayout

# Grid coordinates saturate here, so that cell numbers fit 32 bits. Within +-2^30 cells, that is
# for all sensible input, this changes nothing.
COORDINATE_LIMIT = 2.0**30

_UINT32 = 0xFFFFFFFF


def encode(
    x: Float[Tensor, "n d"], params: Float[Tensor, "p"], layout: GridLayout
) -> Float[Tensor, "n f"]:
    """Multilinear interpolation of the table at every level; features ordered by level.

    Args:
        x: positions, nominally in [0, 1]. Outside, the grid continues with wrapped (dense level)
            or hashed indices; a NaN coordinate gives NaN features. No index ever leaves its level.
        params: the flat table of ``layout.n_params`` numbers.

    Returns:
        Features in the dtype of ``params``, differentiable with respect to both arguments. The
        derivative with respect to a position jumps at cell faces.
    """
    tables = params.view(-1, layout.n_features_per_level).split(list(layout.entries))
    features = [_encode_level(x, tables[lvl], layout, lvl) for lvl in range(layout.n_levels)]
    return torch.cat(features, dim=-1).to(params.dtype)


def _encode_level(x: Tensor, table: Tensor, layout: GridLayout, level: int) -> Tensor:
    position = x * layout.scales[level] + 0.5
    position = position.clamp(-COORDINATE_LIMIT, COORDINATE_LIMIT)
    cell = position.detach().floor()
    index = corner_indices(torch.nan_to_num(cell, nan=0.0).long(), layout, level)
    weights = _corner_weights(position - cell)
    values = table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])
    return (weights.unsqueeze(-1) * values).sum(dim=1)


def corner_indices(
    cell: Int[Tensor, "n d"], layout: GridLayout, level: int
) -> Int[Tensor, "n corners"]:
    """Table entry of each of the 2^D corners of integer cells; the first axis varies slowest.

    All arithmetic is modulo 2^32, as in the kernels; negative cells wrap like unsigned numbers.
    """
    hashed = layout.is_hashed(level)
    index: Tensor | None = None
    for dim in range(layout.n_input_dims):
        factor = HASH_PRIMES[dim] if hashed else layout.resolutions[level] ** dim
        along = torch.stack((cell[:, dim], cell[:, dim] + 1), dim=-1) * factor & _UINT32
        if index is None:
            index = along
        elif hashed:
            index = (index.unsqueeze(-1) ^ along.unsqueeze(1)).flatten(1)
        else:
            index = (index.unsqueeze(-1) + along.unsqueeze(1)).flatten(1)
    assert index is not None
    return (index & _UINT32) % layout.entries[level]


def _corner_weights(fraction: Tensor) -> Tensor:
    """Multilinear weights [n, 2^D] from fractions [n, D], in the order of `corner_indices`."""
    pairs = torch.stack((1 - fraction, fraction), dim=-1)
    weights = pairs[:, 0]
    for dim in range(1, pairs.shape[1]):
        weights = (weights.unsqueeze(-1) * pairs[:, dim].unsqueeze(1)).flatten(1)
    return weights
