"""The Triton kernels in Triton's interpreter, against the twin in double precision.

The package is no requirement: `pip install triton` beside a CPU build of PyTorch runs these.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from threestudio.kernels import triton_backend
from threestudio.kernels.grid_autograd import sum_of_twins
from threestudio.kernels.grid_layout import can_sum
from threestudio.kernels.hash_grid import hash_grid_encode, hash_grid_encode_sum
from threestudio.models.spatial_time_encoding import HashGridSpatialTime

pytestmark = pytest.mark.skipif(
    not triton_backend._is_installed() or not triton_backend.is_interpreted(),
    reason="needs the package triton, and TRITON_INTERPRET=1 before its first use",
)

GRIDS = [(2,), (3,), (4,), (3, 4)]


def encode(x, tables, layouts):
    if len(layouts) == 2:
        return triton_backend.encode_sum(x, tables, layouts)
    return triton_backend.encode(x, tables[0], layouts[0])


def run(function, x, tables, layouts, dtype, seed=3):
    """Features, then the gradients of positions and tables."""
    x, *tables = (tensor.to(dtype).requires_grad_() for tensor in (x, *tables))
    features = function(x, tables, layouts)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(features, (x, *tables), weights.to(dtype))
    return features.detach(), *gradients


def check(x, tables, layouts, tolerance=2e-6):
    actual = run(encode, x, tables, layouts, torch.float32)
    expected = run(sum_of_twins, x.float().double(), tables, layouts, torch.float64)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()
    return actual


@pytest.fixture
def case(small_layout, draw):
    def make(dims, n_points, **overrides):
        layouts = [small_layout(d, **overrides) for d in dims]
        tables = [draw.normal(layout.n_params) for layout in layouts]
        return draw.uniform(n_points, max(dims)), tables, layouts

    return make


@pytest.mark.parametrize("dims", GRIDS)
def test_features_and_gradients_are_the_twins(case, dims):
    """Random points, the corners of the box, and points outside it."""
    x, tables, layouts = case(dims, 70)
    x[0], x[1], x[2], x[3, 0] = 0.0, 1.0, -3.3, 7.25
    check(x, tables, layouts)


@pytest.mark.parametrize("features", [1, 4])
def test_other_feature_counts(case, features):
    check(*case((3, 4), 20, n_features_per_level=features))


@pytest.mark.parametrize("n_points", [1, 17])
def test_blocks_that_are_not_full(case, n_points):
    check(*case((3,), n_points))


def test_no_points(case):
    x, tables, layouts = case((3, 4), 0)
    features, x_grad, *table_grads = run(encode, x, tables, layouts, torch.float32)
    assert features.shape == (0, 8) and x_grad.shape == (0, 4)
    assert all(not gradient.any() for gradient in table_grads)


def test_strided_points_and_gradients(case):
    x, (table,), (layout,) = case((3,), 20)
    wide = torch.cat((x, x), dim=1).float()
    points, table = wide[:, ::2], table.float().requires_grad_()
    assert not points.is_contiguous()
    features = triton_backend.encode(points, table, layout)
    twin = sum_of_twins(points.double(), [table.double()], [layout])
    torch.testing.assert_close(features.double(), twin, atol=1e-5, rtol=1e-5)
    expanded = torch.ones(()).expand(features.shape)
    (gradient,) = torch.autograd.grad(features, table, expanded)
    (expected,) = torch.autograd.grad(twin.sum(), table)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), 1e9, -1e30, float("inf")])
def test_wild_coordinates_stay_inside_the_table(case, value):
    """A point that is no number has such features; its neighbours are untouched."""
    x, tables, layouts = case((3, 4), 8)
    x, tables = x.float(), [table.float() for table in tables]
    calm = triton_backend.encode_sum(x, tables, layouts)
    x[4, 1] = value
    features = triton_backend.encode_sum(x, tables, layouts)
    others = [0, 1, 2, 3, 5, 6, 7]
    assert torch.equal(features[others], calm[others])
    twin = sum_of_twins(x, tables, layouts)
    torch.testing.assert_close(features[4], twin[4], equal_nan=True, atol=1e-4, rtol=1e-4)


def test_beyond_the_last_cell_features_no_longer_change(case):
    """Cell numbers saturate at 2^30, and there the gradient to the position ends, as the twin's."""
    x, tables, layouts = case((3, 4), 3)
    x[1, 0] = 1e9
    _, actual, *_ = run(encode, x, tables, layouts, torch.float32)
    _, expected, *_ = run(sum_of_twins, x.float(), tables, layouts, torch.float32)
    assert actual[1, 0] == expected[1, 0] == 0.0
    torch.testing.assert_close(actual[[0, 2]], expected[[0, 2]], atol=1e-3, rtol=1e-4)


def test_gradients_come_only_where_asked(case):
    x, tables, layouts = case((3, 4), 12)
    x, static, dynamic = x.float(), tables[0].float(), tables[1].float().requires_grad_()
    (frozen_static,) = torch.autograd.grad(
        triton_backend.encode_sum(x, (static, dynamic), layouts).sum(), dynamic
    )
    both = run(encode, x, tables, layouts, torch.float32)
    weights = torch.autograd.grad(
        triton_backend.encode_sum(x, (static.requires_grad_(), dynamic), layouts).sum(), dynamic
    )
    torch.testing.assert_close(frozen_static, weights[0])
    assert len(both) == 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_tables_are_summed_in_single(case, dtype):
    """All points in one cell: a sum of 4096 ones in half precision would stop at 2048."""
    _, (table,), (layout,) = case((3,), 1)
    x = torch.full((4096, 3), 0.125)
    table = table.to(dtype).requires_grad_()
    features = triton_backend.encode(x, table, layout)
    assert features.dtype == dtype
    (gradient,) = torch.autograd.grad(features, table, torch.ones_like(features))
    assert gradient.dtype == dtype
    total = gradient.float().view(-1, 2).sum(dim=0)
    assert total.tolist() == pytest.approx([4096.0 * layout.n_levels] * 2, rel=5e-3)


def test_second_derivatives_are_the_twins(case):
    x, (table,), (layout,) = case((3,), 9)

    def curvature(function, dtype):
        points, params = x.to(dtype).requires_grad_(), table.to(dtype).requires_grad_()
        features = function(points, (params,), (layout,))
        (slope,) = torch.autograd.grad(features.square().sum(), points, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (points, params))

    actual = curvature(encode, torch.float32)
    expected = curvature(sum_of_twins, torch.float64)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_encodings_take_it_where_it_is_asked_for(monkeypatch, draw):
    config = {
        "n_levels": 3,
        "log2_hashmap_size": 7,
        "base_resolution": 4,
        "per_level_scale": 1.5,
        "backend": "triton",
    }
    encoding = HashGridSpatialTime(3, config)
    plain = HashGridSpatialTime(3, {**config, "backend": "torch"})
    plain.load_state_dict(encoding.state_dict())
    x, times = draw.uniform(10, 3).float(), draw.uniform(10).float()
    called = []
    summed = triton_backend.encode_sum
    monkeypatch.setattr(
        triton_backend, "encode_sum", lambda *args: called.append(1) or summed(*args)
    )
    torch.testing.assert_close(encoding(x, times), plain(x, times), atol=1e-9, rtol=1e-5)
    assert called, "one pass over the points for both grids"


def test_grids_of_different_scales_are_encoded_one_by_one(small_layout, draw):
    static, dynamic = small_layout(3), small_layout(4, per_level_scale=1.3)
    assert not can_sum(static, dynamic)
    tables = [draw.normal(layout.n_params).float() for layout in (static, dynamic)]
    x = draw.uniform(6, 4).float()
    actual = hash_grid_encode_sum(x, *tables, static, dynamic, backend="triton")
    expected = sum_of_twins(x, tables, (static, dynamic))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_more_than_32_bits_of_offsets_are_refused(small_layout, draw):
    layout = small_layout(3)
    table = draw.normal(layout.n_params).float()
    x = torch.empty((1, 3)).expand(2**28, 3)
    with pytest.raises(ValueError, match="Triton's kernels count to 2147483647. Encode fewer"):
        triton_backend._check_sizes(x, [layout])
    triton_backend._check_sizes(x[: 2**28 - 1], [layout])
    with pytest.raises(RuntimeError, match="the tables are torch.float64; Triton's kernels know"):
        hash_grid_encode(x[:1].double(), table.double(), layout, backend="triton")


def test_without_a_gpu_or_the_interpreter_it_is_refused(monkeypatch, small_layout, draw):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    layout = small_layout(3)
    table = draw.normal(layout.n_params).float()
    with pytest.raises(RuntimeError, match="tensors are on cpu; Triton's kernels run on CUDA"):
        hash_grid_encode(draw.uniform(1, 3).float(), table, layout, backend="triton")
