"""A texture atlas of single triangles: every triangle has its own half of a square cell.

It needs no unwrapping, hence nothing that could fail or take an hour; the price is that a chart is
one triangle, so a texture cannot be painted by hand and shrinks badly. Shapes: ``Nf`` triangles in
cells of ``c`` x ``c`` texels.

Texel (x, y) has its middle at (x + 1/2, y + 1/2). In its cell one triangle has its corners on the
middles of (0, 0), (c - 3, 0) and (0, c - 3), the other the same seen from the opposite corner. So
whatever is read between the corners, bilinearly too, is made of the triangle's own texels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

SMALLEST_CELL = 4


@dataclass(frozen=True)
class TriangleAtlas:
    """Where each triangle lies in a square texture."""

    n_triangles: int
    cells_per_side: int
    cell_px: int

    @property
    def size_px(self) -> int:
        """Side of the texture."""
        return self.cells_per_side * self.cell_px

    def corners(self) -> Float[Tensor, "Nf 3 2"]:
        """Texture coordinates in [0, 1] of the corners of each triangle, v downwards."""
        reach = self.cell_px - 3
        near = torch.tensor([[0, 0], [reach, 0], [0, reach]])
        far = self.cell_px - 1 - near
        own = torch.stack([near, far])[torch.arange(self.n_triangles) % 2]
        return (self._origins()[:, None] + own + 0.5) / self.size_px

    def texels(
        self, first: int, last: int
    ) -> tuple[Int[Tensor, "n_texels"], Int[Tensor, "n_texels"], Float[Tensor, "n_texels 3"]]:
        """The texels of a range of triangles.

        Returns:
            triangles: which one each belongs to.
            places: row-major index in the texture.
            barycentric: of the texel's middle; beyond the triangle's longest side negative, on
                its plane all the same.
        """
        cell = torch.arange(self.cell_px)
        y, x = torch.meshgrid(cell, cell, indexing="ij")
        own = torch.stack([x, y], dim=-1)[x + y < self.cell_px]
        mirrored = self.cell_px - 1 - own[own.sum(-1) < self.cell_px - 1]
        numbers = torch.arange(first, last)
        parts = []
        for parity, inside in ((0, own), (1, mirrored)):
            chosen = numbers[numbers % 2 == parity]
            steps = inside if parity == 0 else self.cell_px - 1 - inside
            share = steps / (self.cell_px - 3)
            weights = torch.cat([1 - share.sum(-1, keepdim=True), share], dim=-1)
            places = self._origins()[chosen][:, None] + inside
            parts.append((
                chosen[:, None].expand(-1, len(inside)).reshape(-1),
                (places[..., 1] * self.size_px + places[..., 0]).reshape(-1),
                weights.repeat(len(chosen), 1),
            ))  # fmt: skip
        return tuple(torch.cat(columns) for columns in zip(*parts))

    def _origins(self) -> Int[Tensor, "Nf 2"]:
        cells = torch.arange(self.n_triangles) // 2
        column = cells % self.cells_per_side
        return torch.stack([column, cells // self.cells_per_side], dim=-1) * self.cell_px


def plan_atlas(n_triangles: int, texture_size: int) -> TriangleAtlas:
    """Lay out triangles in a texture of at most ``texture_size`` texels a side.

    The texture is larger where a cell would have less than `SMALLEST_CELL` texels a side.
    """
    per_side = max(1, math.ceil(math.sqrt(math.ceil(n_triangles / 2))))
    return TriangleAtlas(n_triangles, per_side, max(SMALLEST_CELL, texture_size // per_side))


@torch.no_grad()
def bake(
    atlas: TriangleAtlas,
    v_pos: Float[Tensor, "Nv 3"],
    faces: Int[Tensor, "Nf 3"],
    values: Callable[[Tensor], dict[str, Tensor]],
    chunk_size: int = 2**15,
) -> dict[str, Float[Tensor, "S S C"]]:
    """Ask a function of world positions at every texel.

    Args:
        atlas: of these faces.
        v_pos, faces: the mesh.
        values: (positions ``[n, 3]``) -> named values ``[n, C]``.
        chunk_size: triangles at a time.

    Returns:
        One texture for each name; texels of no triangle have the mean of the others.
    """
    corners = v_pos[faces.long()]
    textures: dict[str, Tensor] = {}
    used = torch.zeros(atlas.size_px**2, dtype=torch.bool)
    for first in range(0, atlas.n_triangles, chunk_size):
        last = min(first + chunk_size, atlas.n_triangles)
        triangles, places, weights = (part.to(v_pos.device) for part in atlas.texels(first, last))
        points = (corners[triangles] * weights.to(v_pos)[..., None]).sum(dim=1)
        for name, found in values(points).items():
            if name not in textures:
                textures[name] = found.new_zeros(atlas.size_px**2, found.shape[-1])
            textures[name][places] = found
        used[places.cpu()] = True
    side = (atlas.size_px, atlas.size_px, -1)
    for texture in textures.values():
        texture[~used.to(texture.device)] = texture[used.to(texture.device)].mean(dim=0)
    return {name: texture.view(*side) for name, texture in textures.items()}
