"""Operations of the contract: hand-computed cases, laws and gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from threestudio.utils import ops


def camera(azimuth_deg: float, distance: float = 2.0) -> torch.Tensor:
    """c2w of a camera at elevation 0 that looks at the origin."""
    angle = math.radians(azimuth_deg)
    position = torch.tensor([math.cos(angle), math.sin(angle), 0.0]) * distance
    c2w = torch.eye(4)
    c2w[:3, 0] = torch.tensor([-math.sin(angle), math.cos(angle), 0.0])
    c2w[:3, 1] = torch.tensor([0.0, 0.0, 1.0])
    c2w[:3, 2] = position / distance
    c2w[:3, 3] = position
    return c2w


def test_dot_keeps_the_dimension():
    x = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert ops.dot(x, x).tolist() == [[14.0], [1.0]]


def test_reflect_mirrors_about_the_normal():
    x = torch.tensor([[1.0, 2.0, 3.0]])
    n = torch.tensor([[0.0, 0.0, 1.0]])
    assert ops.reflect(x, n).tolist() == [[-1.0, -2.0, 3.0]]


def test_scale_tensor_maps_pairs_rows_and_none():
    x = torch.tensor([[-1.0, 0.0, 1.0]])
    assert ops.scale_tensor(x, (-1, 1), None).tolist() == [[0.0, 0.5, 1.0]]
    box = torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 8.0]])
    assert ops.scale_tensor(torch.full((1, 3), 0.5), None, box).tolist() == [[1.0, 2.0, 4.0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, 0.7),
        ("None", 0.7),
        ("exp", math.exp(0.7)),
        ("shifted_exp", math.exp(-0.3)),
        ("trunc_exp", math.exp(0.7)),
        ("shifted_trunc_exp", math.exp(-0.3)),
        ("Sigmoid", 1 / (1 + math.exp(-0.7))),
        ("tanh", math.tanh(0.7)),
        ("shifted_softplus", math.log(1 + math.exp(-0.3))),
        ("scale_-11_01", 0.85),
        ("lin2srgb", 1.055 * 0.7 ** (1 / 2.4) - 0.055),
        ("softplus", math.log(1 + math.exp(0.7))),
        ("ReLU", 0.7),
    ],
)
def test_activation_values(name, expected):
    value = ops.get_activation(name)(torch.tensor(0.7))
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="Unknown activation function 'sofplus'"):
        ops.get_activation("sofplus")


def test_trunc_exp_caps_only_the_gradient():
    x = torch.tensor([2.0, 20.0], requires_grad=True)
    y = ops.trunc_exp(x)
    assert torch.allclose(y.detach(), torch.exp(x.detach()))
    y.backward(torch.ones(2))
    assert torch.allclose(x.grad, torch.exp(torch.tensor([2.0, 15.0])))


def test_lin2srgb_has_a_finite_gradient_at_black():
    x = torch.zeros(3, requires_grad=True)
    ops.lin2srgb(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([12.92] * 3)


def test_specify_gradient_injects_the_scaled_gradient():
    latents = torch.zeros(2, 3, requires_grad=True)
    wanted = torch.arange(6.0).view(2, 3)
    (2.5 * ops.SpecifyGradient.apply(latents, wanted)).sum().backward()
    assert torch.equal(latents.grad, 2.5 * wanted)


class TestChunkBatch:
    def test_pieces_equal_the_whole_for_every_container(self):
        x = torch.arange(7.0)

        def function(a, scale, b=None):
            return {"sum": a * scale + b, "nothing": None}

        whole = function(x, 2.0, b=x)
        for size in (0, 1, 3, 7, 100):
            pieces = ops.chunk_batch(function, size, x, 2.0, b=x)
            assert torch.equal(pieces["sum"], whole["sum"])
            assert pieces["nothing"] is None
        assert torch.equal(ops.chunk_batch(lambda a: a + 1, 2, x), x + 1)
        first, second = ops.chunk_batch(lambda a: (a, -a), 2, x)
        assert torch.equal(first, -second) and first.shape == x.shape
        assert isinstance(ops.chunk_batch(lambda a: [a, a], 2, x), list)

    def test_the_function_never_sees_more_than_a_chunk(self):
        sizes = []
        ops.chunk_batch(lambda a: (sizes.append(len(a)), a)[1], 3, torch.zeros(7))
        assert sizes == [3, 3, 1]

    def test_an_empty_batch_gives_an_empty_result(self):
        assert ops.chunk_batch(lambda a: a * 2, 4, torch.zeros(0, 3)).shape == (0, 3)

    def test_gradients_pass_and_stop_with_the_mode(self):
        x = torch.ones(5, requires_grad=True)
        ops.chunk_batch(lambda a: a * 3, 2, x).sum().backward()
        assert x.grad.tolist() == [3.0] * 5
        with torch.no_grad():
            assert not ops.chunk_batch(lambda a: x[: len(a)], 2, x).requires_grad

    def test_refuses_what_it_cannot_cut_or_join(self):
        with pytest.raises(ValueError, match="got no tensor argument"):
            ops.chunk_batch(lambda: 1, 2)
        with pytest.raises(TypeError, match="cannot join results of type str"):
            ops.chunk_batch(lambda a: "no", 2, torch.zeros(3))


class TestRays:
    def test_directions_of_a_small_image(self):
        directions = ops.get_ray_directions(2, 4, focal=2.0)
        assert directions.shape == (2, 4, 3)
        assert directions[0, 0].tolist() == [-0.75, 0.25, -1.0]
        assert directions[1, 3].tolist() == [0.75, -0.25, -1.0]

    def test_principal_point_and_corners(self):
        directions = ops.get_ray_directions(2, 2, (1.0, 2.0), (0.0, 1.0), use_pixel_centers=False)
        assert directions[0, 1].tolist() == [1.0, 0.5, -1.0]
        with pytest.raises(ValueError, match="without a principal point"):
            ops.get_ray_directions(2, 2, (1.0, 1.0))

    def test_the_centre_ray_meets_the_origin(self):
        directions = ops.get_ray_directions(3, 3, 3.0)
        for azimuth in (0.0, 90.0, 200.0):
            rays_o, rays_d = ops.get_rays(directions, camera(azimuth), keepdim=True)
            assert rays_o.shape == rays_d.shape == (3, 3, 3)
            meeting = rays_o[1, 1] + 2.0 * rays_d[1, 1]
            assert torch.allclose(meeting, torch.zeros(3), atol=1e-6)
            assert torch.allclose(rays_d.norm(dim=-1), torch.ones(3, 3))

    def test_image_top_is_up(self):
        _, rays_d = ops.get_rays(ops.get_ray_directions(3, 3, 3.0), camera(30.0), keepdim=True)
        assert rays_d[0, 1, 2] > 0 > rays_d[2, 1, 2]

    @pytest.mark.parametrize("batch_size", [1, 3])
    def test_every_accepted_shape_agrees(self, batch_size):
        c2w = torch.stack([camera(40.0 * k) for k in range(batch_size)])
        directions = ops.get_ray_directions(2, 3, 2.0)
        rays_o, rays_d = ops.get_rays(directions, c2w, keepdim=True)
        assert rays_d.shape == (batch_size, 2, 3, 3)
        batched = ops.get_rays(directions.expand(batch_size, -1, -1, -1), c2w)
        assert torch.equal(batched[0], rays_o.reshape(-1, 3))
        assert torch.equal(batched[1], rays_d.reshape(-1, 3))
        per_ray = ops.get_rays(
            directions.reshape(-1, 3).repeat(batch_size, 1), c2w.repeat_interleave(6, dim=0)
        )
        assert torch.allclose(per_ray[1], batched[1]) and torch.allclose(per_ray[0], batched[0])
        one = ops.get_rays(directions.reshape(-1, 3), c2w[0])
        assert torch.allclose(one[1], rays_d[0].reshape(-1, 3))

    def test_noise_comes_from_the_generator_alone(self):
        directions = ops.get_ray_directions(2, 2, 2.0)

        def noisy(seed):
            stream = torch.Generator().manual_seed(seed)
            return ops.get_rays(directions, camera(0.0), noise_scale=0.1, generator=stream)

        torch.manual_seed(0)
        first = noisy(1)
        torch.manual_seed(99)
        assert torch.equal(first[0], noisy(1)[0]) and not torch.equal(first[0], noisy(2)[0])

    def test_bad_shapes_are_named(self):
        with pytest.raises(ValueError, match=r"directions has shape \(2, 2\)"):
            ops.get_rays(torch.zeros(2, 2), torch.eye(4))
        with pytest.raises(ValueError, match="expected \\[N,3\\]"):
            ops.get_rays(torch.zeros(2, 3), torch.zeros(1, 1, 4, 4))

    def test_mask_has_exactly_the_wanted_rays(self):
        def mask(seed):
            return ops.mask_ray_directions(8, 8, 4, 4, torch.Generator().manual_seed(seed))

        chosen = mask(0)
        assert chosen.shape == (64,) and chosen.sum() == 16
        window = torch.zeros(8, 8, dtype=torch.bool)
        window[1:7, 1:7] = True
        assert (chosen & window.flatten()).sum() == 8
        assert torch.equal(chosen, mask(0)) and not torch.equal(chosen, mask(1))
        assert ops.mask_ray_directions(4, 4, 4, 4).all()
        with pytest.raises(ValueError, match="must not exceed the image"):
            ops.mask_ray_directions(4, 4, 5, 4)


class TestProjection:
    def test_projected_rays_land_on_their_pixel(self):
        fovy, height, width = math.radians(50.0), 6, 8
        focal = height / (2 * math.tan(fovy / 2))
        c2w = torch.stack([camera(20.0), camera(-75.0)])
        rays_o, rays_d = ops.get_rays(ops.get_ray_directions(height, width, focal), c2w, True)
        points = rays_o + 1.7 * rays_d
        proj = ops.get_projection_matrix(torch.full((2,), fovy), width / height, 0.01, 100.0)
        mvp = ops.get_mvp_matrix(c2w, proj)
        clip = torch.einsum("bij,bhwj->bhwi", mvp, F.pad(points, (0, 1), value=1.0))
        ndc = clip[..., :3] / clip[..., 3:]
        rows, columns = torch.meshgrid(torch.arange(6) + 0.5, torch.arange(8) + 0.5, indexing="ij")
        assert torch.allclose(ndc[..., 0], (columns / 4 - 1).expand(2, -1, -1), atol=1e-5)
        # The negated y row puts image row 0 at ndc -1.
        assert torch.allclose(ndc[..., 1], (rows / 3 - 1).expand(2, -1, -1), atol=1e-5)
        assert (ndc[..., 2].abs() < 1).all()

    def test_full_projection_is_the_row_vector_form(self):
        c2w = camera(33.0)[None]
        proj = ops.get_projection_matrix(torch.tensor([0.8]), 1.0, 0.1, 10.0)
        point = torch.tensor([0.3, -0.2, 0.5, 1.0])
        column = ops.get_mvp_matrix(c2w, proj)[0] @ point
        assert torch.allclose(point @ ops.get_full_projection_matrix(c2w, proj)[0], column)

    def test_gaussian_camera(self):
        c2w, fovx, fovy = camera(10.0), 0.9, 0.7
        view, full, centre = ops.get_cam_info_gaussian(c2w, fovx, fovy, 0.1, 10.0)
        assert torch.allclose(centre, c2w[:3, 3])
        # OpenCV axes: the origin is in front, 2 units along +z, and up is -y.
        assert torch.allclose(
            torch.tensor([0.0, 0.0, 0.0, 1.0]) @ view, torch.tensor([0.0, 0.0, 2.0, 1.0]), atol=1e-6
        )
        assert (torch.tensor([0.0, 0.0, 0.5, 1.0]) @ view)[1] == pytest.approx(-0.5, abs=1e-6)
        for depth, expected in ((0.1, 0.0), (10.0, 1.0)):
            position = centre + depth * F.normalize(-centre, dim=0)
            clip = torch.cat([position, torch.ones(1)]) @ full
            assert (clip[2] / clip[3]).item() == pytest.approx(expected, abs=1e-4)
        matrix = ops.get_projection_matrix_gaussian(0.1, 10.0, fovx, fovy)
        assert ops.get_fov_gaussian(matrix) == pytest.approx((fovx, fovy), rel=1e-6)


def test_binary_cross_entropy_and_both_its_gradients():
    p = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.5, 0.1], dtype=torch.float64, requires_grad=True)
    expected = -(
        0.5 * math.log(0.2) + 0.5 * math.log(0.8) + 0.1 * math.log(0.9) + 0.9 * math.log(0.1)
    )
    assert ops.binary_cross_entropy(p, q).item() == pytest.approx(expected / 2)
    assert torch.autograd.gradcheck(ops.binary_cross_entropy, (p, q))


def test_perpendicular_component_is_perpendicular_per_item():
    x, y = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    rest = ops.perpendicular_component(x, y)
    assert (rest * y).sum((1, 2, 3)).abs().max() < 1e-4
    share = (x - rest) / y
    assert torch.allclose(share, share[:, :1, :1, :1].expand_as(share), atol=1e-4)
    assert torch.equal(ops.perpendicular_component(x, torch.zeros_like(y)), x)


def test_decays():
    assert float(ops.shifted_expotional_decay(4, 0.5, -2.426, 1.0)) == pytest.approx(
        4 * math.exp(-0.5) - 2.426, abs=1e-6  # float32, and the terms almost cancel
    )
    assert float(ops.shifted_cosine_decay(2, 3, 0.5, 0.25)) == pytest.approx(
        2 * math.cos(1.25) + 2
    )


def test_validate_empty_rays_adds_one_sample_of_no_length():
    empty = torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0)
    rays, starts, ends = ops.validate_empty_rays(*empty)
    assert rays.tolist() == [0] and starts.tolist() == ends.tolist() == [0.0]
    some = torch.tensor([3]), torch.tensor([1.0]), torch.tensor([2.0])
    assert all(a is b for a, b in zip(some, ops.validate_empty_rays(*some)))


def test_tet_sdf_diff_counts_only_crossing_edges():
    sdf = torch.tensor([[1.0], [-2.0], [3.0]], requires_grad=True)
    edges = torch.tensor([[0, 1], [0, 2]])
    loss = ops.tet_sdf_diff(sdf, edges)
    expected = math.log(1 + math.exp(1.0)) + math.log(1 + math.exp(2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    assert sdf.grad[2] == 0 and sdf.grad[0] != 0
    same_sign = ops.tet_sdf_diff(sdf, edges[1:])
    same_sign.backward()
    assert same_sign.item() == 0
