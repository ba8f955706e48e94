"""What is particular to the compiled kernel: threads, routing of second derivatives, overhead."""

import pytest
import torch
from threestudio.kernels import cpu_backend, grid_autograd, torch_backend
from threestudio.kernels.hash_grid import hash_grid_encode_sum


@pytest.fixture(autouse=True)
def needs_the_kernel(small_layout):
    if not cpu_backend.is_available(small_layout(3)):
        pytest.skip(cpu_backend.unavailable_reason(small_layout(3)))


@pytest.fixture
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(x, params, layout, grad):
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    features = cpu_backend.encode(x, params, layout)
    return features.detach(), *torch.autograd.grad(features, (x, params), grad)


@pytest.mark.parametrize("dims", [3, 4])
@pytest.mark.parametrize("n_points", [2047, 4999])
def test_bits_do_not_depend_on_the_number_of_threads(
    small_layout, draw, restore_threads, dims, n_points
):
    layout = small_layout(dims, n_levels=5)
    x, params = draw.uniform(n_points, dims).float(), draw.normal(layout.n_params).float()
    grad = draw.normal(n_points, layout.n_output_dims).float()
    results = []
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        results.append(run(x, params, layout, grad))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


def test_bits_of_a_point_do_not_depend_on_its_place(small_layout, draw):
    layout = small_layout(4)
    x, params = draw.uniform(130, 4).float(), draw.normal(layout.n_params).float()
    whole = cpu_backend.encode(x, params, layout)
    for begin, end in ((0, 1), (7, 20), (64, 130)):
        assert torch.equal(cpu_backend.encode(x[begin:end], params, layout), whole[begin:end])


def test_the_gradient_of_a_table_of_published_size_is_whole(small_layout, draw):
    """Such a gradient lies on huge pages where it can; entries up to both of its ends count."""
    layout = small_layout(3, n_levels=14, log2_hashmap_size=19, per_level_scale=2.0)
    assert layout.n_params * 4 > 32 * 2**20
    x, grad = draw.uniform(300, 3).float(), draw.normal(300, layout.n_output_dims).float()
    params = torch.zeros(layout.n_params, requires_grad=True)
    (expected,) = torch.autograd.grad(torch_backend.encode(x, params, layout), params, grad)
    for _ in range(2):  # the second one's memory may be the first one's
        _, _, got = run(x, params, layout, grad)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_features", [1, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_other_feature_counts(small_layout, draw, n_features):
    layout = small_layout(3, n_features_per_level=n_features)
    x, params = draw.uniform(70, 3), draw.normal(layout.n_params)
    grad = draw.normal(70, layout.n_output_dims)
    points, table = x.requires_grad_(), params.requires_grad_()
    features = torch_backend.encode(points, table, layout)
    expected = (features.detach(), *torch.autograd.grad(features, (points, table), grad))
    for actual, wanted in zip(run(x, params, layout, grad), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-11)


def second_order(encode, x, params, layout):
    """Gradient of an eikonal-like penalty, as training with analytic normals takes it."""
    x, params = x.detach().requires_grad_(), params.detach().requires_grad_()
    features = encode(x, params, layout)
    (normal,) = torch.autograd.grad((features**2).sum(), x, create_graph=True)
    loss = ((normal.norm(dim=-1) - 1) ** 2).mean()
    return normal.detach(), *torch.autograd.grad(loss, (x, params))


def test_second_derivatives_equal_the_twins(small_layout, draw):
    layout = small_layout(3)
    x, params = draw.uniform(40, 3), draw.normal(layout.n_params)
    expected = second_order(torch_backend.encode, x, params, layout)
    for actual, wanted in zip(second_order(cpu_backend.encode, x, params, layout), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_second_derivatives_are_routed_to_the_twin_and_first_ones_are_not(
    small_layout, draw, monkeypatch
):
    layout = small_layout(3)
    calls = []
    twin = torch_backend.encode
    monkeypatch.setattr(torch_backend, "encode", lambda *a: calls.append(1) or twin(*a))
    x = draw.uniform(5, 3).requires_grad_()
    features = cpu_backend.encode(x, draw.normal(layout.n_params), layout)
    (first,) = torch.autograd.grad((features**2).sum(), x, create_graph=True)
    assert not calls
    first.square().sum().backward()
    assert calls == [1]
    assert x.grad.isfinite().all()


def test_third_derivatives_are_refused(small_layout, draw):
    layout = small_layout(3)
    x = draw.uniform(5, 3).requires_grad_()
    features = cpu_backend.encode(x, draw.normal(layout.n_params), layout)
    (first,) = torch.autograd.grad((features**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        second.sum().backward()


def test_a_library_of_another_case_is_refused(small_layout, draw, monkeypatch):
    three, four = small_layout(3), small_layout(4)
    library = cpu_backend._library_for((three,), torch.float64)
    monkeypatch.setattr(cpu_backend, "_library_for", lambda *_: library)
    with pytest.raises(RuntimeError, match="the library is of another case"):
        cpu_backend.encode(draw.uniform(2, 4), draw.normal(four.n_params), four)


@pytest.fixture
def summed(small_layout, draw):
    """Layouts and tables of a 3D and a 4D grid, and points, some of them outside [0, 1]."""
    layouts = small_layout(3), small_layout(4)
    tables = [draw.normal(layout.n_params) for layout in layouts]
    return layouts, tables, 1.2 * draw.uniform(2100, 4) - 0.1


def gradients_of_sum(encode, x, tables, layouts, grad):
    x, *tables = (each.detach().requires_grad_() for each in (x, *tables))
    features = encode(x, tables, layouts)
    return features.detach(), *torch.autograd.grad(features, (x, *tables), grad)


@pytest.mark.parametrize("n_points", [0, 1, 64, 65, 2100])
def test_a_sum_of_grids_equals_the_twins(summed, draw, n_points):
    layouts, tables, x = summed
    grad = draw.normal(n_points, layouts[0].n_output_dims)
    for actual, wanted in zip(
        gradients_of_sum(cpu_backend.encode_sum, x[:n_points], tables, layouts, grad),
        gradients_of_sum(grid_autograd.sum_of_twins, x[:n_points], tables, layouts, grad),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


def test_a_sum_has_the_bits_of_its_parts_on_any_number_of_threads(summed, draw, restore_threads):
    layouts, tables, x = summed
    tables, x = [table.float() for table in tables], x.float()
    grad = draw.normal(len(x), layouts[0].n_output_dims).float()
    parts = [
        run(x[:, : layout.n_input_dims], table, layout, grad)
        for layout, table in zip(layouts, tables, strict=True)
    ]
    for n_threads in (1, 2, 5):
        torch.set_num_threads(n_threads)
        features, _, *of_tables = gradients_of_sum(
            cpu_backend.encode_sum, x, tables, layouts, grad
        )
        assert torch.equal(features, parts[0][0] + parts[1][0])
        for actual, (_, _, expected) in zip(of_tables, parts, strict=True):
            assert torch.equal(actual, expected)


def test_a_frozen_part_of_a_sum_gets_no_gradient(summed):
    layouts, (static, dynamic), x = summed
    dynamic.requires_grad_()
    cpu_backend.encode_sum(x, (static, dynamic), layouts).sum().backward()
    assert static.grad is None and dynamic.grad.abs().sum() > 0


def test_second_derivatives_of_a_sum_equal_the_twins(summed):
    layouts, tables, x = summed
    results = []
    for encode in (cpu_backend.encode_sum, grid_autograd.sum_of_twins):
        points, *leaves = (each.detach().requires_grad_() for each in (x[:40], *tables))
        features = encode(points, leaves, layouts)
        (normal,) = torch.autograd.grad((features**2).sum(), points, create_graph=True)
        loss = ((normal.norm(dim=-1) - 1) ** 2).mean()
        results.append(torch.autograd.grad(loss, (points, *leaves)))
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_two_grids_are_one_call_where_they_can_be(summed, monkeypatch):
    layouts, tables, x = summed
    called = []
    together = cpu_backend.encode_sum
    monkeypatch.setattr(
        cpu_backend, "encode_sum", lambda *args: called.append(1) or together(*args)
    )
    hash_grid_encode_sum(x, *tables, *layouts)
    assert called == [1]
    monkeypatch.setattr(cpu_backend, "has_sum", lambda *_: False)
    alone = hash_grid_encode_sum(x, *tables, *layouts)
    assert called == [1], "without its build, one after the other"
    assert torch.equal(alone, together(x, tables, layouts))


def test_unequal_numbers_of_levels_are_refused_by_the_kernel(small_layout, draw):
    layouts = small_layout(3), small_layout(4, n_levels=5)
    tables = [draw.normal(layout.n_params) for layout in layouts]
    with pytest.raises(RuntimeError, match="the library is of another case"):
        cpu_backend.encode_sum(draw.uniform(3, 4), tables, layouts)


def test_coordinates_at_the_limit_and_beyond(small_layout, draw):
    """Beyond 2^30 cells a coordinate stays where it is and has no slope; a NaN gives NaN."""
    layout = small_layout(3)
    params = draw.normal(layout.n_params)
    x = draw.uniform(6, 3)
    x[0, 0], x[1, 1], x[2, 2], x[3, 0], x[4, 1] = 1e12, -1e12, float("inf"), float("nan"), -0.0
    x.requires_grad_()
    features = cpu_backend.encode(x, params, layout)
    (grad,) = torch.autograd.grad(features.sum(), x)
    assert grad[0, 0] == 0 and grad[1, 1] == 0 and grad[2, 2] == 0
    assert grad[0, 1:].abs().min() > 0
    assert features[3].isnan().all() and features[[0, 1, 2, 4, 5]].isfinite().all()
