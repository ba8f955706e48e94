"""The atlas of single triangles: no texel serves two, and none is read that is not a triangle's."""

import pytest
import torch
from threestudio.models.mesh import Mesh
from threestudio.models.uv_atlas import SMALLEST_CELL, bake, plan_atlas


@pytest.mark.parametrize("n_triangles", [1, 2, 7, 50])
def test_no_texel_belongs_to_two(n_triangles):
    atlas = plan_atlas(n_triangles, 40)
    triangles, places, weights = atlas.texels(0, n_triangles)
    assert len(places.unique()) == len(places) and places.max() < atlas.size_px**2
    assert torch.equal(triangles.unique(), torch.arange(n_triangles))
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights)), atol=1e-6)


@pytest.mark.parametrize("texture_size", [8, 64])
def test_bilinear_reading_stays_among_a_triangles_own_texels(texture_size):
    """At random points of every triangle, by the four texels around each."""
    atlas = plan_atlas(9, texture_size)
    triangles, places, _ = atlas.texels(0, 9)
    owner = torch.full((atlas.size_px**2,), -1)
    owner[places] = triangles
    shares = torch.rand((500, 9, 3), generator=torch.Generator().manual_seed(0))
    shares /= shares.sum(-1, keepdim=True)
    points = (atlas.corners() * shares[..., None]).sum(-2) * atlas.size_px - 0.5
    low = torch.floor(points + 1e-4).long()
    for offset in ((0, 0), (1, 0), (0, 1), (1, 1)):
        texel = low + torch.tensor(offset)
        weight = (1 - (points - texel).abs()).clamp(min=0).prod(-1)
        index = (texel[..., 1] * atlas.size_px + texel[..., 0]).clamp(0, atlas.size_px**2 - 1)
        strangers = (owner[index] != torch.arange(9)) & (weight > 1e-3)
        assert not strangers.any()


def test_texel_middles_are_where_their_weights_say():
    atlas = plan_atlas(5, 36)
    triangles, places, weights = atlas.texels(0, 5)
    middles = torch.stack([places % atlas.size_px, places // atlas.size_px], dim=-1) + 0.5
    found = (atlas.corners()[triangles] * weights[..., None]).sum(1) * atlas.size_px
    assert torch.allclose(found, middles, atol=1e-4)


def test_a_part_of_the_triangles_is_a_part_of_the_texels():
    atlas = plan_atlas(11, 64)
    whole = atlas.texels(0, 11)
    parts = [atlas.texels(*span) for span in ((0, 3), (3, 4), (4, 11))]
    joined = [torch.cat(columns) for columns in zip(*parts)]
    order, other = whole[1].argsort(), joined[1].argsort()
    assert all(torch.equal(a[order], b[other]) for a, b in zip(whole, joined))


def test_sizes():
    assert plan_atlas(2, 512).size_px == 512
    assert plan_atlas(800, 512).cell_px == 512 // 20
    crowded = plan_atlas(20_000, 64)
    assert crowded.cell_px == SMALLEST_CELL and crowded.size_px == 400


def test_what_is_baked_is_asked_on_the_triangles_planes():
    corners = torch.tensor([[0.0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    faces = torch.tensor([[0, 1, 2], [1, 3, 2]])
    asked = []
    atlas = plan_atlas(2, 16)
    maps = bake(atlas, corners, faces, lambda p: (asked.append(p), {"a": p, "b": p[:, :1]})[1], 1)
    assert len(asked) == 2 and all((points[:, 2] - 1).abs().max() < 1e-6 for points in asked)
    assert maps["a"].shape == (16, 16, 3) and maps["b"].shape == (16, 16, 1)
    # The first corner of the first triangle is the first texel, those of the second the last ones.
    assert torch.allclose(maps["a"][0, 0], corners[0], atol=1e-6)
    assert torch.allclose(maps["a"][15, 15], corners[1], atol=1e-6)
    empty = plan_atlas(1, 16)
    (texture,) = bake(empty, corners, faces[:1], lambda p: {"a": p * 0 + 3}).values()
    assert (texture == 3).all(), "texels of nobody are like the others"


def test_a_mesh_unwraps_itself():
    mesh = Mesh(torch.rand(4, 3), torch.tensor([[0, 1, 2], [1, 3, 2]]))
    assert mesh.v_tex.shape == (6, 2) and mesh.t_tex_idx.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert mesh.v_tex.min() > 0 and mesh.v_tex.max() < 1
    first = mesh.v_tex
    mesh.unwrap_uv({"max_iterations": 1}, {"padding": 2}, texture_size=8)
    assert not torch.equal(first, mesh.v_tex)
