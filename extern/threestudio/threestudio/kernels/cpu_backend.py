"""The compiled CPU back end: one C++17 file, built on first use, called through ctypes.

`encode` and `encode_sum` are differentiable twice: forward and first derivatives run in C++,
derivatives of the first derivatives are routed to the PyTorch twin. The number of threads is
``torch.get_num_threads()`` and changes nothing in the results, bit for bit.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from threestudio.kernels import grid_autograd, native_build
from threestudio.kernels.grid_layout import GridLayout

SOURCE = Path(__file__).parent / "csrc" / "hash_grid.cpp"
SUPPORTED_DTYPES = (torch.float32, torch.float64)

_REALS = {torch.float32: "float", torch.float64: "double"}
_STATUS = {1: "the system has no memory left", 2: "the library is of another case"}


class _CLayout(ctypes.Structure):
    """Mirror of ``struct GridLayout`` in csrc/hash_grid.cpp."""

    _fields_ = (
        ("n_input_dims", ctypes.c_int32),
        ("n_features", ctypes.c_int32),
        ("n_levels", ctypes.c_int32),
        ("scales", ctypes.POINTER(ctypes.c_double)),
        ("resolutions", ctypes.POINTER(ctypes.c_uint32)),
        ("entries", ctypes.POINTER(ctypes.c_uint32)),
        ("offsets", ctypes.POINTER(ctypes.c_uint64)),
    )


@dataclass(frozen=True)
class _Library:
    """A loaded library, or the reason why there is none."""

    forward: Callable[..., int] | None = None
    backward: Callable[..., int] | None = None
    reason: str = ""


@functools.cache
def _library(dtype: torch.dtype, n_input_dims: int, n_features: int, sums: bool) -> _Library:
    """Builds and loads one case; a failure is remembered as long as the process lives."""
    macros = {
        "GRID_REAL": _REALS[dtype],
        "GRID_DIMS": n_input_dims,
        "GRID_FEATURES": n_features,
        "GRID_SUM": int(sums),
    }
    try:
        handle = ctypes.CDLL(str(native_build.build(SOURCE, macros)))
    except (native_build.BuildError, OSError) as error:
        return _Library(reason=str(error))
    forward, backward = handle.hash_grid_forward, handle.hash_grid_backward
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    forward.argtypes = [pointer, number, *[pointer] * 3, size, number]
    backward.argtypes = [pointer, number, *[pointer] * 5, size, number]
    return _Library(forward, backward)


def _library_for(layouts: tuple[GridLayout, ...], dtype: torch.dtype) -> _Library:
    last = layouts[-1]
    return _library(dtype, last.n_input_dims, last.n_features_per_level, len(layouts) > 1)


def is_available(layout: GridLayout, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel of this case is built and loaded; the first call builds it, in seconds."""
    return not unavailable_reason(layout, dtype)


def unavailable_reason(layout: GridLayout, dtype: torch.dtype = torch.float32) -> str:
    """Why `is_available` is false, as one sentence; empty where it is true."""
    return _library_for((layout,), dtype).reason


def has_sum(layouts: Sequence[GridLayout], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel of `encode_sum` is built and loaded for a 3D and a 4D grid."""
    return not _library_for(tuple(layouts), dtype).reason


@functools.lru_cache(maxsize=64)
def _c_layout(layout: GridLayout) -> _CLayout:
    n_levels = layout.n_levels
    return _CLayout(
        layout.n_input_dims,
        layout.n_features_per_level,
        n_levels,
        (ctypes.c_double * n_levels)(*layout.scales),
        (ctypes.c_uint32 * n_levels)(*layout.resolutions),
        (ctypes.c_uint32 * n_levels)(*layout.entries),
        (ctypes.c_uint64 * n_levels)(*layout.offsets[:-1]),
    )


def _addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (ctypes.c_void_p * len(tensors))(
        *(None if each is None else each.data_ptr() for each in tensors)
    )


def _layouts_at(layouts: tuple[GridLayout, ...]) -> ctypes.Array:
    return (ctypes.c_void_p * len(layouts))(
        *(ctypes.addressof(_c_layout(layout)) for layout in layouts)
    )


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"The compiled hash grid failed: {_STATUS.get(status, status)}.")


def _forward(x: Tensor, tables: Sequence[Tensor], layouts: tuple[GridLayout, ...]) -> Tensor:
    library = _library_for(layouts, tables[0].dtype)
    features = tables[0].new_empty((x.shape[0], layouts[0].n_output_dims))
    _check(
        library.forward(
            _layouts_at(layouts), len(layouts), x.data_ptr(), _addresses(tables),
            features.data_ptr(), x.shape[0], torch.get_num_threads(),
        )
    )  # fmt: skip
    return features


def _backward(
    grad: Tensor,
    x: Tensor,
    tables: Sequence[Tensor],
    layouts: tuple[GridLayout, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients to positions and tables; each is None unless needed."""
    library = _library_for(layouts, tables[0].dtype)
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_tables = [
        torch.empty_like(table) if need else None
        for table, need in zip(tables, needs[1:], strict=True)
    ]
    if any(needs):
        grad = grad.contiguous()
        _check(
            library.backward(
                _layouts_at(layouts), len(layouts), x.data_ptr(), _addresses(tables),
                grad.data_ptr(), None if grad_x is None else grad_x.data_ptr(),
                _addresses(grad_tables), x.shape[0], torch.get_num_threads(),
            )
        )  # fmt: skip
    return grad_x, *grad_tables


_differentiable = grid_autograd.differentiable(_forward, _backward)


def encode(x: Tensor, params: Tensor, layout: GridLayout) -> Tensor:
    """Same function as `torch_backend.encode`, for CPU tensors of fp32 or fp64.

    Raises:
        RuntimeError: the kernel reports a failure (memory).
    """
    return _differentiable(x.contiguous(), (params.contiguous(),), (layout,))


def encode_sum(x: Tensor, tables: Sequence[Tensor], layouts: Sequence[GridLayout]) -> Tensor:
    """Sum of a 3D grid at x[:, :3] and a 4D grid at x, without memory for either's features.

    Raises:
        RuntimeError: the kernel reports a failure (memory).
    """
    tables = tuple(table.contiguous() for table in tables)
    return _differentiable(x.contiguous(), tables, tuple(layouts))
