"""First hits and normals against marching through plain inequalities, and by hand."""

import pytest
import torch

from custom.fourd.world.shapes import BOUNDING_RADIUS, intersect, signed_distance
from custom.fourd.world.vocabulary import SHAPES
from tests.fixtures import world_reference as reference


def random_rays(n, seed, dtype=torch.float64):
    """Rays from a ball's surface of radius 3 towards points of the unit ball; two thirds hit."""
    g = torch.Generator().manual_seed(seed)
    origins = 3 * torch.nn.functional.normalize(torch.randn(n, 3, generator=g).double(), dim=-1)
    targets = torch.randn(n, 3, generator=g).double() * 0.45
    directions = torch.nn.functional.normalize(targets - origins, dim=-1)
    return origins.to(dtype), directions.to(dtype)


def hits(shape, n=250, seed=0):
    origins, directions = random_rays(n, seed)
    distance, normals = intersect(shape, origins, directions)
    hit = distance.isfinite()
    points = origins[hit] + distance[hit, None] * directions[hit]
    return points, normals[hit], directions[hit]


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "torus"])
def test_first_hits_are_where_dense_marching_enters_the_solid(shape):
    origins, directions = random_rays(200, 1)
    distance, _ = intersect(shape, origins, directions)
    expected = reference.march(
        lambda p: reference.is_inside(shape, p), origins, directions, 1.5, 4.5, 1000
    )
    entered = expected.isfinite()
    assert 60 < int(entered.sum()) < 200
    torch.testing.assert_close(distance[entered], expected[entered], atol=1e-7, rtol=0)
    # Where marching saw nothing, a hit may only be a chord shorter than a march step (3e-3).
    extra = distance.isfinite() & ~entered
    beyond = origins + (distance[:, None] + 3e-3) * directions
    assert not reference.is_inside(shape, beyond[extra]).any()
    assert int(extra.sum()) <= 3


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-8), (torch.float32, 2e-5)])
def test_the_torus_is_hit_where_its_quartic_has_its_first_root(dtype, atol):
    """Grazing rays too: of 4000 rays, those that meet the surface at the flattest."""
    origins, directions = random_rays(4000, 1)
    expected = reference.torus_first_hits(origins, directions)
    distance, _ = intersect("torus", origins.to(dtype), directions.to(dtype))
    both = distance.isfinite() & expected.isfinite()
    assert 2000 < int(both.sum()) < 3900
    # A ray that misses by less than the tracing's tolerance may count as a hit.
    assert int((distance.isfinite() ^ expected.isfinite()).sum()) <= 1
    error = (distance[both].double() - expected[both]).abs()
    assert error.max() < 2e-3 and (error < atol).float().mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_agrees_with_double(shape):
    origins, directions = random_rays(400, 2)
    exact, _ = intersect(shape, origins, directions)
    rough, normals = intersect(shape, origins.float(), directions.float())
    assert rough.dtype == normals.dtype == torch.float32
    both = exact.isfinite() & rough.isfinite()
    # Grazing rays amplify rounding; all others stay within 1e-4 of the box's unit.
    error = (exact - rough).abs()[both]
    assert (error < 1e-4).float().mean() > 0.98
    assert (exact.isfinite() ^ rough.isfinite()).float().mean() < 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_the_sign_of_the_distance_is_the_inside(shape):
    points = torch.rand(4000, 3, generator=torch.Generator().manual_seed(3)).double() * 2.4 - 1.2
    assert torch.equal(signed_distance(shape, points) < 0, reference.is_inside(shape, points))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_distance_never_overestimates(shape):
    """|d(p) - d(q)| <= |p - q|: what sphere tracing relies on."""
    g = torch.Generator().manual_seed(4)
    first = torch.rand(2000, 3, generator=g).double() * 3 - 1.5
    second = first + torch.randn(2000, 3, generator=g).double() * 0.3
    change = (signed_distance(shape, first) - signed_distance(shape, second)).abs()
    assert (change <= (first - second).norm(dim=-1) + 1e-12).all()


@pytest.mark.parametrize("shape", ["sphere", "torus"])
def test_the_distance_is_euclidean_for_sphere_and_torus(shape):
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(5)) * 3 - 1.5
    surface = reference.surface_points(shape, n=64)
    brute = torch.cdist(points.double(), surface.double()).amin(dim=1)
    # The surface is sampled every 0.05 units; near it the nearest sample is farther than the foot.
    torch.testing.assert_close(
        signed_distance(shape, points.double()).abs(), brute, atol=0.015, rtol=0
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_normals_are_the_gradient_of_the_distance(shape):
    points, normals, directions = hits(shape)
    h = 1e-5
    columns = [
        (signed_distance(shape, points + h * e) - signed_distance(shape, points - h * e)) / (2 * h)
        for e in torch.eye(3).double()
    ]
    gradient = torch.stack(columns, dim=-1)
    # The gradient jumps where two faces meet, so a central difference there is shorter than 1.
    smooth = (gradient.norm(dim=-1) - 1).abs() < 1e-4
    assert smooth.float().mean() > 0.97
    torch.testing.assert_close(normals[smooth], gradient[smooth], atol=1e-4, rtol=0)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(len(normals)).double())
    assert ((normals * directions).sum(-1) < 1e-9).all(), "a first hit faces the ray"


@pytest.mark.parametrize("shape", SHAPES)
def test_hits_lie_on_the_surface_inside_the_bounding_ball(shape):
    points, _, _ = hits(shape)
    assert signed_distance(shape, points).abs().max() < 1e-6
    assert points.norm(dim=-1).max() < BOUNDING_RADIUS[shape]
    corner = reference.surface_points(shape).norm(dim=-1).max()
    assert 0.97 * BOUNDING_RADIUS[shape] < corner <= BOUNDING_RADIUS[shape]


@pytest.mark.parametrize(
    ("origin", "direction", "expected"),
    [
        # Along -x at z = 0, from the front: the torus shows its hole.
        ((3, 0, 0), (-1, 0, 0), [0.85, 0.66, 0.62, 0.78 * 0.85 / 1.55, None, 0.76 * 0.85 / 1.47]),
        # Along -y: the torus from its edge.
        ((0, 3, 0), (0, -1, 0), [0.85, 0.66, 0.62, 0.78 * 0.85 / 1.55, 0.86, 0.76 * 0.85 / 1.47]),
        # From below: bases and caps.
        ((0, 0, -3), (0, 0, 1), [0.85, 0.66, 0.70, 0.70, 0.86, 0.62]),
    ],
)
def test_hits_by_hand(origin, direction, expected):
    rays_o = torch.tensor([origin]).double()
    rays_d = torch.tensor([direction]).double()
    for shape, height in zip(SHAPES, expected):
        distance, normal = intersect(shape, rays_o, rays_d)
        if height is None:
            assert torch.isinf(distance).all() and not normal.any()
        else:
            assert float(distance) == pytest.approx(3 - height, abs=1e-9)


def test_normals_by_hand():
    down = torch.tensor([[0.1, 0.05, -3.0]]).double()
    for shape in ("cube", "cylinder", "cone", "pyramid"):
        _, normal = intersect(shape, down, torch.tensor([[0.0, 0, 1]]).double())
        assert normal.tolist() == [[0, 0, -1]]
    _, normal = intersect("cylinder", down * -1, torch.tensor([[0.0, 0, -1]]).double())
    assert normal.tolist() == [[0, 0, 1]]
    front = torch.tensor([[3.0, 0, 0.5]]).double(), torch.tensor([[-1.0, 0, 0]]).double()
    for shape, slope in (("cone", 0.78 / 1.55), ("pyramid", 0.76 / 1.47)):
        _, normal = intersect(shape, *front)
        length = (1 + slope**2) ** 0.5
        assert normal.tolist()[0] == pytest.approx([1 / length, 0, slope / length])


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_are_in_units_of_the_direction(shape):
    origins, directions = random_rays(100, 6)
    distance, normals = intersect(shape, origins, directions)
    halved, same = intersect(shape, origins, 2 * directions)
    torch.testing.assert_close(halved, distance / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(same, normals, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_behind_the_camera_and_no_rays_at_all(shape):
    origins, directions = random_rays(50, 7)
    distance, normals = intersect(shape, origins, -directions)
    assert torch.isinf(distance).all() and not normals.any()
    distance, normals = intersect(shape, origins[:0], directions[:0])
    assert distance.shape == (0,) and normals.shape == (0, 3)
