"""The contract of the multiresolution hash grid and the choice of back end.

Every back end computes the same function of (positions, flat table, layout); they differ in speed
and in rounding only (about 3e-6 relative in fp32, because some contract multiply and add). The twin
in `torch_backend` defines the semantics.

    back end     devices      dtypes          second derivatives
    torch        any          any floating    yes
    cpu          CPU          fp32, fp64      yes, through the twin
    triton       CUDA         fp32 to bf16    yes, through the twin
    tinycudann   CUDA         fp32            as the installed package offers

Dimension names: n points, d input dimensions, p parameters, f = levels x features per level.
"""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threestudio.kernels import cpu_backend, torch_backend, triton_backend
from threestudio.kernels.grid_layout import GridLayout, can_sum
from threestudio.stand_ins.finder import is_installed

BACKENDS = ("auto", "torch", "cpu", "triton", "tinycudann")

# tiny-cuda-nn's initial range and default seed.
INIT_RANGE = 1e-4
INIT_SEED = 1337

Encode = Callable[[Tensor, Tensor, GridLayout], Tensor]

# Warnings already given in this process; each is about the machine, so once is enough.
_warned: set[str] = set()


def hash_grid_encode(
    x: Float[Tensor, "n d"],
    params: Float[Tensor, "p"],
    layout: GridLayout,
    backend: str = "auto",
) -> Float[Tensor, "n f"]:
    """Encodes positions with a multiresolution grid: Instant-NGP, equations 1 to 4.

    Args:
        x: positions, nominally in [0, 1]; any strides, n may be 0.
        params: flat table, level then entry then feature, of ``layout.n_params`` numbers.
        backend: one of `BACKENDS`. "auto" takes, on the CPU, the compiled kernel, else the twin
            with one warning; on CUDA Triton, else an installed tinycudann, else the twin with one
            warning. Any other choice is kept or refused, never replaced.

    Returns:
        Features ordered by level, in the dtype of ``params``; differentiable with respect to ``x``
        and ``params``.

    Raises:
        ValueError: wrong shapes, different devices, unknown back end, or one that does not serve
            this device or dtype.
        RuntimeError: the forced back end cannot be built or found on this machine; names the cause.
    """
    _check_arguments(x, params, layout)
    if x.dtype != params.dtype:
        # Positions need the precision: a 16-bit coordinate cannot name a cell of a fine level.
        x = x.to(torch.promote_types(params.dtype, torch.float32))
    return _select(backend, params, layout)(x, params, layout)


def hash_grid_encode_sum(
    x_time: Float[Tensor, "n 4"],
    static_params: Float[Tensor, "p"],
    dynamic_params: Float[Tensor, "q"],
    static_layout: GridLayout,
    dynamic_layout: GridLayout,
    backend: str = "auto",
) -> Float[Tensor, "n f"]:
    """Sum of a 3D grid at points and a 4D grid at points and times: 4D-fy, section 3.1.

    ``x_time`` are points with their times appended; the 3D grid reads the first three columns.
    The CPU kernel and Triton's compute both at once where the grids have the same scales; every
    other back end encodes twice and adds. Arguments, differentiability and errors otherwise as
    those of `hash_grid_encode`.
    """
    x = x_time[:, :3]
    _check_arguments(x, static_params, static_layout)
    _check_arguments(x_time, dynamic_params, dynamic_layout)
    tables, layouts = (static_params, dynamic_params), (static_layout, dynamic_layout)
    if can_sum(*layouts) and static_params.dtype == dynamic_params.dtype:
        chosen = {
            _select(backend, params, layout) for params, layout in zip(tables, layouts, strict=True)
        }
        if chosen == {triton_backend.encode}:
            return triton_backend.encode_sum(x_time.float(), tables, layouts)
        if chosen == {cpu_backend.encode} and cpu_backend.has_sum(layouts, static_params.dtype):
            return cpu_backend.encode_sum(x_time.to(static_params.dtype), tables, layouts)
    static = hash_grid_encode(x, static_params, static_layout, backend)
    return static + hash_grid_encode(x_time, dynamic_params, dynamic_layout, backend)


def available_backends(layout: GridLayout, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of the back ends that can be forced on this machine for this case."""
    return [name for name in BACKENDS[1:] if _why_not(name, layout, device, dtype) is None]


def _check_arguments(x: Tensor, params: Tensor, layout: GridLayout) -> None:
    if x.dim() != 2 or x.shape[1] != layout.n_input_dims:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; expected (n, {layout.n_input_dims}). "
            "Flatten leading dimensions first."
        )
    if not x.is_floating_point():
        raise ValueError(f"x has dtype {x.dtype}; expected floating positions in [0, 1].")
    if params.dim() != 1 or params.shape[0] != layout.n_params:
        raise ValueError(
            f"params has shape {tuple(params.shape)}; this layout needs ({layout.n_params},)."
        )
    if x.device != params.device:
        raise ValueError(
            f"x is on {x.device} but params is on {params.device}; move both to one device."
        )


def _select(backend: str, params: Tensor, layout: GridLayout) -> Encode:
    device, dtype = params.device, params.dtype
    if backend != "auto":
        refusal = _why_not(backend, layout, device, dtype)
        if refusal is not None:
            raise refusal
        return _ENCODERS[backend]
    if device.type == "cpu" and dtype in cpu_backend.SUPPORTED_DTYPES:
        reason = cpu_backend.unavailable_reason(layout, dtype)
        if not reason:
            return cpu_backend.encode
        _warn_once(
            f"The compiled CPU hash grid is not available: {reason} "
            "Using the PyTorch twin, which is 12 to 14 times slower. To remedy this, install a "
            "C++17 compiler (for example: apt install g++) and start again."
        )
    elif device.type == "cuda":
        reason = triton_backend.unavailable_reason(device, dtype)
        if not reason:
            return triton_backend.encode
        if dtype == torch.float32 and _tinycudann_is_installed():
            return _encode_tinycudann
        _warn_once(
            f"No compiled CUDA hash grid is available: {reason} Using the PyTorch twin, which is "
            "several times slower and holds every corner's value for the backward pass. "
            "To remedy this, install triton or tinycudann."
        )
    return torch_backend.encode


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _why_not(
    backend: str, layout: GridLayout, device: torch.device, dtype: torch.dtype
) -> Exception | None:
    """The error that forcing ``backend`` raises, or None where it can serve."""
    if backend not in _ENCODERS:
        return ValueError(f"Unknown hash grid back end {backend!r}; expected one of {BACKENDS}.")
    if backend in _REQUIREMENTS:
        needed, dtypes = _REQUIREMENTS[backend]
        if device.type != needed or dtype not in dtypes:
            names = " or ".join(str(each) for each in dtypes)
            return ValueError(
                f"Hash grid back end {backend!r} serves {needed} tensors of {names}; got {dtype} "
                f"on {device}. Use backend='auto', or move the encoding."
            )
    if backend == "triton":
        reason = triton_backend.unavailable_reason(device, dtype)
        if reason:
            return RuntimeError(
                f"Hash grid back end 'triton' was asked for but cannot run: {reason} "
                "Use backend='auto', or move the encoding."
            )
    if backend == "cpu" and not cpu_backend.is_available(layout, dtype):
        reason = cpu_backend.unavailable_reason(layout, dtype)
        return RuntimeError(f"Hash grid back end 'cpu' was asked for but cannot run: {reason}")
    if backend == "tinycudann" and not _tinycudann_is_installed():
        return RuntimeError(
            "Hash grid back end 'tinycudann' was asked for but the package is not installed. "
            "Install it from its repository, or use backend='auto'."
        )
    return None


@functools.cache
def _tinycudann_is_installed() -> bool:
    return is_installed("tinycudann")


# tiny-cuda-nn modules by layout. They hold no weights of ours: `functional_call` lends them.
_tinycudann_modules: dict[GridLayout, nn.Module] = {}


def _encode_tinycudann(x: Tensor, params: Tensor, layout: GridLayout) -> Tensor:
    module = _tinycudann_modules.get(layout)
    if module is None:
        import tinycudann

        module = tinycudann.Encoding(layout.n_input_dims, layout.to_config(), dtype=torch.float32)
        _tinycudann_modules[layout] = module
    return torch.func.functional_call(module, {"params": params}, (x,)).float()


_ENCODERS: dict[str, Encode] = {
    "torch": torch_backend.encode,
    "cpu": cpu_backend.encode,
    "triton": triton_backend.encode,
    "tinycudann": _encode_tinycudann,
}

_REQUIREMENTS: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "cpu": ("cpu", cpu_backend.SUPPORTED_DTYPES),
    "tinycudann": ("cuda", (torch.float32,)),
}


class HashGridEncoding(nn.Module):
    """A trainable multiresolution grid whose ``params`` are laid out as tiny-cuda-nn's.

    Args:
        n_input_dims: 2, 3 or 4.
        config: tiny-cuda-nn style grid config, see `GridLayout.from_config`; not changed.
        backend: see `hash_grid_encode`. An unknown name is refused here, an unavailable one at the
            first call, when the device is known.
        dtype: of ``params`` and of the features.
        seed: of the CPU generator that draws ``params`` from U(-1e-4, 1e-4).
    """

    def __init__(
        self,
        n_input_dims: int,
        config: Mapping[str, Any],
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        seed: int = INIT_SEED,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"Unknown hash grid back end {backend!r}; expected one of {BACKENDS}.")
        self.layout = GridLayout.from_config(n_input_dims, config)
        self.backend = backend
        self.n_input_dims = n_input_dims
        self.n_output_dims = self.layout.n_output_dims
        generator = torch.Generator().manual_seed(seed)
        values = torch.empty(self.layout.n_params, dtype=dtype)
        self.params = nn.Parameter(values.uniform_(-INIT_RANGE, INIT_RANGE, generator=generator))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Encodes positions in [0, 1]; autocast does not reach the table."""
        return hash_grid_encode(x, self.params, self.layout, self.backend)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"{layout.n_input_dims}D, levels={layout.n_levels}, "
            f"features={layout.n_features_per_level}, "
            f"resolutions={layout.resolutions[0]}..{layout.resolutions[-1]}, "
            f"params={layout.n_params}, backend={self.backend!r}"
        )
