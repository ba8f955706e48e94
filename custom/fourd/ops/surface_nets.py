"""Level sets on a regular grid to triangle meshes, by naive surface nets (Gibson 1998).

Every cell that the surface crosses gets one vertex, the mean of the points where its edges are
crossed; every crossed edge joins the four cells around it. That is about a quarter of the vertices
of marching tetrahedra, in triangles of even shape, which is what a file of many meshes wants. The
price: a vertex lies inside of a curved surface by about size^2 / (8 R), R the radius of curvature.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

_CORNERS = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
# Corner i of a cell is at (i >> 2, i >> 1 & 1, i & 1), so two that differ in one bit share an edge.
_EDGES = torch.tensor([[a, a | bit] for bit in (4, 2, 1) for a in range(8) if not a & bit])


def surface_nets(
    level: Float[Tensor, "nx ny nz"],
) -> tuple[Float[Tensor, "n_vertices 3"], Int[Tensor, "n_faces 3"]]:
    """Extract the zero level; negative is inside, triangles face the positive side.

    Not differentiable. Where the inside reaches the border of the grid the surface is open.

    Returns:
        v_pos: in grid units, 0 to n - 1 along each axis.
        t_pos_idx: vertex indices, counter-clockwise seen from outside.

    Raises:
        ValueError: fewer than two points along an axis.
    """
    if level.ndim != 3 or min(level.shape) < 2:
        raise ValueError(
            f"level has shape {tuple(level.shape)}; expected at least two points along three axes."
        )
    inside = level < 0
    cells = _crossed_cells(inside)
    v_pos = _vertices(level, cells)
    index = torch.full([n - 1 for n in level.shape], -1, device=level.device)
    index[tuple(cells.T)] = torch.arange(len(cells), device=level.device)
    quads = torch.cat([_quads(inside, index, axis) for axis in range(3)])
    return v_pos, _triangles(v_pos, quads)


def _crossed_cells(inside: Tensor) -> Int[Tensor, "m 3"]:
    count = torch.zeros([n - 1 for n in inside.shape], dtype=torch.int8, device=inside.device)
    for i, j, k in _CORNERS.tolist():
        count += inside[
            i : inside.shape[0] - 1 + i, j : inside.shape[1] - 1 + j, k : inside.shape[2] - 1 + k
        ]
    return ((count > 0) & (count < 8)).nonzero()


def _vertices(level: Tensor, cells: Int[Tensor, "m 3"]) -> Float[Tensor, "m 3"]:
    corners = cells[:, None] + _CORNERS.to(cells)
    ends = level[tuple(corners.unbind(-1))][:, _EDGES.to(cells.device)]  # [m, 12, 2]
    crossed = (ends[..., 0] < 0) != (ends[..., 1] < 0)
    difference = torch.where(crossed, ends[..., 0] - ends[..., 1], torch.ones_like(ends[..., 0]))
    share = (ends[..., 0] / difference)[..., None]
    first, last = _CORNERS[_EDGES[:, 0]].to(level), _CORNERS[_EDGES[:, 1]].to(level)
    points = torch.lerp(first.expand(len(cells), 12, 3), last.expand(len(cells), 12, 3), share)
    weight = crossed[..., None].to(level)
    return cells.to(level) + (points * weight).sum(1) / weight.sum(1)


def _quads(inside: Tensor, index: Tensor, axis: int) -> Int[Tensor, "q 4"]:
    """The cells around every crossed edge along an axis, counter-clockwise from the outside."""
    order = [axis, (axis + 1) % 3, (axis + 2) % 3]  # cyclic, so the turn keeps its sense
    inside, index = inside.permute(order), index.permute(order)
    low, high = inside[:-1, 1:-1, 1:-1], inside[1:, 1:-1, 1:-1]
    a, b, c = (low != high).nonzero().unbind(-1)  # the edge's second corner is at b + 1, c + 1
    around = torch.stack(
        [index[a, b, c], index[a, b + 1, c], index[a, b + 1, c + 1], index[a, b, c + 1]], dim=-1
    )
    return torch.where(low[a, b, c][:, None], around, around.flip(-1))


def _triangles(v_pos: Tensor, quads: Int[Tensor, "q 4"]) -> Int[Tensor, "n_faces 3"]:
    """Cut each quad along its shorter diagonal."""
    corners = v_pos[quads]
    first = (corners[:, 0] - corners[:, 2]).norm(dim=-1)
    second = (corners[:, 1] - corners[:, 3]).norm(dim=-1)
    along_first = torch.stack([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]], dim=1)
    along_second = torch.stack([quads[:, [0, 1, 3]], quads[:, [1, 2, 3]]], dim=1)
    return torch.where((first <= second)[:, None, None], along_first, along_second).reshape(-1, 3)
