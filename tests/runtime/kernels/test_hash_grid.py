"""Laws that every back end keeps, and the choice between back ends."""

import sys
import types
import warnings

import pytest
import torch
from threestudio.kernels import (
    HashGridEncoding,
    available_backends,
    cpu_backend,
    hash_grid,
    hash_grid_encode,
    native_build,
    torch_backend,
)
from torch import nn

CONFIG = {"n_levels": 4, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}


def gradients(x, params, layout, backend, grad):
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    features = hash_grid_encode(x, params, layout, backend)
    return features, *torch.autograd.grad(features, (x, params), grad)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("n_points", [1, 15, 17, 64, 65, 300])
def test_back_ends_agree_in_double(small_layout, draw, backend, dims, n_points):
    layout = small_layout(dims)
    x = draw.uniform(n_points, dims, low=-0.2, high=1.2)
    params, grad = draw.normal(layout.n_params), draw.normal(n_points, layout.n_output_dims)
    expected = gradients(x, params, layout, "torch", grad)
    for actual, wanted in zip(gradients(x, params, layout, backend, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-12 * n_points)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize(("n_levels", "growth", "tolerance"), [(8, 1.35, 1e-5), (16, 1.4473, 2e-4)])
def test_single_precision_stays_near_double(
    small_layout, draw, backend, dims, n_levels, growth, tolerance
):
    # fp32 rounds a grid coordinate by up to scale * 2^-24 cells: 8e-6 at resolution 131, 2.4e-4 at
    # 4096, whatever the back end. The norm over all levels is a few times smaller.
    layout = small_layout(
        dims, n_levels=n_levels, log2_hashmap_size=12, base_resolution=16, per_level_scale=growth
    )
    x, params = draw.uniform(500, dims).float(), draw.normal(layout.n_params).float()
    grad = draw.normal(500, layout.n_output_dims).float()
    features, grad_x, grad_params = gradients(x, params, layout, backend, grad)
    expected = gradients(x.double(), params.double(), layout, "torch", grad.double())
    assert (features - expected[0]).norm() < tolerance * expected[0].norm()
    assert (grad_params - expected[2]).norm() < tolerance * expected[2].norm()
    # A coordinate that rounds across a cell face has another derivative; hence the quantile.
    relative = (grad_x - expected[1]).norm(dim=1) / expected[1].norm(dim=1)
    assert relative.quantile(0.95) < 10 * tolerance


@pytest.mark.parametrize("dims", [3, 4])
def test_gradients_against_differences(small_layout, draw, backend, dims):
    layout = small_layout(dims, n_levels=2)
    # Levels of scale 3 and 5: near 0.4, every coordinate is well inside its cells.
    x = (0.4 + 0.02 * draw.uniform(3, dims)).requires_grad_()
    params = draw.normal(layout.n_params).requires_grad_()

    def encode(points, table):
        return hash_grid_encode(points, table, layout, backend)

    assert torch.autograd.gradcheck(encode, (x, params), fast_mode=True)
    assert torch.autograd.gradgradcheck(encode, (x, params), fast_mode=True)


def touched(x, layout, backend, level):
    """Table entries of ``level`` that a single point reads, from the table gradient."""
    params = torch.zeros(layout.n_params, dtype=torch.float64, requires_grad=True)
    features = hash_grid_encode(torch.tensor([x], dtype=torch.float64), params, layout, backend)
    (grad,) = torch.autograd.grad(features.sum(), params)
    entries = grad.view(-1, layout.n_features_per_level)[:, 0]
    begin, end = layout.offsets[level], layout.offsets[level + 1]
    return set(entries[begin:end].nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("x", "level", "expected"),
    [
        ([0.0, 0.0, 0.0], 0, {0, 1, 4, 5, 16, 17, 20, 21}),
        # Position 3.5: the upper corners wrap, 63 + {0, 1, 4, 5, 16, 17, 20, 21} modulo 64.
        ([1.0, 1.0, 1.0], 0, {0, 3, 4, 15, 16, 19, 20, 63}),
        ([-0.4, 0.0, 0.0], 0, {0, 3, 4, 15, 16, 19, 20, 63}),  # cell -1 is 63 modulo 64
        ([0.0, 0.0, 0.0], 1, {0, 1, 6, 7, 36, 37, 42, 43}),
        # The first hashed level: xor of 1, 177 and 149, the primes modulo 256.
        ([0.0, 0.0, 0.0], 2, {0, 1, 177, 176, 149, 148, 36, 37}),
    ],
)
def test_golden_table_indices(small_layout, backend, x, level, expected):
    assert touched(x, small_layout(3), backend, level) == expected


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("value", [float("nan"), -3.0, 1e9, -1e30, float("inf")])
def test_wild_coordinates_stay_inside_the_table(small_layout, draw, backend, dims, value):
    layout = small_layout(dims)
    x = draw.uniform(70, dims)
    x[::3, 0] = value
    params, grad = draw.normal(layout.n_params), draw.normal(70, layout.n_output_dims)
    features, grad_x, _ = gradients(x, params, layout, backend, grad)
    expected = gradients(x, params, layout, "torch", grad)
    tame = torch.arange(70) % 3 != 0
    torch.testing.assert_close(features[tame], expected[0][tame], rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_x[tame], expected[1][tame], rtol=0, atol=1e-10)
    if value == value:
        torch.testing.assert_close(features, expected[0], rtol=1e-9, atol=1e-9)
    else:
        assert features[~tame].isnan().all()


def test_no_points(small_layout, backend):
    layout = small_layout(3)
    x = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    params = torch.ones(layout.n_params, dtype=torch.float64, requires_grad=True)
    features = hash_grid_encode(x, params, layout, backend)
    assert features.shape == (0, layout.n_output_dims)
    features.sum().backward()
    assert x.grad.shape == (0, 3)
    assert not params.grad.any()


def test_strided_inputs(small_layout, draw, backend):
    layout = small_layout(3)
    params = draw.normal(layout.n_params * 2)[::2]
    wide = draw.uniform(3, 40).t()[::2]
    grad = draw.normal(layout.n_output_dims, 20).t()
    strided = gradients(wide, params, layout, backend, grad)
    packed = gradients(wide.contiguous(), params.contiguous(), layout, backend, grad.contiguous())
    for actual, expected in zip(strided, packed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_equal_points_collide_and_add_up(small_layout, draw, backend):
    layout = small_layout(4)
    params, x = draw.normal(layout.n_params), draw.uniform(1, 4)
    one = torch.ones(1, layout.n_output_dims, dtype=torch.float64)
    _, _, single = gradients(x, params, layout, backend, one)
    _, _, many = gradients(x.expand(200, 4), params, layout, backend, one.expand(200, -1))
    torch.testing.assert_close(many, 200 * single, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("needs_params", [False, True])
def test_gradients_come_only_where_asked(small_layout, draw, backend, needs_x, needs_params):
    layout = small_layout(3)
    x = draw.uniform(20, 3).requires_grad_(needs_x)
    params = draw.normal(layout.n_params).requires_grad_(needs_params)
    features = hash_grid_encode(x, params, layout, backend)
    assert features.requires_grad == (needs_x or needs_params)
    if features.requires_grad:
        features.sum().backward()
    assert (x.grad is not None) == needs_x
    assert (params.grad is not None) == needs_params


# --- the choice of back end -------------------------------------------------------------------


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine on which no compiler can be found, with nothing decided or warned about yet."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(hash_grid, "_warned", set())
    cpu_backend._library.cache_clear()
    yield
    cpu_backend._library.cache_clear()


def test_auto_takes_the_compiled_kernel(small_layout, draw):
    layout = small_layout(3)
    if not cpu_backend.is_available(layout, torch.float64):
        pytest.skip("no compiler")
    x, params = draw.uniform(100, 3), draw.normal(layout.n_params)
    auto, forced = (hash_grid_encode(x, params, layout, name) for name in ("auto", "cpu"))
    assert torch.equal(auto, forced)
    assert available_backends(layout, x.device, x.dtype) == ["torch", "cpu"]


def test_without_compiler_auto_warns_once_and_uses_the_twin(no_compiler, small_layout, draw):
    layout = small_layout(3)
    x, params = draw.uniform(10, 3), draw.normal(layout.n_params)
    message = r"no C\+\+ compiler was found.*12 to 14 times slower.*install a C\+\+17 compiler"
    with pytest.warns(RuntimeWarning, match=message):
        features = hash_grid_encode(x, params, layout)
    assert torch.equal(features, torch_backend.encode(x, params, layout))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hash_grid_encode(x, params, layout)
    assert available_backends(layout, x.device, x.dtype) == ["torch"]


def test_forced_kernel_raises_instead_of_falling_back(no_compiler, small_layout, draw):
    layout = small_layout(3)
    x, params = draw.uniform(10, 3), draw.normal(layout.n_params)
    with pytest.raises(RuntimeError, match=r"'cpu' was asked for but cannot run: no C\+\+ compil"):
        hash_grid_encode(x, params, layout, "cpu")


def test_failure_is_remembered(no_compiler, small_layout, monkeypatch):
    layout = small_layout(3)
    assert not cpu_backend.is_available(layout)
    monkeypatch.setattr(native_build, "find_compiler", lambda: pytest.fail("tried again"))
    assert not cpu_backend.is_available(layout)


def test_auto_serves_low_precision_by_the_twin(small_layout, draw):
    layout = small_layout(3)
    x, params = draw.uniform(10, 3), draw.normal(layout.n_params).bfloat16()
    features = hash_grid_encode(x, params, layout)
    assert features.dtype == torch.bfloat16
    # The positions keep their precision: only the result is rounded.
    assert torch.equal(features, torch_backend.encode(x.float(), params, layout))


def test_low_precision_positions_are_promoted(small_layout, draw, backend):
    layout = small_layout(3)
    x = draw.uniform(10, 3).bfloat16()
    params = draw.normal(layout.n_params).float()
    actual = hash_grid_encode(x, params, layout, backend)
    torch.testing.assert_close(actual, torch_backend.encode(x.float(), params, layout))


@pytest.mark.parametrize(
    ("x", "n_params", "backend", "message"),
    [
        (torch.zeros(4, 2), None, "auto", r"x has shape \(4, 2\); expected \(n, 3\)"),
        (torch.zeros(2, 4, 3), None, "auto", r"x has shape \(2, 4, 3\).*Flatten leading"),
        (torch.zeros(4, 3, dtype=torch.long), None, "auto", r"torch.int64; expected floating"),
        (torch.zeros(4, 3), 5, "auto", r"params has shape \(5,\); this layout needs"),
        (torch.zeros(4, 3), None, "cuda", r"Unknown hash grid back end 'cuda'; expected one of"),
        (torch.zeros(4, 3), None, "tinycudann", r"'tinycudann' serves cuda tensors of"),
        (torch.zeros(4, 3, device="meta"), None, "auto", r"x is on meta but params is on cpu"),
    ],
)
def test_bad_arguments_are_named(small_layout, x, n_params, backend, message):
    layout = small_layout(3)
    params = torch.zeros(layout.n_params if n_params is None else n_params)
    with pytest.raises(ValueError, match=message):
        hash_grid_encode(x, params, layout, backend)


def test_forced_kernel_refuses_other_dtypes(small_layout):
    layout = small_layout(3)
    with pytest.raises(ValueError, match=r"'cpu' serves cpu tensors of .*; got torch.bfloat16"):
        hash_grid_encode(
            torch.zeros(1, 3), torch.zeros(layout.n_params, dtype=torch.bfloat16), layout, "cpu"
        )


def test_an_installed_tinycudann_borrows_our_parameters(small_layout, draw, monkeypatch):
    layout = small_layout(3)

    class Encoding(nn.Module):
        """Keeps the interface that the adapter relies on; computes with the twin."""

        def __init__(self, n_input_dims, config, dtype):
            super().__init__()
            self.layout = layout.from_config(n_input_dims, config)
            self.params = nn.Parameter(torch.zeros(self.layout.n_params, dtype=dtype))

        def forward(self, x):
            return torch_backend.encode(x, self.params, self.layout).half()

    package = types.ModuleType("tinycudann")
    package.Encoding = Encoding
    monkeypatch.setitem(sys.modules, "tinycudann", package)
    monkeypatch.setattr(hash_grid, "_tinycudann_modules", {})
    x, params = draw.uniform(10, 3).float(), draw.normal(layout.n_params).float().requires_grad_()
    features = hash_grid._encode_tinycudann(x, params, layout)
    features.sum().backward()
    expected = torch_backend.encode(x, params, layout)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-3)
    assert params.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_twin_on_cuda_equals_twin_on_cpu(small_layout, draw, monkeypatch):
    monkeypatch.setattr(hash_grid, "_warned", set())
    layout = small_layout(4)
    x, params = draw.uniform(200, 4), draw.normal(layout.n_params)
    grad = draw.normal(200, layout.n_output_dims)
    expected = gradients(x, params, layout, "torch", grad)
    with pytest.warns(RuntimeWarning, match="No compiled CUDA hash grid"):
        actual = gradients(x.cuda(), params.cuda(), layout, "auto", grad.cuda())
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted, rtol=0, atol=1e-10)


# --- the module -------------------------------------------------------------------------------


def test_parameters_start_uniform_and_reproducible():
    first, second = (HashGridEncoding(3, CONFIG) for _ in range(2))
    assert torch.equal(first.params, second.params)
    assert first.params.dtype == torch.float32
    assert first.params.abs().max() <= 1e-4
    # Standard deviation of U(-1e-4, 1e-4) is 1e-4 / sqrt(3); 1600 draws give it to 3 %.
    assert abs(first.params.std().item() - 1e-4 / 3**0.5) < 3e-6
    assert not torch.equal(first.params, HashGridEncoding(3, CONFIG, seed=1).params)


def test_building_a_grid_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    HashGridEncoding(3, CONFIG)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_module_encodes_with_its_parameters(draw, backend):
    module = HashGridEncoding(4, CONFIG, backend=backend)
    x = draw.uniform(9, 4).float()
    features = module(x)
    assert features.shape == (9, module.n_output_dims) == (9, 8)
    torch.testing.assert_close(features, torch_backend.encode(x, module.params, module.layout))
    assert [name for name, _ in module.named_parameters()] == ["params"]
    assert backend in repr(module)


def test_autocast_does_not_reach_the_table(draw):
    module = HashGridEncoding(3, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(draw.uniform(5, 3).float()).dtype == torch.float32


def test_unknown_back_end_is_refused_when_built():
    with pytest.raises(ValueError, match=r"Unknown hash grid back end 'gpu'; expected one of"):
        HashGridEncoding(3, CONFIG, backend="gpu")
