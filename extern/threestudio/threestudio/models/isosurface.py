"""Level sets on a regular grid to triangle meshes, by marching tetrahedra.

The grid is made in code: every cube is cut into the six tetrahedra that share its main diagonal
(Kuhn's triangulation), so neighbouring cubes agree on their common face and the surface has no gap.
"""

from itertools import permutations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from threestudio.models.mesh import Mesh


class IsosurfaceHelper(nn.Module):
    """Turns levels at ``grid_vertices`` into a mesh."""

    points_range: tuple[float, float] = (0.0, 1.0)

    @property
    def grid_vertices(self) -> Float[Tensor, "n_vertices 3"]:
        """Where the level must be known, in the unit cube."""
        raise NotImplementedError


class MarchingTetrahedraHelper(IsosurfaceHelper):
    """Marching tetrahedra on a grid of ``resolution``^3 cubes over the unit cube."""

    def __init__(self, resolution: int) -> None:
        super().__init__()
        if resolution < 1:
            raise ValueError(
                f"isosurface_resolution is {resolution}; expected at least 1 cell per axis."
            )
        self.resolution = int(resolution)
        tets, triangles, counts = _tetrahedra_of_cube(), *_triangle_table()
        self.register_buffer("_tets", tets, persistent=False)
        self.register_buffer("_triangles", triangles, persistent=False)
        self.register_buffer("_triangle_counts", counts, persistent=False)

    @property
    def grid_vertices(self) -> Float[Tensor, "n_vertices 3"]:
        """Corners of the grid, x slowest and z fastest."""
        axis = torch.linspace(0.0, 1.0, self.resolution + 1, device=self._tets.device)
        return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).view(-1, 3)

    def forward(self, level: Float[Tensor, "n_vertices 1"]) -> Mesh:
        """Extract the zero level; negative is inside, triangles face the positive side.

        Not differentiable with respect to where the surface changes cells; inside a cell the vertex
        positions are differentiable functions of the level. Where the inside reaches the border of
        the cube the surface is open.
        """
        n = self.resolution + 1
        if level.numel() != n**3:
            raise ValueError(
                f"level has {level.numel()} values; expected one per grid vertex ({n}^3)."
            )
        level = level.reshape(-1)
        corners = self._active_tetrahedra((level < 0).view(n, n, n)).to(level.device)
        inside = level[corners] < 0
        case = (inside.long() * torch.tensor([1, 2, 4, 8], device=level.device)).sum(-1)
        edge_ends = self._triangles.to(level.device)[case]  # per tetrahedron: 2 triangles x 3 x 2
        is_real = torch.arange(2, device=level.device) < self._triangle_counts.to(level.device)[
            case, None
        ]
        rows = torch.arange(corners.shape[0], device=level.device)[:, None, None, None]
        ends = corners[rows, edge_ends][is_real]
        edges, faces = torch.unique(
            ends.view(-1, 2).sort(dim=-1).values, dim=0, return_inverse=True
        )
        return Mesh(self._interpolate(level, edges), faces.view(-1, 3))

    def _interpolate(
        self, level: Float[Tensor, "n_vertices"], edges: Int[Tensor, "n_edges 2"]
    ) -> Float[Tensor, "n_edges 3"]:
        values = level[edges]
        # Kept off the ends: a level of exactly zero would put the vertices of several edges into
        # one grid point, and triangles without area have no normal.
        share = (values[:, 0] / (values[:, 0] - values[:, 1])).clamp(1e-3, 1 - 1e-3)
        positions = self.grid_vertices.to(level)[edges]
        return torch.lerp(positions[:, 0], positions[:, 1], share[:, None])

    def _active_tetrahedra(self, inside: Tensor) -> Int[Tensor, "n_tets 4"]:
        """Vertex indices of the tetrahedra in cubes whose corners are not all on one side."""
        n, r = self.resolution + 1, self.resolution
        count = torch.zeros(r, r, r, dtype=torch.int8, device=inside.device)
        for i in (0, 1):
            for j in (0, 1):
                for k in (0, 1):
                    count += inside[i : i + r, j : j + r, k : k + r]
        cube = ((count > 0) & (count < 8)).nonzero()
        first = (cube[:, 0] * n + cube[:, 1]) * n + cube[:, 2]
        step = torch.tensor([n * n, n, 1], device=inside.device)
        offsets = (self._tets.to(inside.device) * step).sum(-1)  # six tetrahedra of four corners
        return (first[:, None, None] + offsets).view(-1, 4)


def _tetrahedra_of_cube() -> Int[Tensor, "6 4 3"]:
    """Corners of Kuhn's six tetrahedra in {0, 1}^3, each positively oriented."""
    tets = []
    for order in permutations(range(3)):
        corner = torch.zeros(3, dtype=torch.long)
        tet = [corner]
        for axis in order:
            corner = corner.clone()
            corner[axis] = 1
            tet.append(corner)
        if _orientation(tet) < 0:
            tet[1], tet[2] = tet[2], tet[1]
        tets.append(torch.stack(tet))
    return torch.stack(tets)


def _orientation(tet: list[Tensor]) -> float:
    return float(torch.linalg.det(torch.stack([c - tet[0] for c in tet[1:]]).double()))


def _triangle_table() -> tuple[Int[Tensor, "16 2 3 2"], Int[Tensor, "16"]]:
    """Triangles of each case, as edges (pairs of corners), and how many are real.

    Bit i of the case says that corner i is inside. The corners are put in the order inside, outside
    by an even permutation, which keeps the orientation; then one inside corner a gives the triangle
    (ab, ac, ad), two give the quad (ac, ad, bd, bc) and three the first one turned round.
    """
    table = torch.zeros(16, 2, 3, 2, dtype=torch.long)
    counts = torch.zeros(16, dtype=torch.long)
    for case in range(1, 15):
        inside = [i for i in range(4) if case >> i & 1]
        outside = [i for i in range(4) if not case >> i & 1]
        if _is_odd(inside + outside):
            group = inside if len(inside) > 1 else outside
            group[0], group[1] = group[1], group[0]
        a, b, c, d = inside + outside
        if len(inside) == 1:
            triangles = [[(a, b), (a, c), (a, d)]]
        elif len(inside) == 2:
            triangles = [[(a, c), (a, d), (b, d)], [(a, c), (b, d), (b, c)]]
        else:
            # Corner d is alone outside. The cyclic order (d, a, b, c) is an odd permutation of
            # (a, b, c, d), which turns the single-corner triangle round, as the side demands.
            triangles = [[(d, a), (d, b), (d, c)]]
        counts[case] = len(triangles)
        for row, triangle in enumerate(triangles):
            table[case, row] = torch.tensor(triangle)
    return table, counts


def _is_odd(order: list[int]) -> bool:
    inversions = sum(order[i] > order[j] for i in range(4) for j in range(i + 1, 4))
    return inversions % 2 == 1
