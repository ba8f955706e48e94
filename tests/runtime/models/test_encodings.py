"""Encodings beside the grid: harmonics, progressive bands and the composite around them."""

import math

import numpy as np
import pytest
import torch
from threestudio.models.encodings import (
    CompositeEncoding,
    ProgressiveBandFrequency,
    ProgressiveBandHashGrid,
    SphericalHarmonics,
    TCNNEncoding,
)

GRID = {"n_levels": 4, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}
PROGRESSIVE = {**GRID, "start_level": 2, "start_step": 100, "update_steps": 50}


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def sphere_quadrature():
    """Points and weights that integrate polynomials up to degree 11 over the unit sphere."""
    cosines, weights = np.polynomial.legendre.leggauss(6)
    azimuths = 2 * math.pi * np.arange(12) / 12
    cos_theta, phi = (grid.flatten() for grid in np.meshgrid(cosines, azimuths, indexing="ij"))
    sin_theta = np.sqrt(1 - cos_theta**2)
    points = np.stack((sin_theta * np.cos(phi), sin_theta * np.sin(phi), cos_theta), axis=-1)
    return torch.from_numpy(points), torch.from_numpy(np.repeat(weights, 12) * 2 * math.pi / 12)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_harmonics_are_orthonormal(degree):
    points, weights = sphere_quadrature()
    values = SphericalHarmonics(3, {"degree": degree})((points + 1) / 2)
    gram = values.t() @ (weights[:, None] * values)
    torch.testing.assert_close(gram, torch.eye(degree**2, dtype=torch.float64))


def test_harmonics_keep_order_and_sign_of_tiny_cuda_nn():
    x, y, z = direction = (0.36, 0.48, 0.8)
    values = SphericalHarmonics(3, {"degree": 4})((torch.tensor([direction]) + 1) / 2)[0].tolist()
    # The constants as tiny-cuda-nn writes them.
    expected = [
        0.28209479177387814,
        -0.48860251190291987 * y,
        0.48860251190291987 * z,
        -0.48860251190291987 * x,
        1.0925484305920792 * x * y,
        -1.0925484305920792 * y * z,
        0.94617469575755997 * z * z - 0.31539156525251999,
        -1.0925484305920792 * x * z,
        0.54627421529603959 * (x * x - y * y),
        0.59004358992664352 * y * (-3.0 * x * x + y * y),
        2.8906114426405538 * x * y * z,
        0.45704579946446572 * y * (1.0 - 5.0 * z * z),
        0.3731763325901154 * z * (5.0 * z * z - 3.0),
        0.45704579946446572 * x * (1.0 - 5.0 * z * z),
        1.4453057213202769 * z * (x * x - y * y),
        0.59004358992664352 * x * (-x * x + 3.0 * y * y),
    ]
    assert values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("dims", "degree", "message"),
    [
        (2, 3, r"directions of 3 numbers; got n_input_dims=2"),
        (3, 5, r"degree is 5; expected 1 to 4"),
        (3, 0, r"degree is 0; expected 1 to 4"),
    ],
)
def test_harmonics_refuse_other_sizes(dims, degree, message):
    with pytest.raises(ValueError, match=message):
        SphericalHarmonics(dims, {"degree": degree})


def test_harmonics_load_checkpoints_with_tiny_cuda_nns_empty_vector():
    encoding = TCNNEncoding(3, {"otype": "SphericalHarmonics", "degree": 3})
    assert not list(encoding.parameters())
    encoding.load_state_dict({"encoding.params": torch.empty(0)})


def test_grid_encoding_keeps_the_contracts_parameter_path():
    encoding = TCNNEncoding(3, {"otype": "HashGrid", **GRID})
    assert [name for name, _ in encoding.named_parameters()] == ["encoding.params"]
    assert encoding(uniform(5, 3)).shape == (5, encoding.n_output_dims) == (5, 8)


def test_grid_back_end_can_be_chosen_by_the_config():
    encoding = TCNNEncoding(3, {"otype": "HashGrid", **GRID, "backend": "torch"})
    assert encoding.encoding.backend == "torch"


def test_frequencies_by_hand():
    encoding = ProgressiveBandFrequency(2, {"n_frequencies": 2})
    x = torch.tensor([[0.1, 0.2]])
    expected = [
        math.sin(0.1), math.sin(0.2), math.cos(0.1), math.cos(0.2),
        math.sin(0.2), math.sin(0.4), math.cos(0.2), math.cos(0.4),
    ]  # fmt: skip
    assert encoding.n_output_dims == 8
    assert encoding(x)[0].tolist() == pytest.approx(expected)
    assert not encoding.state_dict()


@pytest.mark.parametrize(
    ("step", "mask"), [(0, [0, 0]), (25, [0.5, 0]), (50, [1, 0]), (75, [1, 0.5]), (100, [1, 1])]
)
def test_frequency_bands_open_one_after_another(step, mask):
    encoding = ProgressiveBandFrequency(1, {"n_frequencies": 2, "n_masking_step": 100})
    encoding.do_update_step(0, 1000)
    encoding.do_update_step(0, step)  # a function of the step, not of what was before
    x = torch.tensor([[0.3]])
    whole = ProgressiveBandFrequency(1, {"n_frequencies": 2})(x)
    expected = whole * torch.tensor(mask).repeat_interleave(2)
    torch.testing.assert_close(encoding(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("step", "n_levels"), [(0, 2), (100, 2), (149, 2), (150, 3), (200, 4), (10_000, 4)]
)
def test_grid_levels_open_with_the_step(step, n_levels):
    encoding = ProgressiveBandHashGrid(3, PROGRESSIVE)
    encoding.do_update_step(0, 500)
    encoding.do_update_step(0, step)
    x = uniform(6, 3)
    features = encoding(x)
    torch.testing.assert_close(features[:, : 2 * n_levels], encoding.encoding(x)[:, : 2 * n_levels])
    assert not features[:, 2 * n_levels :].any()
    features.sum().backward()
    begin = encoding.encoding.layout.offsets[n_levels] * 2
    assert not encoding.encoding.params.grad[begin:].any()


def test_progressive_grid_starts_at_its_start_level_and_keeps_the_config():
    config = {**PROGRESSIVE, "otype": "ProgressiveBandHashGrid"}
    before = dict(config)
    encoding = ProgressiveBandHashGrid(3, config)
    assert encoding.current_level == 2
    assert config == before
    assert list(encoding.state_dict()) == ["encoding.params"]


def test_composite_puts_scaled_positions_first_and_forwards_steps():
    inner = ProgressiveBandHashGrid(3, PROGRESSIVE)
    encoding = CompositeEncoding(inner, include_xyz=True)
    x = uniform(5, 3)
    outputs = encoding(x)
    assert outputs.shape == (5, encoding.n_output_dims) == (5, 11)
    torch.testing.assert_close(outputs[:, :3], 2 * x - 1)
    torch.testing.assert_close(outputs[:, 3:], inner(x))
    encoding.do_update_step(0, 200)
    assert inner.current_level == 4


def test_composite_spares_encodings_that_know_no_time():
    encoding = CompositeEncoding(TCNNEncoding(3, {"otype": "HashGrid", **GRID}))
    x = uniform(5, 3)
    assert not encoding.accepts_frame_times
    torch.testing.assert_close(encoding(x, frame_times=torch.ones(5)), encoding(x))


def test_composite_finds_a_foreign_encoding_that_takes_times():
    class Foreign(torch.nn.Module):
        n_input_dims, n_output_dims = 3, 1

        def forward(self, x, frame_times=None):
            return frame_times.view(-1, 1)

    encoding = CompositeEncoding(Foreign())
    assert encoding.accepts_frame_times
    assert encoding(uniform(2, 3), frame_times=torch.ones(2)).tolist() == [[1], [1]]
