"""Small networks: blocked evaluation equals the plain one in value, gradient and curvature."""

import gc
import math

import pytest
import torch
from threestudio.models import mlp
from threestudio.models.networks import SphereInitVanillaMLP, VanillaMLP
from threestudio.utils import rng
from torch import nn

CONFIG = {"otype": "VanillaMLP", "n_neurons": 64, "n_hidden_layers": 1}


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 points, so that small inputs cross several of them."""
    monkeypatch.setattr(mlp, "BLOCK_POINTS", 16)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(function, x, parameters, grad):
    x = x.detach().requires_grad_()
    outputs = function(x)
    return outputs.detach(), *torch.autograd.grad(outputs, (x, *parameters), grad)


@pytest.mark.parametrize("n_hidden_layers", [1, 2, 3])
@pytest.mark.parametrize("n_points", [17, 32, 77])
def test_blocks_equal_the_sequential(small_blocks, n_hidden_layers, n_points):
    network = VanillaMLP(32, 3, {**CONFIG, "n_hidden_layers": n_hidden_layers})
    x, grad = normal(n_points, 32), normal(n_points, 3, seed=1)
    parameters = list(network.parameters())
    blocked = run(network, x, parameters, grad)
    plain = run(network.layers, x, parameters, grad)
    # Sums over points run in another order.
    for actual, expected in zip(blocked, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_the_real_size_equal_the_sequential():
    network = VanillaMLP(32, 1, CONFIG)
    x, grad = normal(mlp.BLOCK_POINTS + 5, 32), normal(mlp.BLOCK_POINTS + 5, 1, seed=1)
    parameters = list(network.parameters())
    for actual, expected in zip(
        run(network, x, parameters, grad), run(network.layers, x, parameters, grad), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_blocked_gradients_against_differences(small_blocks):
    network = VanillaMLP(3, 2, {"n_neurons": 8, "n_hidden_layers": 2}).double()
    x = normal(20, 3).double().requires_grad_()
    weights = [layer.weight for layer in network.layers if isinstance(layer, nn.Linear)]
    other = [normal(5, 3, seed=1), normal(4, 5, seed=2)]
    weights += [weight.double().requires_grad_() for weight in other]

    def both(x, *weights):
        return mlp._BlockedMLPs.apply(x, (3, 2), *weights)

    assert torch.autograd.gradcheck(both, (x, *weights), fast_mode=True)
    assert torch.autograd.gradgradcheck(both, (x, *weights), fast_mode=True)


@pytest.mark.parametrize("depths", [(1, 1), (1, 2), (3, 1, 2)])
def test_networks_together_equal_each_alone(small_blocks, depths):
    networks = [
        VanillaMLP(32, 1 + place, {"n_neurons": 8 + 4 * place, "n_hidden_layers": depth})
        for place, depth in enumerate(depths)
    ]
    x = normal(45, 32)
    grads = [normal(45, 1 + place, seed=place) for place in range(len(depths))]
    together, alone = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = mlp.evaluate_together(networks, together)
    parameters = [p for network in networks for p in network.parameters()]
    actual = torch.autograd.grad(outputs, (together, *parameters), grads)
    plain = [network.layers(alone) for network in networks]
    expected = torch.autograd.grad(plain, (alone, *parameters), grads)
    for one, other in zip((*outputs, *actual), (*plain, *expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_networks_together_have_their_own_output_activations(small_blocks):
    networks = [VanillaMLP(4, 1, CONFIG), VanillaMLP(4, 3, {**CONFIG, "output_activation": "exp"})]
    x = normal(40, 4)
    first, second = mlp.evaluate_together(networks, x.view(8, 5, 4))
    assert first.shape == (8, 5, 1) and second.shape == (8, 5, 3)
    torch.testing.assert_close(first.flatten(0, 1), networks[0].layers(x))
    torch.testing.assert_close(second.flatten(0, 1), networks[1].layers(x).exp())


def test_a_forward_pass_of_a_subclass_is_its_own(small_blocks):
    class Doubled(VanillaMLP):
        def forward(self, x):
            return 2 * super().forward(x)

    networks, x = [VanillaMLP(4, 1, CONFIG), Doubled(4, 2, CONFIG)], normal(40, 4)
    _, doubled = mlp.evaluate_together(networks, x)
    torch.testing.assert_close(doubled, 2 * networks[1].layers(x))


def test_a_network_without_blocks_lets_the_others_run_alone(small_blocks):
    networks = [VanillaMLP(4, 1, CONFIG), VanillaMLP(4, 2, {**CONFIG, "bias": True})]
    x = normal(40, 4)
    for network, outputs in zip(networks, mlp.evaluate_together(networks, x), strict=True):
        assert torch.equal(outputs, network(x))


def test_the_blocked_path_is_taken_only_for_many_points(small_blocks, monkeypatch):
    network = VanillaMLP(3, 2, CONFIG)
    calls = []
    plain = mlp._plain_mlp
    monkeypatch.setattr(mlp, "_plain_mlp", lambda x, w: calls.append(len(x)) or plain(x, w))
    network(normal(16, 3))
    assert calls == []
    network(normal(40, 3))
    assert calls == [16, 16, 8]


def test_blocks_keep_no_hidden_activation(small_blocks):
    network = VanillaMLP(3, 2, CONFIG)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        network(normal(64, 3))
    assert (64, 64) not in saved
    assert sorted(saved) == [(2, 64), (64, 3), (64, 3)]  # weights and the input


def test_blocks_keep_none_outside_autograd_either(small_blocks):
    network, x = VanillaMLP(3, 2, CONFIG), normal(64, 3)
    before = live_tensors()
    outputs = network(x)
    kept = [tuple(t.shape) for key, t in live_tensors().items() if key not in before]
    # Inputs and outputs have new names here and there; hidden activations would be 64 wide.
    assert outputs.requires_grad and (64, 2) in kept and set(kept) <= {(64, 2), (64, 3)}


def live_tensors():
    """Every tensor that Python knows, by identity."""
    gc.collect()
    return {id(each): each for each in gc.get_objects() if type(each) is torch.Tensor}


@pytest.mark.parametrize("needs_x", [False, True])
@pytest.mark.parametrize("needs_weights", [False, True])
def test_gradients_come_only_where_asked(small_blocks, needs_x, needs_weights):
    network = VanillaMLP(3, 2, CONFIG).requires_grad_(needs_weights)
    x = normal(40, 3).requires_grad_(needs_x)
    outputs = network(x)
    assert outputs.requires_grad == (needs_x or needs_weights)
    if outputs.requires_grad:
        outputs.sum().backward()
    assert (x.grad is not None) == needs_x
    assert all((p.grad is not None) == needs_weights for p in network.parameters())


def test_second_derivative_through_blocks_equals_the_plain_one(small_blocks):
    network = VanillaMLP(3, 1, {**CONFIG, "n_hidden_layers": 2})

    def penalty(function):
        x = normal(40, 3).requires_grad_()
        (slope,) = torch.autograd.grad((function(x) ** 2).sum(), x, create_graph=True)
        return torch.autograd.grad((slope**2).sum(), (x, *network.parameters()))

    for actual, expected in zip(penalty(network), penalty(network.layers), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_leading_dimensions_are_kept(small_blocks):
    network = VanillaMLP(3, 2, CONFIG)
    x = normal(5, 7, 3)
    torch.testing.assert_close(network(x).flatten(0, 1), network(x.flatten(0, 1)))
    assert network(x).shape == (5, 7, 2)
    assert network(x[:0]).shape == (0, 7, 2)


def test_output_activation_and_bias(small_blocks):
    network = VanillaMLP(3, 2, {**CONFIG, "output_activation": "sigmoid", "bias": True})
    x = normal(40, 3)
    torch.testing.assert_close(network(x), network.layers(x).sigmoid())
    assert sum(p.numel() for p in network.parameters()) == 3 * 64 + 64 + 64 * 2 + 2


@pytest.mark.parametrize("n_points", [8, 40])
def test_autocast_is_off(small_blocks, n_points):
    network = VanillaMLP(3, 2, CONFIG)
    x = normal(n_points, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = network(x.bfloat16())
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs, network(x.bfloat16().float()))


def test_parameter_names_are_the_contracts():
    network = VanillaMLP(32, 3, {**CONFIG, "n_hidden_layers": 2})
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == {
        "layers.0.weight": (64, 32),
        "layers.2.weight": (64, 64),
        "layers.4.weight": (3, 64),
    }


def test_weights_depend_on_seed_and_sizes_alone():
    state = torch.random.get_rng_state()
    first = VanillaMLP(32, 3, CONFIG).layers[0].weight
    VanillaMLP(32, 1, CONFIG)
    assert torch.equal(first, VanillaMLP(32, 3, CONFIG).layers[0].weight)
    assert not torch.equal(first, VanillaMLP(32, 1, CONFIG).layers[0].weight)
    assert first.abs().max() <= 1 / math.sqrt(32)
    assert abs(first.std().item() * math.sqrt(32 * 3) - 1) < 0.05  # of a uniform distribution
    assert torch.equal(torch.random.get_rng_state(), state)
    before = rng.experiment_seed()
    try:
        rng.set_experiment_seed(before + 1)
        assert not torch.equal(first, VanillaMLP(32, 3, CONFIG).layers[0].weight)
    finally:
        rng.set_experiment_seed(before)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_sphere_initialisation_is_the_distance_to_a_sphere(weight_norm):
    config = {"n_neurons": 512, "n_hidden_layers": 2, "sphere_init_radius": 0.4}
    network = SphereInitVanillaMLP(7, 1, {**config, "weight_norm": weight_norm})
    activations = [layer for layer in network.layers if isinstance(layer, nn.Softplus)]
    assert [layer.beta for layer in activations] == [100, 100]
    for layer in activations:
        layer.beta = 1e5  # the identity holds for ReLU; softplus adds to it near the origin
    directions = torch.nn.functional.normalize(normal(300, 3), dim=-1)
    for radius in (0.2, 0.4, 0.9):
        x = torch.cat((radius * directions, normal(300, 4, seed=2)), dim=-1)
        # Exact for infinite width; 512 random units are off by some percent.
        assert network(x).mean().item() == pytest.approx(radius - 0.4, abs=0.06 * radius)


def test_sphere_initialisation_ignores_the_features():
    network = SphereInitVanillaMLP(7, 1, {"n_neurons": 32, "n_hidden_layers": 1})
    x = normal(10, 7)
    other = torch.cat((x[:, :3], normal(10, 4, seed=3)), dim=-1)
    torch.testing.assert_close(network(x), network(other))
    assert any("original1" in name for name, _ in network.named_parameters())
