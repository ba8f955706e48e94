"""Small fully connected networks.

On the CPU a network over many points is memory-bound, so it runs in blocks of points whose
activations stay in cache, and keeps no hidden activation for the backward pass but computes it
again.
"""

import math
from collections.abc import Mapping
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
        weights = self._blockable_weights(x)
        with torch.autocast(x.device.type, enabled=False):
            if weights:
                x = x.to(weights[0].dtype)
                flat = _BlockedMLP.apply(x.reshape(-1, x.shape[-1]), *weights)
                outputs = flat.view(*x.shape[:-1], -1)
            else:
                outputs = self.layers(x.to(next(self.layers.parameters()).dtype))
            return self.output_activation(outputs)

    def _blockable_weights(self, x: Tensor) -> list[Tensor]:
        """The weight matrices if the blocked evaluation applies, else nothing."""
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


def _plain_mlp(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    for weight in weights[:-1]:
        x = torch.relu(F.linear(x, weight))
    return F.linear(x, weights[-1])


class _BlockedMLP(torch.autograd.Function):
    """Bias-free ReLU network over blocks of points; equals `_plain_mlp` in value and gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        outputs = x.new_empty((x.shape[0], weights[-1].shape[0]))
        for begin in range(0, x.shape[0], BLOCK_POINTS):
            block = slice(begin, begin + BLOCK_POINTS)
            outputs[block] = _plain_mlp(x[block], weights)
        return outputs

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: keep the gradients differentiable
            wanted = [t for t, need in zip((x, *weights), ctx.needs_input_grad) if need]
            gradients = iter(
                torch.autograd.grad(_plain_mlp(x, tuple(weights)), wanted, grad, create_graph=True)
            )
            return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weights = [torch.zeros_like(weight) for weight in weights]
        for begin in range(0, x.shape[0], BLOCK_POINTS):
            block = slice(begin, begin + BLOCK_POINTS)
            out = None if grad_x is None else grad_x[block]
            _block_backward(x[block], weights, grad[block], grad_weights, out)
        return grad_x, *grad_weights


def _block_backward(
    x: Tensor,
    weights: list[Tensor],
    grad: Tensor,
    grad_weights: list[Tensor],
    grad_x: Tensor | None,
) -> None:
    """Adds one block's share to ``grad_weights``; writes its ``grad_x`` if there is one."""
    inputs = [x]
    for weight in weights[:-1]:
        inputs.append(F.linear(inputs[-1], weight).relu_())
    for layer in range(len(weights) - 1, 0, -1):
        grad_weights[layer].addmm_(grad.t(), inputs[layer])
        # The sign of the output of a ReLU tells where its input was positive.
        grad = torch.ops.aten.threshold_backward(grad @ weights[layer], inputs[layer], 0)
    grad_weights[0].addmm_(grad.t(), x)
    if grad_x is not None:
        torch.mm(grad, weights[0], out=grad_x)


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
