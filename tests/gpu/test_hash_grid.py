"""The hash grid on a CUDA device: Triton against the twin, at the published size.

These are skipped without a GPU; the interpreter's tests (tests/runtime/kernels) run anywhere.
"""

import pytest
import torch
from threestudio.kernels import GridLayout, triton_backend
from threestudio.kernels.grid_autograd import sum_of_twins
from threestudio.kernels.hash_grid import hash_grid_encode, hash_grid_encode_sum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUBLISHED = {
    "n_levels": 16,
    "log2_hashmap_size": 19,
    "base_resolution": 16,
    "per_level_scale": 1.447269237440378,
}


def case(dims, n_points, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    layouts = [GridLayout.from_config(d, PUBLISHED) for d in dims]
    tables = [torch.randn(layout.n_params, generator=generator) for layout in layouts]
    x = torch.rand((n_points, max(dims)), generator=generator)
    return x.cuda(), [table.cuda().to(dtype) for table in tables], layouts


def run(function, x, tables, layouts):
    x, *tables = (tensor.detach().clone().requires_grad_() for tensor in (x, *tables))
    features = function(x, tables, layouts)
    weights = torch.linspace(-1, 1, features.numel(), device=x.device).view_as(features)
    gradients = torch.autograd.grad(features, (x, *tables), weights.to(features.dtype))
    return features.detach(), *gradients


def by_triton(x, tables, layouts):
    if len(layouts) == 2:
        return triton_backend.encode_sum(x, tables, layouts)
    return triton_backend.encode(x, tables[0], layouts[0])


@pytest.mark.parametrize("dims", [(3,), (4,), (3, 4)])
@pytest.mark.parametrize("n_points", [1, 1000, 2**16])
def test_triton_agrees_with_the_twin(dims, n_points):
    x, tables, layouts = case(dims, n_points)
    actual = run(by_triton, x, tables, layouts)
    expected = run(sum_of_twins, x.double(), [table.double() for table in tables], layouts)
    # A finest cell is 1/4096 wide: a rounded coordinate moves a weight by 4096 * 2^-24.
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() <= 5e-4 * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_tables(dtype):
    x, tables, layouts = case((3, 4), 4096, dtype)
    features, x_grad, *table_grads = run(by_triton, x, tables, layouts)
    twin = sum_of_twins(x.double(), [table.double() for table in tables], layouts)
    assert features.dtype == dtype and all(grad.dtype == dtype for grad in table_grads)
    assert (features - twin).norm() <= 2e-2 * twin.norm() and x_grad.isfinite().all()


def test_auto_takes_triton():
    x, tables, layouts = case((3,), 512)
    auto = hash_grid_encode(x, tables[0], layouts[0])
    assert torch.equal(auto, hash_grid_encode(x, tables[0], layouts[0], backend="triton"))


def test_a_step_does_not_wait_for_the_device():
    x, tables, layouts = case((3, 4), 4096)
    run(lambda x, t, ls: hash_grid_encode_sum(x, *t, *ls), x, tables, layouts)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(lambda x, t, ls: hash_grid_encode_sum(x, *t, *ls), x, tables, layouts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
