"""Helpers of `utils.misc` (1.6), `utils.ops` (1.7) and `utils.loss` (1.8), by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from threestudio.utils import misc, ops
from threestudio.utils.loss import tv_loss

# utils.misc


def test_versions_compare_as_versions():
    assert misc.parse_version("0.2.3") >= misc.parse_version("0.2.0")
    assert misc.parse_version("0.10.0") > misc.parse_version("0.9.1")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"])
def test_the_rank_comes_from_the_first_variable_that_is_set(name, monkeypatch):
    names = ["RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"]
    for other in names:
        monkeypatch.delenv(other, raising=False)
    assert misc.get_rank() == 0
    for index, other in enumerate(names[names.index(name) :]):
        monkeypatch.setenv(other, str(3 + index))
    assert misc.get_rank() == 3


def test_module_weights_are_stripped_filtered_and_carry_their_step(tmp_path):
    path = tmp_path / "a.ckpt"
    state = {
        "geometry.w": torch.ones(1),
        "geometry_encoding.w": torch.ones(2),
        "b.w": torch.ones(3),
    }
    torch.save({"state_dict": state, "epoch": 2, "global_step": 30}, path)
    only, epoch, step = misc.load_module_weights(str(path), module_name="geometry")
    assert list(only) == ["w"] and (epoch, step) == (2, 30)
    rest, _, _ = misc.load_module_weights(str(path), ignore_modules=["geometry", "b"])
    assert list(rest) == ["geometry_encoding.w"]
    with pytest.raises(ValueError):
        misc.load_module_weights(str(path), module_name="b", ignore_modules=["b"])


def test_last_is_the_newest_run_whose_name_has_the_prefix(tmp_path):
    for name in ("a_cube@20260101-000000", "a_cube@20260102-000000", "a_ball@20260103-000000"):
        (tmp_path / name / "ckpts").mkdir(parents=True)
        (tmp_path / name / "ckpts" / "last.ckpt").touch()
    found = misc.find_last_path(f"{tmp_path}/a cubeLAST/ckpts/last.ckpt")
    assert found == f"{tmp_path}/a_cube@20260102-000000/ckpts/last.ckpt"
    assert misc.find_last_path("outputs/x/last.ckpt") == "outputs/x/last.ckpt"
    with pytest.raises(FileNotFoundError):
        misc.find_last_path(f"{tmp_path}/a treeLAST/ckpts/last.ckpt")


def test_process_and_memory_helpers_work_alone():
    layer = torch.nn.Linear(2, 2)
    misc.enable_gradient(layer, enabled=False)
    assert not any(p.requires_grad for p in layer.parameters())
    misc.enable_gradient(layer)
    assert all(p.requires_grad for p in layer.parameters())
    misc.barrier()
    assert misc.broadcast(torch.ones(2)).tolist() == [1, 1]
    misc.cleanup()

    @misc.finish_with_cleanup
    def double(x):
        return 2 * x

    assert double(4) == 8 and double.__name__ == "double"


# utils.ops


def test_products_and_reflection():
    x, n = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    assert ops.dot(x, n).tolist() == [[3.0]]
    assert ops.reflect(x, n).tolist() == [[-1.0, -2.0, 3.0]]


def test_ranges_are_mapped_affinely():
    values = torch.tensor([[-1.0, 0.5], [3.0, 2.0]])
    assert torch.allclose(ops.scale_tensor(values, (-1, 1), None), (values + 1) / 2)
    box = torch.tensor([[-2.0, 0.0], [2.0, 4.0]])
    assert ops.scale_tensor(torch.tensor([[0.0, 1.0]]), box, (0, 1)).tolist() == [[0.5, 0.25]]
    assert ops.scale_tensor(torch.tensor([[0.5, 0.25]]), None, box).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        (None, lambda x: x),
        ("none", lambda x: x),
        ("exp", math.exp),
        ("shifted_exp", lambda x: math.exp(x - 1)),
        ("trunc_exp", math.exp),
        ("shifted_trunc_exp", lambda x: math.exp(x - 1)),
        ("sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("Sigmoid", lambda x: 1 / (1 + math.exp(-x))),
        ("tanh", math.tanh),
        ("softplus", lambda x: math.log1p(math.exp(x))),
        ("shifted_softplus", lambda x: math.log1p(math.exp(x - 1))),
        ("scale_-11_01", lambda x: x / 2 + 0.5),
        ("lin2srgb", lambda x: 1.055 * x ** (1 / 2.4) - 0.055 if x > 0.0031308 else 12.92 * x),
        ("relu", lambda x: max(x, 0.0)),
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
    ],
)
def test_activations(name, formula):
    points = [0.001, 0.25, 0.9]
    got = ops.get_activation(name)(torch.tensor(points))
    assert got.tolist() == pytest.approx([formula(x) for x in points], rel=1e-5)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="sigmiod"):
        ops.get_activation("sigmiod")


def test_trunc_exp_caps_its_gradient_at_15():
    x = torch.tensor([1.0, 20.0], requires_grad=True)
    y = ops.trunc_exp(x)
    assert y.tolist() == pytest.approx([math.e, math.exp(20.0)])
    y.backward(torch.tensor([2.0, 1.0]))
    assert x.grad.tolist() == pytest.approx([2 * math.e, math.exp(15.0)])


def test_specified_gradients_are_scaled_by_the_incoming_one():
    latents, gradient = torch.zeros(2, 3, requires_grad=True), torch.randn(2, 3)
    (3 * ops.SpecifyGradient.apply(latents, gradient)).sum().backward()
    assert torch.allclose(latents.grad, 3 * gradient)


@pytest.mark.parametrize("chunk_size", [-1, 0, 1, 2, 7, 100])
def test_chunks_change_no_result(chunk_size):
    x, y = torch.randn(7, 2), torch.randn(7, 2)

    def everything(a, scale, b):
        return {"sum": a + scale * b, "none": None}

    out = ops.chunk_batch(everything, chunk_size, x, 2.0, b=y)
    assert torch.allclose(out["sum"], x + 2 * y) and out["none"] is None
    pair = ops.chunk_batch(lambda a: (a, a * 2), chunk_size, x)
    assert torch.equal(pair[0], x) and torch.equal(pair[1], 2 * x)
    assert ops.chunk_batch(lambda a: a + 1, chunk_size, x[:0]).shape == (0, 2)


def test_ray_directions_of_a_small_image():
    directions = ops.get_ray_directions(2, 4, focal=2.0)
    assert directions.shape == (2, 4, 3)
    assert directions[0, 0].tolist() == [-0.75, 0.25, -1.0]
    assert directions[1, 3].tolist() == [0.75, -0.25, -1.0]
    plain = ops.get_ray_directions(2, 2, (1.0, 2.0), (0.0, 1.0), use_pixel_centers=False)
    assert plain[1, 1].tolist() == [1.0, 0.0, -1.0]


@pytest.mark.parametrize("keepdim", [True, False])
@pytest.mark.parametrize(
    ("directions", "poses", "kept"),
    [((6, 3), (4, 4), (6, 3)), ((2, 3, 3), (4, 4), (2, 3, 3)),
     ((2, 3, 3), (5, 4, 4), (5, 2, 3, 3)), ((5, 2, 3, 3), (5, 4, 4), (5, 2, 3, 3))],
)  # fmt: skip
def test_rays_of_every_accepted_shape(directions, poses, kept, keepdim):
    quarter_turn = torch.tensor([[0.0, -1, 0, 7], [1, 0, 0, 8], [0, 0, 1, 9], [0, 0, 0, 1]])
    given = torch.randn(directions)
    rays_o, rays_d = ops.get_rays(given, quarter_turn.expand(poses), keepdim=keepdim)
    assert rays_o.shape == rays_d.shape == (kept if keepdim else (math.prod(kept[:-1]), 3))
    turned = torch.stack([-given[..., 1], given[..., 0], given[..., 2]], -1)
    expected = F.normalize(turned, dim=-1).expand(kept)
    assert torch.allclose(rays_d.reshape(kept), expected, atol=1e-6)
    assert (rays_o == torch.tensor([7.0, 8.0, 9.0])).all()


def test_rays_may_be_noisy_and_keep_their_length():
    directions = ops.get_ray_directions(8, 8, 4.0)
    rays_o, rays_d = ops.get_rays(directions, torch.eye(4), keepdim=True, normalize=False)
    assert torch.equal(rays_d, directions)
    noisy_o, noisy_d = ops.get_rays(
        directions, torch.eye(4), keepdim=True, noise_scale=0.1, normalize=False
    )
    assert torch.allclose(noisy_o - rays_o, noisy_d - rays_d, atol=1e-6)  # the noise is shared
    assert (noisy_o - rays_o).std() == pytest.approx(0.1, rel=0.3)


def test_gaussian_splattings_camera():
    """At (0, 0, 3) looking down -z: the origin lies 3 in front, in the middle of the image."""
    c2w = torch.eye(4)
    c2w[2, 3] = 3.0
    view, full, center = ops.get_cam_info_gaussian(c2w, 0.8, 0.6, 0.1, 100.0)
    assert center.tolist() == [0.0, 0.0, 3.0]
    assert (torch.tensor([0.0, 0, 0, 1]) @ view).tolist() == pytest.approx([0, 0, 3, 1], abs=1e-6)
    # OpenCV axes: what is above the camera has a negative y.
    assert (torch.tensor([0.0, 1, 0, 1]) @ view)[1].item() == pytest.approx(-1.0)
    clip = torch.tensor([0.0, 3 * math.tan(0.3), 0, 1]) @ full
    assert (clip[1] / clip[3]).item() == pytest.approx(-1.0, abs=1e-5)  # the edge of the image
    near = torch.tensor([0.0, 0.0, 2.9, 1.0]) @ full
    assert (near[2] / near[3]).item() == pytest.approx(0.0, abs=1e-5)


def test_losses_and_decays():
    value, target = torch.tensor([0.2, 0.9]), torch.tensor([0.0, 1.0])
    expected = -(math.log(0.8) + math.log(0.9)) / 2
    assert ops.binary_cross_entropy(value, target).item() == pytest.approx(expected)
    assert float(ops.shifted_expotional_decay(4, 0.5, -2.426, torch.tensor(0.3))) == pytest.approx(
        4 * math.exp(-0.15) - 2.426
    )
    assert float(ops.shifted_cosine_decay(2.0, 1.0, 0.5, torch.tensor(0.3))) == pytest.approx(
        2 * math.cos(0.8) + 2
    )
    image = torch.tensor([[[[0.0, 1.0], [3.0, 5.0]]]])  # dh: 3, 4; dw: 1, 2
    assert tv_loss(image).item() == pytest.approx(2 * ((9 + 16) / 2 + (1 + 4) / 2))


def test_perpendicular_component_per_item():
    x = torch.tensor([[3.0, 4.0], [1.0, 1.0]]).reshape(2, 2, 1, 1)
    y = torch.tensor([[2.0, 0.0], [1.0, 1.0]]).reshape(2, 2, 1, 1)
    got = ops.perpendicular_component(x, y).reshape(2, 2)
    assert torch.allclose(got, torch.tensor([[0.0, 4.0], [0.0, 0.0]]), atol=1e-6)


def test_no_samples_become_one_on_the_first_ray():
    none = torch.zeros(0)
    rays, start, end = ops.validate_empty_rays(none.long(), none, none)
    assert (rays.tolist(), start.tolist(), end.tolist()) == ([0], [0.0], [0.0])
    some = torch.tensor([2]), torch.tensor([0.5]), torch.tensor([0.6])
    assert ops.validate_empty_rays(*some)[0].tolist() == [2]


def test_efficient_rays_and_tetrahedra_regulariser():
    assert ops.mask_ray_directions(16, 16, 8, 8).sum() == 64
    sdf, edges = torch.tensor([[0.5], [-0.25], [1.0]]), torch.tensor([[0, 1], [0, 2]])
    expected = math.log1p(math.exp(0.5)) + math.log1p(math.exp(0.25))
    assert ops.tet_sdf_diff(sdf, edges).item() == pytest.approx(expected)
