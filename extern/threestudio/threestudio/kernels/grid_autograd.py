"""How a kernel pair, forward and first derivatives, becomes a function that autograd knows.

A function sums the features of one or more grids: each grid reads as many of a point's leading
coordinates as its layout has dimensions. The derivatives of the first derivatives, which analytic
normals need, are those of the PyTorch twin: exact, at the twin's speed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from threestudio.kernels import torch_backend
from threestudio.kernels.grid_layout import GridLayout

Layouts = tuple[GridLayout, ...]
Forward = Callable[[Tensor, Sequence[Tensor], Layouts], Tensor]
Gradients = tuple[Tensor | None, ...]
Backward = Callable[[Tensor, Tensor, Sequence[Tensor], Layouts, tuple[bool, ...]], Gradients]


def differentiable(forward: Forward, backward: Backward):
    """The function of (x, tables, layouts) that computes `forward`, differentiable twice.

    Args:
        forward: (x, tables, layouts) -> features.
        backward: (gradient of the features, x, tables, layouts, which gradients are needed) ->
            gradients of (x, *tables), None where one is not needed.
    """

    def encode(x: Tensor, tables: Sequence[Tensor], layouts: Layouts) -> Tensor:
        return _Encode.apply(layouts, forward, backward, x, *tables)

    return encode


def sum_of_twins(x: Tensor, tables: Sequence[Tensor], layouts: Layouts) -> Tensor:
    """What every such function computes, by the PyTorch twin."""
    parts = [
        torch_backend.encode(x[:, : layout.n_input_dims], table, layout)
        for table, layout in zip(tables, layouts, strict=True)
    ]
    return sum(parts[1:], parts[0])


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layouts: Layouts, forward, backward, x: Tensor, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(x, *tables)
        ctx.layouts, ctx.gradients_of = layouts, backward
        return forward(x, tables, layouts)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, *tables = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled():  # create_graph=True: keep the gradients differentiable
            gradients = _EncodeGradient.apply(
                ctx.layouts, needs, ctx.gradients_of, grad, x, *tables
            )
        else:
            gradients = ctx.gradients_of(grad, x, tables, ctx.layouts, needs)
        return None, None, None, *gradients


class _EncodeGradient(torch.autograd.Function):
    """First derivatives by the kernel; their own derivatives by the twin."""

    @staticmethod
    def forward(ctx, layouts: Layouts, needs, backward, grad: Tensor, x: Tensor, *tables: Tensor):
        ctx.save_for_backward(grad, x, *tables)
        ctx.layouts = layouts
        ctx.set_materialize_grads(False)
        return backward(grad, x, tables, layouts, needs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *cotangents: Tensor | None):
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
            grad, x, *tables = inputs
            features = sum_of_twins(x, tables, ctx.layouts)
            firsts = torch.autograd.grad(features, (x, *tables), grad, create_graph=True)
        used = [
            (first, cotangent)
            for first, cotangent in zip(firsts, cotangents, strict=True)
            if cotangent is not None
        ]
        needed = ctx.needs_input_grad[3:]
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        if not used or not wanted:
            return (None,) * len(ctx.needs_input_grad)
        outputs, weights = zip(*used, strict=True)
        seconds = iter(torch.autograd.grad(outputs, wanted, weights, allow_unused=True))
        return None, None, None, *(next(seconds) if need else None for need in needed)
