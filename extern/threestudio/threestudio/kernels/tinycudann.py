"""What `import tinycudann` finds where the real package is not installed: its modules, on torch.

An extension written for tiny-cuda-nn's PyTorch binding gets the same classes, arguments, attributes
and parameter layout, so its checkpoints fit. What differs:

    numbers     fp32 throughout, which is the faster precision on a CPU; an encoding that asks for
                `torch.float16` rounds its features to it
    start       drawn from ``seed`` by torch, not by tiny-cuda-nn's generator: the same ranges,
                other values
    speed       grids run on our kernels, networks as plain matrix products

Layouts. A network's weights are row-major matrices [out, in] in one vector, first layer first. Its
input width is rounded up to a multiple of 16, its output width likewise: the matrices of a network
of 3 inputs, 64 neurons, one hidden layer and 4 outputs are [64, 16] and [16, 64]. Padded inputs are
ones behind most encodings, which makes them a bias, and zeros behind a grid; padded outputs are cut
off. A network with an encoding holds the network's weights first.

Dimension names: n points, d input dimensions, f output features.
"""

import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from threestudio.kernels.grid_layout import GridLayout
from threestudio.kernels.hash_grid import INIT_RANGE, INIT_SEED, hash_grid_encode
from threestudio.suggest import nearest

__all__ = ["Encoding", "Network", "NetworkWithInputEncoding", "free_temporary_memory"]
# Names of the real package that it alone has; see `threestudio.stand_ins.finder`.
ABSENT = ("supports_jit_fusion", "rtc_cache_dir", "set_rtc_cache_dir", "LogSeverity")

ALIGNMENT = 16
"""Widths of a network's matrices are multiples of this."""
# tiny-cuda-nn computes softplus and squareplus at ten times the argument, and divides by ten.
_SHARPNESS = 10.0
_FUSED_WIDTHS = (16, 32, 64, 128, 256)


def free_temporary_memory() -> None:
    """Collects Python's garbage; there is no other temporary memory here."""
    gc.collect()


class _Part:
    """A function of (points, a flat vector of ``n_params`` numbers); base of all below.

    Attributes: n_inputs, n_outputs; padding: the value of the columns that widen its output.
    """

    n_params = 0
    padding = 1.0

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        self.n_inputs, self.n_outputs = n_inputs, n_outputs

    def initial(self, generator: torch.Generator) -> Float[Tensor, "p"]:
        return torch.empty(0)

    def __call__(self, x: Float[Tensor, "n d"], params: Float[Tensor, "p"]) -> Tensor:
        raise NotImplementedError


class _Grid(_Part):
    padding = 0.0

    def __init__(self, n_inputs: int, config: Mapping[str, Any]) -> None:
        layout = {key: value for key, value in config.items() if key not in _OF_A_COMPOSITE}
        self.layout = GridLayout.from_config(n_inputs, layout)
        self.n_params = self.layout.n_params
        super().__init__(n_inputs, self.layout.n_output_dims)

    def initial(self, generator: torch.Generator) -> Tensor:
        values = torch.empty(self.n_params)
        return values.uniform_(-INIT_RANGE, INIT_RANGE, generator=generator)

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        return hash_grid_encode(x, params, self.layout)


class _Identity(_Part):
    def __init__(self, n_inputs: int, config: Mapping[str, Any]) -> None:
        super().__init__(n_inputs, n_inputs)
        self.scale, self.offset = float(config.get("scale", 1.0)), float(config.get("offset", 0.0))

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        return x * self.scale + self.offset


class _Frequency(_Part):
    """sin and cos of 2^k pi x, by input dimension, then frequency k, then sine before cosine."""

    def __init__(self, n_inputs: int, config: Mapping[str, Any]) -> None:
        self.n_frequencies = int(config.get("n_frequencies", 12))
        super().__init__(n_inputs, n_inputs * self.n_frequencies * 2)

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        octaves = 2.0 ** torch.arange(self.n_frequencies, device=x.device, dtype=x.dtype)
        phases = x[:, :, None] * octaves * math.pi
        return torch.stack((phases.sin(), phases.cos()), dim=-1).flatten(1)


class _SphericalHarmonics(_Part):
    def __init__(self, n_inputs: int, config: Mapping[str, Any]) -> None:
        # The encodings lie above this layer and know it.
        from threestudio.models.encodings import SphericalHarmonics

        self.harmonics = SphericalHarmonics(n_inputs, config)
        super().__init__(n_inputs, self.harmonics.n_output_dims)

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        return self.harmonics(x)


class _Composite(_Part):
    """Encodings of slices of the input, side by side, added up or multiplied."""

    def __init__(self, n_inputs: int, config: Mapping[str, Any]) -> None:
        nested = config.get("nested")
        if not isinstance(nested, (list, tuple)) or not nested:
            raise ValueError(
                f"nested of a Composite encoding is {nested!r}; expected a list of encodings."
            )
        self.reduction = str(config.get("reduction", "Concatenation")).lower()
        self.parts: list[tuple[int, _Part]] = []
        for begin, size, sub_config in _slices(n_inputs, nested):
            self.parts.append((begin, make_encoding(size, sub_config)))
        widths = [part.n_outputs for _, part in self.parts]
        if self.reduction not in ("concatenation", "sum", "product"):
            raise ValueError(
                f"reduction of a Composite encoding is {config['reduction']!r}; expected "
                "Concatenation, Sum or Product."
            )
        if self.reduction != "concatenation" and len(set(widths)) > 1:
            raise ValueError(
                f"a Composite encoding with reduction {config['reduction']} nests encodings of "
                f"{widths} features; expected equal numbers."
            )
        joined = self.reduction == "concatenation"
        super().__init__(n_inputs, sum(widths) if joined else widths[0])
        self.n_params = sum(part.n_params for _, part in self.parts)
        self.padding = self.parts[-1][1].padding

    def initial(self, generator: torch.Generator) -> Tensor:
        return torch.cat([part.initial(generator) for _, part in self.parts])

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        features, used = [], 0
        for begin, part in self.parts:
            own = params[used : used + part.n_params]
            features.append(part(x[:, begin : begin + part.n_inputs], own))
            used += part.n_params
        if self.reduction == "concatenation":
            return torch.cat(features, dim=1)
        stacked = torch.stack(features)
        return stacked.sum(0) if self.reduction == "sum" else stacked.prod(0)


_OF_A_COMPOSITE = ("n_dims_to_encode", "dims_to_encode_begin")


def _slices(n_inputs: int, nested: Any) -> list[tuple[int, int, Mapping[str, Any]]]:
    """Return (first dimension, number, config) of each nested encoding that has dimensions."""
    named = [int(config.get("n_dims_to_encode", 0)) for config in nested]
    placed = any("dims_to_encode_begin" in config for config in nested)
    rest = [i for i, config in enumerate(nested) if "n_dims_to_encode" not in config]
    left = n_inputs - sum(named)
    if len(rest) > (0 if placed else 1) or (left < 0 and not placed):
        raise ValueError(
            f"the nested encodings of a Composite take {named} of {n_inputs} dimensions; expected "
            "no more than there are, and at most one without n_dims_to_encode, which takes the "
            "rest."
        )
    slices, begin = [], 0
    for index, config in enumerate(nested):
        begin = int(config.get("dims_to_encode_begin", begin))
        size = left if index in rest else named[index]
        if begin + size > n_inputs:
            raise ValueError(
                f"a nested encoding takes dimensions {begin} to {begin + size} of {n_inputs}."
            )
        if size > 0:
            slices.append((begin, size, config))
        begin += size
    return slices


_ENCODINGS: dict[str, Callable[[int, Mapping[str, Any]], _Part]] = {
    "HashGrid": _Grid,
    "DenseGrid": _Grid,
    "Grid": _Grid,
    "SphericalHarmonics": _SphericalHarmonics,
    "Frequency": _Frequency,
    "Identity": _Identity,
    "Composite": _Composite,
}


def make_encoding(n_inputs: int, config: Mapping[str, Any]) -> _Part:
    """Build an encoding by its ``otype``, in any case of letters.

    Raises:
        ValueError: an ``otype`` that only the real package has, or none.
    """
    otype = _known_otype("encoding", config, tuple(_ENCODINGS))
    return _ENCODINGS[otype](n_inputs, {**config, "otype": otype})


class _Mlp(_Part):
    """Bias-free layers of one width, tiny-cuda-nn's FullyFusedMLP and CutlassMLP alike."""

    def __init__(self, n_inputs: int, n_outputs: int, config: Mapping[str, Any]) -> None:
        super().__init__(n_inputs, n_outputs)
        otype = _known_otype("network", config, _NETWORKS)
        width, depth = int(config.get("n_neurons", 128)), int(config.get("n_hidden_layers", 5))
        fused = otype in ("FullyFusedMLP", "MegakernelMLP")
        if fused and width not in _FUSED_WIDTHS:
            raise ValueError(
                f"n_neurons of a {otype} is {width}; expected one of {_FUSED_WIDTHS}. Other widths "
                "are for otype CutlassMLP."
            )
        if depth < int(fused):
            raise ValueError(f"n_hidden_layers of a {otype} is {depth}; expected at least 1.")
        padded = (_aligned(n_inputs), *[width] * depth, _aligned(n_outputs))
        self.shapes = list(zip(padded[1:], padded[:-1]))
        self.n_params = sum(rows * columns for rows, columns in self.shapes)
        self.activation = _activation(config.get("activation", "ReLU"))
        self.output_activation = _activation(config.get("output_activation", "None"))

    def initial(self, generator: torch.Generator) -> Tensor:
        """Glorot's uniform range of each padded matrix."""
        pieces = []
        for rows, columns in self.shapes:
            bound = math.sqrt(6 / (rows + columns))
            weights = torch.empty(rows * columns)
            pieces.append(weights.uniform_(-bound, bound, generator=generator))
        return torch.cat(pieces)

    def __call__(self, x: Tensor, params: Tensor) -> Tensor:
        used = 0
        for index, (rows, columns) in enumerate(self.shapes):
            weight = params[used : used + rows * columns].view(rows, columns)
            used += rows * columns
            x = F.linear(x, weight)
            last = index == len(self.shapes) - 1
            x = _ACTIVATIONS[self.output_activation if last else self.activation](x)
        return x[:, : self.n_outputs]


_NETWORKS = ("FullyFusedMLP", "MegakernelMLP", "CutlassMLP", "MLP")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "leakyrelu": lambda x: F.leaky_relu(x, 0.01),
    "exponential": torch.exp,
    "sine": torch.sin,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "squareplus": lambda x: 0.5 * (x + torch.sqrt(x * x + 4 / _SHARPNESS**2)),
    "softplus": lambda x: F.softplus(x, beta=_SHARPNESS),
}


def _activation(name: Any) -> str:
    if str(name).lower() not in _ACTIVATIONS:
        raise ValueError(
            f"activation of a network is {name!r}; expected one of {', '.join(_ACTIVATIONS)}."
        )
    return str(name).lower()


def _aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


def _known_otype(what: str, config: Mapping[str, Any], known: tuple[str, ...]) -> str:
    given = str(config.get("otype", {"encoding": "OneBlob", "network": "MLP"}[what]))
    for name in known:
        if name.lower() == given.lower():
            return name
    close = ", ".join(nearest(given, known))
    raise ValueError(
        f"the {what} {given!r} of tinycudann needs the real package and a GPU; without them there "
        f"are {', '.join(known)}, of which the nearest are {close}."
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)
    return dict(config)


class _Module(nn.Module):
    """Base of the binding's three modules.

    Attributes:
        n_input_dims, n_output_dims: widths of input and output, padding not counted.
        params: all weights, one flat fp32 vector; empty where there is nothing to learn.
        seed: of the start values.
        dtype: of the output.
        loss_scale: 1, since nothing here underflows.
    """

    loss_scale = 1.0

    def _set_up(self, parts: tuple[_Part, ...], seed: int, dtype: torch.dtype) -> None:
        self.seed, self.dtype = seed, dtype
        self._parts = parts
        generator = torch.Generator().manual_seed(seed)
        self.params = nn.Parameter(torch.cat([part.initial(generator) for part in parts]))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Evaluates in fp32, autocast or not.

        Raises:
            ValueError: ``x`` has another shape than [n, n_input_dims].
        """
        if x.dim() != 2 or x.shape[1] != self.n_input_dims:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; expected (n, {self.n_input_dims}). "
                "Flatten leading dimensions first."
            )
        with torch.autocast(x.device.type, enabled=False):
            return self._evaluate(x.float()).to(self.dtype)

    def _evaluate(self, x: Tensor) -> Tensor:
        return self._parts[0](x, self.params)

    def extra_repr(self) -> str:
        return (
            f"n_input_dims={self.n_input_dims}, n_output_dims={self.n_output_dims}, "
            f"seed={self.seed}, dtype={self.dtype}, params={self.params.numel()}"
        )


class Encoding(_Module):
    """An encoding of positions, nominally in [0, 1].

    Args:
        n_input_dims: dimensions of the input.
        encoding_config: ``otype`` and its keys; see `make_encoding`. Not changed.
        seed: of the start values.
        dtype: of the features, fp32 or fp16; None takes fp32.

    Raises:
        ValueError: another dtype, or a config that cannot be built.
    """

    def __init__(
        self,
        n_input_dims: int,
        encoding_config: Mapping[str, Any],
        seed: int = INIT_SEED,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (None, torch.float32, torch.float16):
            raise ValueError(f"dtype is {dtype}; expected torch.float32 or torch.float16.")
        self.n_input_dims, self.encoding_config = n_input_dims, encoding_config
        part = make_encoding(n_input_dims, _plain(encoding_config))
        self.n_output_dims = part.n_outputs
        self._set_up((part,), seed, dtype or torch.float32)


class NetworkWithInputEncoding(_Module):
    """A network behind an encoding, with the weights of both in one vector.

    Args:
        n_input_dims: dimensions of the input.
        n_output_dims: outputs of the network.
        encoding_config: see `make_encoding`.
        network_config: ``otype`` FullyFusedMLP or CutlassMLP, ``n_neurons``, ``n_hidden_layers``,
            ``activation``, ``output_activation``. Not changed.
        seed: of the start values.

    Raises:
        ValueError: a config that cannot be built.
    """

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        encoding_config: Mapping[str, Any],
        network_config: Mapping[str, Any],
        seed: int = INIT_SEED,
    ) -> None:
        super().__init__()
        self.n_input_dims, self.n_output_dims = n_input_dims, n_output_dims
        self.encoding_config, self.network_config = encoding_config, network_config
        encoding = make_encoding(n_input_dims, _plain(encoding_config))
        network = _Mlp(encoding.n_outputs, n_output_dims, _plain(network_config))
        self._set_up((network, encoding), seed, torch.float32)

    def _evaluate(self, x: Tensor) -> Tensor:
        network, encoding = self._parts
        features = encoding(x, self.params[network.n_params :])
        missing = network.shapes[0][1] - features.shape[1]
        features = F.pad(features, (0, missing), value=encoding.padding)
        return network(features, self.params[: network.n_params])


class Network(NetworkWithInputEncoding):
    """A network alone, which is one behind the identity; arguments as above."""

    def __init__(
        self,
        n_input_dims: int,
        n_output_dims: int,
        network_config: Mapping[str, Any],
        seed: int = INIT_SEED,
    ) -> None:
        identity = {"otype": "Identity"}
        super().__init__(n_input_dims, n_output_dims, identity, network_config, seed)
