"""Marching tetrahedra: the table by its law, and surfaces of known topology."""

import pytest
import torch
from threestudio.models.isosurface import (
    IsosurfaceHelper,
    MarchingTetrahedraHelper,
    _tetrahedra_of_cube,
    _triangle_table,
)


def euler(mesh):
    return mesh.v_pos.shape[0] - mesh.edges.shape[0] + mesh.t_pos_idx.shape[0]


def directed_edges(mesh):
    faces = mesh.t_pos_idx
    pairs = torch.cat([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    return {tuple(pair) for pair in pairs.tolist()}, pairs.shape[0]


def volume(mesh):
    a, b, c = mesh.v_pos[mesh.t_pos_idx].unbind(1)
    return (a * torch.linalg.cross(b, c)).sum() / 6


class TestTables:
    def test_six_positive_tetrahedra_fill_the_cube(self):
        tets = _tetrahedra_of_cube().double()
        volumes = torch.linalg.det(tets[:, 1:] - tets[:, :1]) / 6
        assert torch.allclose(volumes, torch.full((6,), 1 / 6, dtype=torch.float64))

    @pytest.mark.parametrize("case", range(16))
    def test_triangles_separate_inside_from_outside_and_face_outward(self, case):
        table, counts = _triangle_table()
        corners = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
        inside = torch.tensor([case >> i & 1 for i in range(4)], dtype=torch.bool)
        assert counts[case] == {0: 0, 1: 1, 2: 2, 3: 1, 4: 0}[int(inside.sum())]
        for triangle in table[case, : counts[case]]:
            assert (inside[triangle[:, 0]] != inside[triangle[:, 1]]).all()
            a, b, c = corners[triangle].mean(dim=1)
            normal = torch.linalg.cross(b - a, c - a)
            assert ((corners[~inside] - a) @ normal > 0).all()
            assert ((corners[inside] - a) @ normal < 0).all()


class TestSurfaces:
    def level(self, helper, function):
        return function(helper.grid_vertices * 2 - 1)[:, None]

    def test_sphere(self):
        helper = MarchingTetrahedraHelper(20)
        mesh = helper(self.level(helper, lambda x: x.norm(dim=-1) - 0.7))
        directed, count = directed_edges(mesh)
        # Closed and oriented: every directed edge once, its reverse too.
        assert len(directed) == count and all((b, a) in directed for a, b in directed)
        assert euler(mesh) == 2
        radii = (mesh.v_pos * 2 - 1).norm(dim=-1)
        # Linear interpolation on an edge of length L, at most the diagonal, errs by L^2 / 8r.
        assert (radii - 0.7).abs().max() < 3 * 0.1**2 / (8 * 0.7)
        assert volume(mesh).item() * 8 == pytest.approx(4 / 3 * torch.pi * 0.7**3, rel=0.02)

    def test_torus_has_a_hole(self):
        def torus(x):
            return torch.stack([x[:, :2].norm(dim=-1) - 0.6, x[:, 2]], -1).norm(dim=-1) - 0.25

        helper = MarchingTetrahedraHelper(24)
        assert euler(helper(self.level(helper, torus))) == 0

    def test_two_spheres(self):
        def two(x):
            shift = torch.tensor([0.5, 0.0, 0.0])
            return torch.minimum((x - shift).norm(dim=-1), (x + shift).norm(dim=-1)) - 0.3

        helper = MarchingTetrahedraHelper(24)
        assert euler(helper(self.level(helper, two))) == 4

    def test_a_plane_is_open_flat_and_at_its_height(self):
        helper = MarchingTetrahedraHelper(4)
        mesh = helper((helper.grid_vertices[:, 2] - 0.3)[:, None])
        assert torch.allclose(mesh.v_pos[:, 2], torch.full_like(mesh.v_pos[:, 2], 0.3), atol=1e-6)
        up = torch.tensor([0.0, 0.0, 1.0]).expand_as(mesh.v_nrm)
        assert torch.allclose(mesh.v_nrm, up, atol=1e-5)

    def test_levels_of_exactly_zero_leave_no_triangle_without_area(self):
        helper = MarchingTetrahedraHelper(8)
        mesh = helper(self.level(helper, lambda x: x.abs().amax(dim=-1) - 0.5))
        a, b, c = mesh.v_pos[mesh.t_pos_idx].unbind(1)
        assert torch.linalg.cross(b - a, c - a).norm(dim=-1).min() > 0
        assert (mesh.v_nrm * (mesh.v_pos - 0.5)).sum(-1).min() > 0

    def test_noise_still_closes(self):
        helper = MarchingTetrahedraHelper(8)
        level = torch.rand(9, 9, 9, generator=torch.Generator().manual_seed(0)) - 0.5
        for axis in range(3):  # outside all round
            level.select(axis, 0).fill_(1.0)
            level.select(axis, 8).fill_(1.0)
        directed, count = directed_edges(helper(level.view(-1, 1)))
        assert len(directed) == count and all((b, a) in directed for a, b in directed)

    def test_vertices_are_differentiable_in_the_level(self):
        helper = MarchingTetrahedraHelper(4)
        height = torch.tensor(0.3, requires_grad=True)
        mesh = helper((helper.grid_vertices[:, 2] - height)[:, None])
        mesh.v_pos[:, 2].mean().backward()
        assert height.grad.item() == pytest.approx(1.0, rel=1e-4)

    def test_nothing_inside(self):
        mesh = MarchingTetrahedraHelper(3)(torch.ones(64, 1))
        assert mesh.v_pos.shape == (0, 3) and mesh.t_pos_idx.shape == (0, 3)

    def test_refusals(self):
        with pytest.raises(ValueError, match="isosurface_resolution is 0"):
            MarchingTetrahedraHelper(0)
        with pytest.raises(ValueError, match=r"level has 5 values; expected one per grid vertex"):
            MarchingTetrahedraHelper(2)(torch.zeros(5, 1))
        with pytest.raises(NotImplementedError):
            _ = IsosurfaceHelper().grid_vertices
