"""Meshes: hand-computed normals, parts and smoothness terms."""

import pytest
import torch
from threestudio.models.mesh import Mesh

TETRAHEDRON = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
FACES = torch.tensor([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def two_parts():
    """A tetrahedron and, far away, a single triangle."""
    vertices = torch.cat([TETRAHEDRON, TETRAHEDRON[:3] + 10])
    return Mesh(vertices, torch.cat([FACES, torch.tensor([[4, 5, 6]])]), name="two")


class TestNormals:
    def test_by_hand(self):
        mesh = Mesh(TETRAHEDRON, FACES)
        # At the origin three right-angled faces of equal area meet: minus the diagonal.
        assert torch.allclose(mesh.v_nrm[0], torch.full((3,), -(3**-0.5)))
        # At (1, 0, 0): (0,0,-1) + (0,-1,0) + (1,1,1), each twice the face's area.
        assert torch.allclose(mesh.v_nrm[1], torch.tensor([1.0, 0.0, 0.0]))

    def test_unused_and_degenerate_vertices_get_up(self):
        vertices = torch.cat([TETRAHEDRON, torch.ones(1, 3)])
        assert Mesh(vertices, FACES).v_nrm[4].tolist() == [0.0, 0.0, 1.0]
        flat = Mesh(torch.zeros(3, 3), torch.tensor([[0, 1, 2]]))
        assert flat.v_nrm.tolist() == [[0.0, 0.0, 1.0]] * 3

    def test_gradient_is_finite(self):
        vertices = torch.cat([TETRAHEDRON, torch.ones(1, 3)]).requires_grad_()
        Mesh(vertices, FACES).v_nrm.sum().backward()
        assert torch.isfinite(vertices.grad).all()


def test_edges_once_each():
    assert Mesh(TETRAHEDRON, FACES).edges.tolist() == [
        [0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3],
    ]  # fmt: skip


class TestOutliers:
    @pytest.mark.parametrize(("threshold", "n_faces"), [(2, 4), (0.5, 4), (1, 5), (0.2, 5)])
    def test_small_parts_go(self, threshold, n_faces):
        mesh = two_parts()
        mesh.set_vertex_color(torch.arange(7.0)[:, None].expand(-1, 3))
        cleaned = mesh.remove_outlier(threshold)
        assert cleaned.t_pos_idx.shape == (n_faces, 3)
        assert cleaned.t_pos_idx.max() == cleaned.v_pos.shape[0] - 1
        assert cleaned.v_rgb.shape == cleaned.v_pos.shape
        assert cleaned.extras == {"name": "two"}
        assert torch.equal(
            cleaned.v_pos[cleaned.t_pos_idx[:4]], TETRAHEDRON[FACES]
        )

    def test_the_largest_part_stays_whatever_the_threshold(self):
        assert two_parts().remove_outlier(100).t_pos_idx.shape == (4, 3)

    def test_long_chains_are_one_part(self):
        n = 200
        order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
        faces = torch.stack([order[:-2], order[1:-1], order[2:]], dim=-1)
        mesh = Mesh(torch.zeros(n, 3), faces)
        assert not mesh._connected_parts().any()

    def test_empty_and_optimised_meshes_stay(self):
        empty = Mesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long))
        assert empty.remove_outlier(5) is empty
        trained = Mesh(TETRAHEDRON.clone().requires_grad_(), FACES)
        assert trained.remove_outlier(100) is trained


class TestSmoothness:
    def square(self, height=0.0):
        """A square fan around its centre, which is raised."""
        ring = torch.tensor([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]])
        vertices = torch.cat([torch.tensor([[0.0, 0.0, height]]), ring])
        return Mesh(vertices, torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]]))

    def test_a_plane_has_consistent_normals(self):
        assert self.square().normal_consistency().abs() < 1e-6
        assert self.square(0.5).normal_consistency() > 0.01

    def test_laplacian_by_hand(self):
        # The centre is the mean of its ring; a corner's neighbours (two corners and the centre)
        # average to the centre: length 1 for each of the four corners, zero for the centre.
        assert self.square().laplacian().item() == pytest.approx(4 / 5)


def test_refusals():
    mesh = Mesh(TETRAHEDRON, FACES)
    assert mesh.v_rgb is None
    with pytest.raises(ValueError, match=r"v_rgb has 2 rows; expected one per vertex \(4\)"):
        mesh.set_vertex_color(torch.zeros(2, 3))
    with pytest.raises(NotImplementedError, match="vertex tangents need charts of many triangles"):
        _ = mesh.v_tng
