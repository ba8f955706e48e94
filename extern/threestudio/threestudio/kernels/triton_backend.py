"""The Triton back end: GPU kernels that need no compiler on the user's machine.

One grid, or the sum of a 3D and a 4D grid in one pass over the points (`encode_sum`). Tables are
fp32, fp16 or bf16; sums are fp32, and gradients of tables are added up in fp32 before they take the
tables' type. GPU reductions have no order, so equal runs differ by rounding. Second derivatives are
the twin's, see `grid_autograd`.

Triton comes with PyTorch's CUDA builds for Linux. Without a GPU the kernels run, slowly, in
Triton's interpreter: set TRITON_INTERPRET=1 before the first use.
"""

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from threestudio.kernels import grid_autograd
from threestudio.kernels.grid_layout import GridLayout

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BLOCK = 128
"""Points of a program; 256 would need more than 128 registers a thread in 4D."""
MAX_ELEMENTS = 2**31
"""Offsets within tensors are 32-bit numbers."""


def is_interpreted() -> bool:
    """Whether Triton is asked to interpret kernels on the CPU instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why the back end cannot serve this case, as one sentence; empty where it can."""
    if dtype not in SUPPORTED_DTYPES:
        return f"the tables are {dtype}; Triton's kernels know fp32, fp16 and bf16."
    if not _is_installed():
        return "the package triton is not installed; PyTorch's CUDA builds for Linux bring it."
    if device.type != "cuda" and not is_interpreted():
        return f"the tensors are on {device}; Triton's kernels run on CUDA devices."
    return ""


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def encode(x: Tensor, params: Tensor, layout: GridLayout) -> Tensor:
    """Same function as `torch_backend.encode`; features are contiguous feature by feature.

    Raises:
        ValueError: a tensor would have 2^31 elements or more.
    """
    return _differentiable(x.contiguous(), (params.contiguous(),), (layout,))


def encode_sum(x: Tensor, tables: Sequence[Tensor], layouts: Sequence[GridLayout]) -> Tensor:
    """Sum of a 3D grid at x[:, :3] and a 4D grid at x, in one pass over the points.

    Raises:
        ValueError: a tensor would have 2^31 elements or more.
    """
    tables = tuple(table.contiguous() for table in tables)
    return _differentiable(x.contiguous(), tables, tuple(layouts))


@functools.lru_cache(maxsize=64)
def _level_tables(
    static: GridLayout | None, dynamic: GridLayout | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Scales, and the seven numbers of each level, on the device; made once."""
    some = static or dynamic
    rows = []
    for level in range(some.n_levels):
        row = [some.resolutions[level]]
        for layout in (static, dynamic):
            numbers = [1, 0, 0]
            if layout is not None:
                hashed = int(layout.is_hashed(level))
                numbers = [layout.entries[level], layout.offsets[level], hashed]
            row += numbers
        rows.append(row)
    scales = torch.tensor(some.scales, dtype=torch.float32, device=device)
    return scales, torch.tensor(rows, dtype=torch.int32, device=device)


def _by_role(values: Sequence, layouts: Sequence[GridLayout]) -> tuple:
    """Of values that belong to the layouts: (that of the static grid, that of the dynamic one).

    None where there is no such grid; a lone 4D grid is a dynamic one.
    """
    if len(layouts) == 2:
        return tuple(values)
    return (None, values[0]) if layouts[0].n_input_dims == 4 else (values[0], None)


def _present(tensors: Sequence[Tensor | None], other: Tensor) -> list[Tensor]:
    """A kernel takes a pointer in every place; where there is no tensor, it is never followed."""
    return [other if tensor is None else tensor for tensor in tensors]


def _check_sizes(x: Tensor, layouts: Sequence[GridLayout]) -> None:
    n_features = layouts[0].n_output_dims
    largest = max(len(x) * max(x.shape[1], n_features), *(each.n_params for each in layouts))
    if largest >= MAX_ELEMENTS:
        raise ValueError(
            f"{len(x)} points of {n_features} features and tables of "
            f"{max(each.n_params for each in layouts)} numbers need offsets of {largest}; Triton's "
            f"kernels count to {MAX_ELEMENTS - 1}. Encode fewer points at a time, or use a smaller "
            "log2_hashmap_size."
        )


@dataclass(frozen=True)
class _Call:
    """What every launch over some points and grids needs."""

    points: Tensor
    static: GridLayout | None
    dynamic: GridLayout | None

    @classmethod
    def of(cls, x: Tensor, layouts: Sequence[GridLayout]) -> "_Call":
        return cls(x, *_by_role(layouts, layouts))

    @property
    def layout(self) -> GridLayout:
        layout = self.static or self.dynamic
        assert layout is not None
        return layout

    def launch(self, kernel: str, tensors: tuple, by_level: bool, **flags: bool) -> None:
        """Run a kernel: over blocks of points and levels, or over blocks alone."""
        from threestudio.kernels import triton_kernels

        x, layout = self.points, self.layout
        # The interpreter takes as long for a program of many points as for one of few.
        block = max(16, 1 << (len(x) - 1).bit_length()) if is_interpreted() else BLOCK
        numbers = (len(x),) if by_level else (len(x), layout.n_levels)
        constants = {
            "N_AXES": x.shape[1],
            "D": min(x.shape[1], 3),
            "STATIC": self.static is not None,
            "DYNAMIC": self.dynamic is not None,
            "F": layout.n_features_per_level,
            "BLOCK": block,
        }
        places = _level_tables(self.static, self.dynamic, x.device)
        grid = (-(-len(x) // block), layout.n_levels if by_level else 1)
        with torch.cuda.device_of(x):
            run = getattr(triton_kernels, kernel)[grid]
            run(x, *tensors, *places, *numbers, **(constants | flags))


def _forward(x: Tensor, tables: Sequence[Tensor], layouts: grid_autograd.Layouts) -> Tensor:
    _check_sizes(x, layouts)
    features = tables[0].new_empty((layouts[0].n_output_dims, len(x)))
    if len(x):
        tensors = (*_present(_by_role(tables, layouts), features), features)
        _Call.of(x, layouts).launch("forward_kernel", tensors, by_level=True)
    return features.t()


def _backward(
    grad: Tensor,
    x: Tensor,
    tables: Sequence[Tensor],
    layouts: grid_autograd.Layouts,
    needs: tuple[bool, ...],
) -> grid_autograd.Gradients:
    """Gradients of positions and tables; each is None unless needed."""
    call, n_points = _Call.of(x, layouts), len(x)
    x_grad = torch.zeros_like(x) if needs[0] else None
    sums = [
        torch.zeros_like(table, dtype=torch.float32) if need else None
        for table, need in zip(tables, needs[1:], strict=True)
    ]
    if n_points and any(needs[1:]):
        static, dynamic = _by_role(sums, layouts)
        wanted = {"STATIC": static is not None, "DYNAMIC": dynamic is not None}
        tensors = (grad, *grad.stride(), *_present((static, dynamic), grad))
        call.launch("table_gradient_kernel", tensors, by_level=True, **wanted)
    if n_points and x_grad is not None:
        tensors = (grad, *grad.stride(), *_present(_by_role(tables, layouts), grad), x_grad)
        call.launch("point_gradient_kernel", tensors, by_level=False)
    gradients = [
        None if total is None else total.to(table.dtype)
        for total, table in zip(sums, tables, strict=True)
    ]
    return x_grad, *gradients


_differentiable = grid_autograd.differentiable(_forward, _backward)
