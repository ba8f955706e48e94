"""Small fully connected networks.

On the CPU a network over many points is memory-bound, so it runs in blocks of points whose
activations stay in cache, and keeps no hidden activation for the backward pass but computes it
again.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from threestudio.utils.ops import get_activation
from threestudio.utils.rng import generator as stream

# Points per block: at 64 neurons the activations of a block take 1 MiB.
BLOCK_POINTS = 4096


class VanillaMLP(nn.Module):
    """Linear layers with ReLU between them, without bias, outside autocast.

    Args:
        dim_in, dim_out: features in and out.
        config: ``n_neurons``, ``n_hidden_layers``, ``output_activation`` (a name that
            `threestudio.utils.ops.get_activation` knows; default none), ``bias`` (default False).

    Weights are U(+-1/sqrt(fan_in)) from the stream "network-init" of the experiment's seed, so they
    depend on the seed and the sizes, not on what was built before. fp32 even under autocast: a
    network this small gains nothing from 16 bits, and density spans many orders of magnitude.
    """

    def __init__(self, dim_in: int, dim_out: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.n_neurons = int(config["n_neurons"])
        self.n_hidden_layers = int(config["n_hidden_layers"])
        bias = bool(config.get("bias", False))
        widths = [dim_in] + [self.n_neurons] * max(self.n_hidden_layers, 1) + [dim_out]
        layers: list[nn.Module] = []
        for layer, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            last = layer == len(widths) - 2
            layers.append(self.make_linear(fan_in, fan_out, layer == 0, last, bias=bias))
            if not last:
                layers.append(self.make_activation())
        self.layers = nn.Sequential(*layers)
        self._initialise("-".join(str(width) for width in widths))
        self.output_activation = get_activation(config.get("output_activation", None))

    def make_linear(
        self, dim_in: int, dim_out: int, is_first: bool, is_last: bool, bias: bool = False
    ) -> nn.Module:
        """One layer, whose weights are drawn afterwards; a subclass may choose another."""
        # nn.Linear draws from the global generator; skip_init would load the compiler stack.
        with torch.random.fork_rng(devices=[]):
            return nn.Linear(dim_in, dim_out, bias=bias)

    def make_activation(self) -> nn.Module:
        """The activation after each hidden layer."""
        return nn.ReLU(inplace=True)

    def _initialise(self, sizes: str) -> None:
        for index, layer in enumerate(self.layers):
            if isinstance(layer, nn.Linear):
                draws = stream(f"network-init {sizes}", step=0, item=index)
                bound = 1 / math.sqrt(layer.in_features)
                with torch.no_grad():
                    for parameter in layer.parameters():
                        parameter.uniform_(-bound, bound, generator=draws)

    def forward(self, x: Float[Tensor, "*batch dim_in"]) -> Float[Tensor, "*batch dim_out"]:
        weights = self.blockable_weights(x)
        if weights:
            return _in_blocks([self], [weights], x)[0]
        with torch.autocast(x.device.type, enabled=False):
            outputs = self.layers(x.to(next(self.layers.parameters()).dtype))
            return self.output_activation(outputs)

    def blockable_weights(self, x: Float[Tensor, "*batch dim_in"]) -> list[Tensor]:
        """The weight matrices if the evaluation in blocks applies to these inputs, else nothing."""
        if x.device.type != "cpu" or x.numel() <= BLOCK_POINTS * x.shape[-1]:
            return []
        weights = []
        for layer in self.layers:
            if isinstance(layer, nn.ReLU):
                continue
            if type(layer) is not nn.Linear or layer.bias is not None:
                return []
            weights.append(layer.weight)
        return weights


def evaluate_together(
    networks: Sequence[nn.Module], x: Float[Tensor, "*batch dim_in"]
) -> list[Float[Tensor, "*batch dim_out"]]:
    """Outputs of several networks of the same inputs.

    Where all are evaluated in blocks, their first layers are one matrix product and the gradient to
    the inputs is made once; otherwise one network runs after the other.
    """
    weights = [
        network.blockable_weights(x) if type(network).forward is VanillaMLP.forward else []
        for network in networks
    ]
    if not all(weights) or len({each[0].dtype for each in weights}) > 1:
        return [network(x) for network in networks]
    return _in_blocks(networks, weights, x)


def _in_blocks(
    networks: Sequence[VanillaMLP], weights: list[list[Tensor]], x: Tensor
) -> list[Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(weights[0][0].dtype)
        counts = tuple(len(each) for each in weights)
        flat = _BlockedMLPs.apply(x.reshape(-1, x.shape[-1]), counts, *chain(*weights))
        return [
            network.output_activation(outputs.view(*x.shape[:-1], -1))
            for network, outputs in zip(networks, flat, strict=True)
        ]


def _plain_mlp(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    for weight in weights[:-1]:
        x = torch.relu(F.linear(x, weight))
    return F.linear(x, weights[-1])


def _networks(counts: tuple[int, ...], tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The tensors of each network, out of those of all."""
    ends = list(accumulate(counts))
    return [tensors[end - count : end] for count, end in zip(counts, ends, strict=True)]


class _BlockedMLPs(torch.autograd.Function):
    """Bias-free ReLU networks of the same inputs, over blocks of points.

    Each equals `_plain_mlp` in value and gradient. `counts` are their numbers of layers.
    """

    @staticmethod
    def forward(ctx, x: Tensor, counts: tuple[int, ...], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.counts = counts
        networks = _networks(counts, weights)
        first = _first_layers(networks)
        outputs = tuple(x.new_empty((x.shape[0], each[-1].shape[0])) for each in networks)
        for begin in range(0, x.shape[0], BLOCK_POINTS):
            block = slice(begin, begin + BLOCK_POINTS)
            hidden = F.linear(x[block], first).relu_()
            for network, part, out in zip(networks, _parts(hidden, networks), outputs, strict=True):
                out[block] = _plain_mlp(part, network[1:])
        return outputs

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *weights = ctx.saved_tensors
        networks = _networks(ctx.counts, weights)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():  # create_graph=True: keep the gradients differentiable
            wanted = [t for t, need in zip((x, *weights), needs, strict=True) if need]
            outputs = [_plain_mlp(x, network) for network in networks]
            found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True))
            grad_x, *grad_weights = (next(found) if need else None for need in needs)
            return grad_x, None, *grad_weights
        grad_x = torch.empty_like(x) if needs[0] else None
        first = _first_layers(networks)
        grad_first = torch.zeros_like(first)
        grad_later = [[torch.zeros_like(weight) for weight in each[1:]] for each in networks]
        for begin in range(0, x.shape[0], BLOCK_POINTS):
            block = slice(begin, begin + BLOCK_POINTS)
            hidden = F.linear(x[block], first).relu_()
            grad_hidden = torch.empty_like(hidden)
            for network, part, grad, sums, out in zip(
                networks, _parts(hidden, networks), grads, grad_later,
                _parts(grad_hidden, networks), strict=True,
            ):  # fmt: skip
                _later_layers_backward(part, network[1:], grad[block], sums, out)
            # The sign of the output of a ReLU tells where its input was positive.
            grad_hidden = torch.ops.aten.threshold_backward(grad_hidden, hidden, 0)
            grad_first.addmm_(grad_hidden.t(), x[block])
            if grad_x is not None:
                torch.mm(grad_hidden, first, out=grad_x[block])
        firsts = _parts(grad_first.t(), networks)
        grad_weights = [
            [of_first.t(), *later] for of_first, later in zip(firsts, grad_later, strict=True)
        ]
        return grad_x, None, *chain(*grad_weights)


def _first_layers(networks: list[Sequence[Tensor]]) -> Tensor:
    """The first layers' weights, one network below the other."""
    return networks[0][0] if len(networks) == 1 else torch.cat([each[0] for each in networks])


def _parts(columns: Tensor, networks: list[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """The columns that belong to each network's first layer."""
    return columns.split([each[0].shape[0] for each in networks], dim=1)


def _later_layers_backward(
    x: Tensor, weights: Sequence[Tensor], grad: Tensor, sums: list[Tensor], out: Tensor
) -> None:
    """Adds one block's share to the gradients of all layers but the first; writes that of x."""
    inputs = [x]
    for weight in weights[:-1]:
        inputs.append(F.linear(inputs[-1], weight).relu_())
    for layer in range(len(weights) - 1, 0, -1):
        sums[layer].addmm_(grad.t(), inputs[layer])
        grad = torch.ops.aten.threshold_backward(grad @ weights[layer], inputs[layer], 0)
    sums[0].addmm_(grad.t(), x)
    torch.mm(grad, weights[0], out=out)


class SphereInitVanillaMLP(VanillaMLP):
    """A network that starts as the signed distance of a sphere (Atzmon and Lipman, SAL, 2020).

    The first three inputs are the point itself; weights are normalised, the activation is a
    softplus with beta 100, layers have biases.

    Args:
        dim_in, dim_out: features in and out; dim_in is at least 3.
        config: as `VanillaMLP`; ``sphere_init_radius`` (0.5) and ``weight_norm`` (True).
    """

    def __init__(self, dim_in: int, dim_out: int, config: Mapping[str, Any]) -> None:
        self._radius = float(config.get("sphere_init_radius", 0.5))
        self._weight_norm = bool(config.get("weight_norm", True))
        super().__init__(dim_in, dim_out, {**config, "bias": True})

    def make_activation(self) -> nn.Module:
        return nn.Softplus(beta=100)

    def _initialise(self, sizes: str) -> None:
        linears = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for index, layer in enumerate(linears):
            draws = stream(f"network-init sphere {sizes}", step=0, item=index)
            with torch.no_grad():
                layer.bias.zero_()
                if layer is linears[-1]:
                    mean = math.sqrt(math.pi / layer.in_features)
                    layer.weight.normal_(mean, 1e-4, generator=draws)
                    layer.bias.fill_(-self._radius)
                    continue
                layer.weight.normal_(0, math.sqrt(2 / layer.out_features), generator=draws)
                if index == 0:
                    layer.weight[:, 3:] = 0  # features of the encoding do not count at first
        if self._weight_norm:
            for layer in linears:
                nn.utils.parametrizations.weight_norm(layer)
