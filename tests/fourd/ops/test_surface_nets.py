"""Surface nets of shapes that are known, judged by trimesh."""

import math

import pytest
import torch

from custom.fourd.ops.surface_nets import surface_nets


def grid(n=20, half=1.0):
    axis = torch.linspace(-half, half, n)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1)


def trimesh_of(level, n, half=1.0):
    import trimesh

    v_pos, faces = surface_nets(level)
    v_pos = v_pos / (n - 1) * 2 * half - half
    return trimesh.Trimesh(v_pos.numpy(), faces.numpy(), process=False)


def test_one_corner_by_hand():
    """One point inside a grid of 3^3: eight cells, six edges, an octahedron turned to a cube."""
    level = torch.ones(3, 3, 3)
    level[1, 1, 1] = -1.0
    v_pos, faces = surface_nets(level)
    assert v_pos.shape == (8, 3) and faces.shape == (12, 3)
    # Each cell has three crossed edges, each crossed half-way from the point in the middle.
    offsets = (v_pos - 1).abs()
    torch.testing.assert_close(offsets, torch.full((8, 3), 0.5 / 3))
    corners = v_pos[faces]
    volume = (corners[:, 0] * torch.linalg.cross(corners[:, 1], corners[:, 2])).sum() / 6
    assert float(volume) == pytest.approx((1 / 3) ** 3, rel=1e-5), "closed and facing outwards"


def test_a_plane_lies_where_it_is():
    """A linear level is interpolated exactly; the triangles face its positive side."""
    level = grid(6)[..., 2] - 0.13
    v_pos, faces = surface_nets(level)
    torch.testing.assert_close(v_pos[:, 2] / 5 * 2 - 1, torch.full((25,), 0.13))
    assert len(faces) == 2 * 16, "four by four inner edges"
    corners = v_pos[faces]
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (normals[:, 2] > 0).all() and normals[:, :2].abs().max() < 1e-5


def test_a_sphere_is_closed_and_has_its_volume():
    n, radius = 24, 0.7
    mesh = trimesh_of(grid(n).norm(dim=-1) - radius, n)
    assert mesh.is_watertight and mesh.is_winding_consistent and mesh.euler_number == 2
    assert mesh.volume == pytest.approx(4 / 3 * math.pi * radius**3, rel=0.02)
    cell = 2 / (n - 1)
    error = torch.tensor(mesh.vertices).norm(dim=-1) - radius
    assert error.abs().max() < cell**2 / (2 * radius)


def test_a_torus_has_a_hole_and_two_balls_are_two():
    points = grid(32)
    ring = (points[..., :2].norm(dim=-1) - 0.6) ** 2 + points[..., 2] ** 2 - 0.25**2
    mesh = trimesh_of(ring, 32)
    assert mesh.is_watertight and mesh.euler_number == 0
    assert mesh.volume == pytest.approx(2 * math.pi**2 * 0.6 * 0.25**2, rel=0.06)
    shift = torch.tensor([0.5, 0.0, 0.0])
    two = torch.minimum((points - shift).norm(dim=-1), (points + shift).norm(dim=-1)) - 0.3
    assert trimesh_of(two, 32).euler_number == 4, "two closed surfaces without holes"


def test_a_grid_may_be_longer_along_one_axis():
    level = torch.ones(3, 4, 9)
    level[1, 1:3, 1:8] = -1.0
    v_pos, faces = surface_nets(level)
    import trimesh

    mesh = trimesh.Trimesh(v_pos.numpy(), faces.numpy(), process=False)
    assert mesh.is_watertight and mesh.volume > 0
    assert mesh.extents[2] > mesh.extents[1] > mesh.extents[0]


def test_nothing_and_everything_have_no_surface():
    for value in (1.0, -1.0):
        v_pos, faces = surface_nets(torch.full((4, 4, 4), value))
        assert v_pos.shape == (0, 3) and faces.shape == (0, 3)


def test_a_flat_grid_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\); expected at least two points"):
        surface_nets(torch.ones(1, 4, 4))
