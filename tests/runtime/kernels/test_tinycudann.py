"""The modules of `import tinycudann` where the real package is absent, against slow references."""

import copy
import math
import pickle

import pytest
import torch
from threestudio.kernels import tinycudann as tcnn
from threestudio.kernels.hash_grid import HashGridEncoding

GRID = {"otype": "HashGrid", "n_levels": 2, "log2_hashmap_size": 8, "base_resolution": 4}
N_GRID = 2 * (64 + 256)
MLP = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 2}


@pytest.fixture
def x():
    return torch.rand(7, 3, generator=torch.Generator().manual_seed(1))


def slow_network(params, x, sizes, n_outputs, hidden=lambda v: max(v, 0.0), output=lambda v: v):
    """tiny-cuda-nn's network by loops: one flat vector, row-major [out, in], first layer first."""
    rows, params = [], params.tolist()
    for point in x.double().tolist():
        used, values = 0, point
        for layer, (fan_out, fan_in) in enumerate(sizes):
            assert len(values) == fan_in
            act = output if layer == len(sizes) - 1 else hidden
            raw = [
                sum(params[used + o * fan_in + i] * values[i] for i in range(fan_in))
                for o in range(fan_out)
            ]
            values, used = [act(v) for v in raw], used + fan_out * fan_in
        rows.append(values[:n_outputs])
    assert used == len(params)
    return torch.tensor(rows, dtype=torch.float32)


def test_a_network_pads_its_input_with_ones_and_its_output_away(x):
    network = tcnn.Network(3, 5, MLP)
    sizes = [(16, 16), (16, 16), (16, 16)]
    assert network.params.shape == (3 * 256,) and (network.n_input_dims, network.n_output_dims) == (
        3, 5,
    )  # fmt: skip
    padded = torch.cat([x, torch.ones(7, 13)], dim=1)
    expected = slow_network(network.params, padded, sizes, 5)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-6)
    assert network(x).dtype == torch.float32


def test_more_than_sixteen_inputs_and_outputs_are_rounded_up():
    network = tcnn.Network(17, 20, {"otype": "CutlassMLP", "n_neurons": 24, "n_hidden_layers": 1})
    assert network.params.numel() == 24 * 32 + 32 * 24
    linear = tcnn.Network(3, 2, {"otype": "CutlassMLP", "n_hidden_layers": 0})
    assert linear.params.numel() == 16 * 16


@pytest.mark.parametrize(
    "name, function",
    [
        ("None", lambda v: v),
        ("relu", lambda v: max(v, 0.0)),
        ("LeakyReLU", lambda v: v if v > 0 else 0.01 * v),
        ("Exponential", math.exp),
        ("Sine", math.sin),
        ("Sigmoid", lambda v: 1 / (1 + math.exp(-v))),
        ("Tanh", math.tanh),
        ("Squareplus", lambda v: 0.5 * (10 * v + math.sqrt(100 * v * v + 4)) / 10),
        ("Softplus", lambda v: math.log(math.exp(10 * v) + 1) / 10),
    ],
)
def test_activations(x, name, function):
    config = {**MLP, "n_hidden_layers": 1, "activation": name, "output_activation": name}
    network = tcnn.Network(3, 2, config)
    padded = torch.cat([x, torch.ones(7, 13)], dim=1)
    expected = slow_network(
        network.params, padded, [(16, 16), (16, 16)], 2, hidden=function, output=function
    )
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


def test_weights_of_the_network_come_before_those_of_its_encoding(x):
    """The grid's 4 features are widened to 16 by zeros."""
    module = tcnn.NetworkWithInputEncoding(3, 1, GRID, MLP)
    assert module.params.numel() == 3 * 256 + N_GRID
    with torch.no_grad():
        module.params[3 * 256 :] *= 1e4  # features of about one
    grid = HashGridEncoding(3, GRID)
    with torch.no_grad():
        grid.params.copy_(module.params[3 * 256 :])
    features = torch.cat([grid(x), torch.zeros(7, 12)], dim=1)
    expected = slow_network(module.params[: 3 * 256], features, [(16, 16)] * 3, 1)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-6)


def test_start_values_have_the_documented_ranges_and_follow_the_seed():
    network = tcnn.Network(3, 3, {**MLP, "n_neurons": 64, "n_hidden_layers": 1}, seed=5)
    bound = math.sqrt(6 / (64 + 16))
    assert 0.9 * bound < network.params.abs().max() <= bound
    assert torch.equal(network.params, tcnn.Network(3, 3, network.network_config, seed=5).params)
    other = tcnn.Network(3, 3, network.network_config)
    assert not torch.equal(network.params, other.params) and other.seed == 1337
    assert tcnn.Encoding(3, GRID).params.abs().max() <= 1e-4


def test_a_grid_is_our_grid(x):
    ours, theirs = HashGridEncoding(3, GRID), tcnn.Encoding(3, GRID)
    assert torch.equal(ours.params, theirs.params)
    assert torch.equal(ours(x), theirs(x)) and theirs.n_output_dims == 4


def test_frequency_by_hand():
    encoding = tcnn.Encoding(2, {"otype": "Frequency", "n_frequencies": 2})
    a, b = 0.1, 0.7
    expected = [
        trig(math.pi * 2**k * value)
        for value in (a, b)
        for k in (0, 1)
        for trig in (math.sin, math.cos)
    ]
    torch.testing.assert_close(encoding(torch.tensor([[a, b]])), torch.tensor([expected]))
    assert encoding.n_output_dims == 8 and encoding.params.shape == (0,)


def test_identity_and_spherical_harmonics(x):
    identity = tcnn.Encoding(3, {"otype": "identity", "scale": 2.0, "offset": -1.0})
    assert torch.equal(identity(x), x * 2 - 1)
    harmonics = tcnn.Encoding(3, {"otype": "SphericalHarmonics", "degree": 2})
    up = harmonics(torch.tensor([[0.5, 0.5, 1.0]]))
    band = math.sqrt(3 / (4 * math.pi))
    expected = torch.tensor([[0.5 / math.sqrt(math.pi), 0.0, band, 0.0]])
    torch.testing.assert_close(up, expected)


def test_composite_splits_the_input_and_shares_one_vector(x):
    nested = [
        {"n_dims_to_encode": 2, **GRID},
        {"otype": "Identity", "scale": 3.0},
    ]
    encoding = tcnn.Encoding(3, {"otype": "Composite", "nested": nested})
    assert encoding.n_output_dims == 4 + 1
    grid = HashGridEncoding(2, GRID)
    with torch.no_grad():
        grid.params.copy_(encoding.params)
    expected = torch.cat([grid(x[:, :2].contiguous()), 3 * x[:, 2:]], dim=1)
    torch.testing.assert_close(encoding(x), expected)


@pytest.mark.parametrize("reduction, join", [("Sum", torch.add), ("Product", torch.mul)])
def test_composite_may_reduce_encodings_of_the_same_dimensions(x, reduction, join):
    nested = [
        {"n_dims_to_encode": 2, "dims_to_encode_begin": begin, "otype": "Identity"}
        for begin in (0, 1)
    ]
    encoding = tcnn.Encoding(3, {"otype": "Composite", "reduction": reduction, "nested": nested})
    torch.testing.assert_close(encoding(x), join(x[:, :2], x[:, 1:]))


def test_dtype_is_that_of_the_features_and_weights_stay_fp32(x):
    half = tcnn.Encoding(3, GRID, dtype=torch.float16)
    assert half(x).dtype == half.dtype == torch.float16 and half.params.dtype == torch.float32
    assert torch.equal(half(x), tcnn.Encoding(3, GRID)(x).half())
    with torch.autocast("cpu", torch.bfloat16):
        assert tcnn.Network(3, 2, MLP)(x).dtype == torch.float32
    with pytest.raises(ValueError, match="dtype is torch.float64; expected torch.float32 or"):
        tcnn.Encoding(3, GRID, dtype=torch.float64)


def test_gradients_reach_points_and_weights(x):
    module = tcnn.NetworkWithInputEncoding(3, 2, {"otype": "Frequency", "n_frequencies": 2}, MLP)
    x = x.requires_grad_(True)
    module(x).sum().backward()
    assert module.params.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


def test_copies_and_state_dicts(x):
    module = tcnn.NetworkWithInputEncoding(3, 2, GRID, MLP)
    assert list(module.state_dict()) == ["params"]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    tcnn.free_temporary_memory()


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: tcnn.Encoding(3, {"otype": "OneBlob"}), "'OneBlob' of tinycudann needs the real"),
        (lambda: tcnn.Encoding(3, {}), "'OneBlob' of tinycudann needs the real package and a GPU"),
        (lambda: tcnn.Encoding(3, {"otype": "TiledGrid"}), "nearest are .*Grid"),
        (lambda: tcnn.Network(3, 1, {"otype": "ResNet"}), "the network 'ResNet' of tinycudann"),
        (lambda: tcnn.Network(3, 1, {**MLP, "n_neurons": 24}), "is 24; expected one of .16, 32"),
        (lambda: tcnn.Network(3, 1, {**MLP, "n_hidden_layers": 0}), "is 0; expected at least 1"),
        (lambda: tcnn.Network(3, 1, {**MLP, "activation": "Snake"}), "'Snake'; expected one of"),
        (lambda: tcnn.Encoding(3, {"otype": "Composite"}), "is None; expected a list of encodings"),
        (
            lambda: tcnn.Encoding(3, composite({"n_dims_to_encode": 4, "otype": "Identity"})),
            r"take \[4\] of 3 dimensions; expected no more",
        ),
        (
            lambda: tcnn.Encoding(
                3,
                composite({"n_dims_to_encode": 2, "dims_to_encode_begin": 2, "otype": "Identity"}),
            ),
            "takes dimensions 2 to 4 of 3",
        ),
        (
            lambda: tcnn.Encoding(3, composite({"otype": "Identity"}, reduction="Mean")),
            "is 'Mean'; expected Concatenation, Sum or Product",
        ),
        (
            lambda: tcnn.Encoding(
                3, composite({"n_dims_to_encode": 2, "otype": "Identity"}, {"otype": "Identity"},
                             reduction="Sum"),
            ),
            r"nests encodings of \[2, 1\] features; expected equal numbers",
        ),
    ],
)  # fmt: skip
def test_refusals(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def composite(*nested, **keys):
    return {"otype": "Composite", "nested": list(nested), **keys}


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3)])
def test_points_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(n, 3\). Flatten leading dimensions"):
        tcnn.Encoding(3, GRID)(torch.zeros(shape))
