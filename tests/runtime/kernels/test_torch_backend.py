"""The twin defines the semantics, so it is checked by hand, by slow loops and by differences."""

import itertools
import math

import pytest
import torch
from threestudio.kernels import torch_backend
from threestudio.kernels.grid_layout import HASH_PRIMES


def slow_encode(x, params, layout):
    """One point, level and corner at a time, in Python integers and floats."""
    rows = []
    n_features = layout.n_features_per_level
    for point in x.tolist():
        row = []
        for level in range(layout.n_levels):
            position = [value * layout.scales[level] + 0.5 for value in point]
            cell = [math.floor(value) for value in position]
            sums = [0.0] * n_features
            for corner in itertools.product((0, 1), repeat=len(point)):
                weight, key, stride = 1.0, 0, 1
                for dim, bit in enumerate(corner):
                    fraction = position[dim] - cell[dim]
                    weight *= fraction if bit else 1 - fraction
                    coordinate = (cell[dim] + bit) % 2**32
                    if layout.is_hashed(level):
                        key ^= coordinate * HASH_PRIMES[dim] % 2**32
                    else:
                        key = (key + coordinate * stride) % 2**32
                        stride *= layout.resolutions[level]
                entry = layout.offsets[level] + key % layout.entries[level]
                for feature in range(n_features):
                    sums[feature] += weight * float(params[entry * n_features + feature])
            row += sums
        rows.append(row)
    return torch.tensor(rows, dtype=x.dtype)


@pytest.mark.parametrize("dims", [2, 3, 4])
@pytest.mark.parametrize("n_features", [1, 2])
def test_equals_slow_loops_inside_and_outside_the_unit_cube(small_layout, draw, dims, n_features):
    layout = small_layout(dims, n_features_per_level=n_features)
    x = draw.uniform(24, dims, low=-0.5, high=1.5)
    params = draw.normal(layout.n_params)
    # Both are double; the sums run in different orders.
    torch.testing.assert_close(
        torch_backend.encode(x, params, layout), slow_encode(x, params, layout),
        rtol=0, atol=1e-12,
    )  # fmt: skip


def test_linear_function_is_reproduced_by_a_dense_level(small_layout):
    layout = small_layout(2, n_levels=1, n_features_per_level=1, base_resolution=5)
    # A vertex (i, j) holds 2i - 3j; multilinear interpolation reproduces it between vertices.
    grid = torch.arange(5.0, dtype=torch.float64)
    vertices = (2 * grid[None, :] - 3 * grid[:, None]).flatten()
    params = torch.zeros(layout.n_params, dtype=torch.float64)
    params[:25] = vertices
    x = torch.tensor([[0.1, 0.2], [0.5, 0.7]], dtype=torch.float64)
    position = x * 4 + 0.5
    expected = 2 * position[:, :1] - 3 * position[:, 1:]
    torch.testing.assert_close(torch_backend.encode(x, params, layout), expected)


@pytest.mark.parametrize("dims", [2, 3, 4])
def test_first_and_second_derivatives_against_differences(small_layout, draw, dims):
    layout = small_layout(dims, n_levels=3, log2_hashmap_size=6)
    params = draw.normal(layout.n_params).requires_grad_()
    # Fractions between 0.2 and 0.8 at every level: the derivative jumps at cell faces.
    x = draw.uniform(4000, dims)
    fraction = torch.cat([(x * scale + 0.5) % 1 for scale in layout.scales], dim=1)
    x = x[((fraction - 0.5).abs() < 0.3).all(dim=1)][:2]
    assert len(x) == 2, "the seed gives no such points; draw more"
    x.requires_grad_()

    def encode(points, table):
        return torch_backend.encode(points, table, layout)

    assert torch.autograd.gradcheck(encode, (x, params), eps=1e-6, atol=1e-7, fast_mode=True)
    assert torch.autograd.gradgradcheck(encode, (x, params), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_of_the_table(small_layout, draw, dtype):
    layout = small_layout(3)
    x, params = draw.uniform(50, 3), draw.normal(layout.n_params)
    expected = torch_backend.encode(x, params, layout)
    actual = torch_backend.encode(x.float(), params.to(dtype), layout)
    assert actual.dtype == dtype
    # Eight corners of unit variance, each rounded once.
    tolerance = 8 * torch.finfo(dtype).eps + 3e-5
    assert (actual.double() - expected).abs().max() < 4 * tolerance


def test_corner_indices_by_hand(small_layout):
    layout = small_layout(3)
    # Level 0 has 4 vertices per axis and 64 entries: index = x + 4y + 16z, modulo 64.
    cells = torch.tensor([[0, 0, 0], [3, 3, 3], [-1, 0, 0]])
    indices = torch_backend.corner_indices(cells, layout, 0).sort().values
    assert indices[0].tolist() == [0, 1, 4, 5, 16, 17, 20, 21]
    # Corners at coordinate 4 lie past the border: 63 + {0, 1, 4, 5, 16, 17, 20, 21} modulo 64.
    assert indices[1].tolist() == [0, 3, 4, 15, 16, 19, 20, 63]
    # -1 is 2^32 - 1, that is 63 modulo 64.
    assert indices[2].tolist() == [0, 3, 4, 15, 16, 19, 20, 63]


def test_hashed_corner_indices_by_hand(small_layout):
    layout = small_layout(3)
    assert [layout.is_hashed(level) for level in range(4)] == [False, False, True, True]
    indices = torch_backend.corner_indices(torch.tensor([[0, 0, 0]]), layout, 2)
    # The primes modulo 256 are 1, 177 and 149; corners are the xor of the chosen ones.
    y, z = 177, 149
    assert sorted(indices[0].tolist()) == sorted([0, 1, y, y ^ 1, z, z ^ 1, y ^ z, y ^ z ^ 1])
