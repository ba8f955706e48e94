"""The compiled CPU back end: one C++17 file, built on first use, called through ctypes.

`encode` is differentiable twice: forward and first derivatives run in C++, derivatives of the first
derivatives are routed to the PyTorch twin. The number of threads is ``torch.get_num_threads()`` and
changes nothing in the results, bit for bit.
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
def _library(dtype: torch.dtype, n_input_dims: int, n_features: int) -> _Library:
    """Builds and loads one case; a failure is remembered as long as the process lives."""
    macros = {
        "GRID_REAL": _REALS[dtype],
        "GRID_DIMS": n_input_dims,
        "GRID_FEATURES": n_features,
    }
    try:
        handle = ctypes.CDLL(str(native_build.build(SOURCE, macros)))
    except (native_build.BuildError, OSError) as error:
        return _Library(reason=str(error))
    forward, backward = handle.hash_grid_forward, handle.hash_grid_backward
    forward.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64, ctypes.c_int32]
    backward.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64, ctypes.c_int32]
    return _Library(forward, backward)


def _library_for(layout: GridLayout, dtype: torch.dtype) -> _Library:
    return _library(dtype, layout.n_input_dims, layout.n_features_per_level)


def is_available(layout: GridLayout, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernel of this case is built and loaded; the first call builds it, in seconds."""
    return not unavailable_reason(layout, dtype)


def unavailable_reason(layout: GridLayout, dtype: torch.dtype = torch.float32) -> str:
    """Why `is_available` is false, as one sentence; empty where it is true."""
    return _library_for(layout, dtype).reason


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


def _call(name: str, layout: GridLayout, tensors: tuple[Tensor | None, ...], dtype) -> None:
    function = getattr(_library_for(layout, dtype), name)
    first = tensors[0]
    assert first is not None
    pointers = (None if each is None else each.data_ptr() for each in tensors)
    status = function(
        ctypes.addressof(_c_layout(layout)), *pointers, first.shape[0], torch.get_num_threads()
    )
    if status:
        raise RuntimeError(f"The compiled hash grid failed: {_STATUS.get(status, status)}.")


def _forward(x: Tensor, tables: Sequence[Tensor], layouts: tuple[GridLayout, ...]) -> Tensor:
    (params,), (layout,) = tables, layouts
    features = params.new_empty((x.shape[0], layout.n_output_dims))
    _call("forward", layout, (x, params, features), params.dtype)
    return features


def _backward(
    grad: Tensor,
    x: Tensor,
    tables: Sequence[Tensor],
    layouts: tuple[GridLayout, ...],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to positions and table; each is None unless needed."""
    (params,), (layout,) = tables, layouts
    grad_x = torch.empty_like(x) if needs[0] else None
    grad_params = torch.empty_like(params) if needs[1] else None
    if needs[0] or needs[1]:
        tensors = (x, params, grad.contiguous(), grad_x, grad_params)
        _call("backward", layout, tensors, params.dtype)
    return grad_x, grad_params


_differentiable = grid_autograd.differentiable(_forward, _backward)


def encode(x: Tensor, params: Tensor, layout: GridLayout) -> Tensor:
    """Same function as `torch_backend.encode`, for CPU tensors of fp32 or fp64.

    Raises:
        RuntimeError: the kernel reports a failure (memory).
    """
    return _differentiable(x.contiguous(), (params.contiguous(),), (layout,))
