"""Encodings of positions and directions, all with inputs in [0, 1].

Shapes: n points, d input dimensions, f output features. Every encoding has `n_input_dims` and
`n_output_dims`. Those with ``accepts_frame_times = True`` take scene times besides positions.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from threestudio.kernels import tinycudann
from threestudio.kernels.hash_grid import HashGridEncoding
from threestudio.suggest import nearest
from threestudio.utils.base import Updateable

GRID_OTYPES = ("HashGrid", "Grid", "DenseGrid")
# What our stand-in for tiny-cuda-nn encodes besides.
PLAIN_OTYPES = ("Frequency", "Identity", "Composite")
MAX_HARMONIC_DEGREE = 4


class SphericalHarmonics(nn.Module):
    """Real spherical harmonics of a direction, in tiny-cuda-nn's order and sign.

    Args:
        n_input_dims: 3.
        config: ``degree`` 1 to 4 (default 4); gives degree^2 features: bands l = 0 .. degree - 1,
            within a band m = -l .. l, with the Condon-Shortley phase.

    Raises:
        ValueError: another dimension or degree.
    """

    def __init__(self, n_input_dims: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.degree = int(config.get("degree", MAX_HARMONIC_DEGREE))
        if n_input_dims != 3:
            raise ValueError(
                "SphericalHarmonics encodes directions of 3 numbers; "
                f"got n_input_dims={n_input_dims}."
            )
        if not 1 <= self.degree <= MAX_HARMONIC_DEGREE:
            raise ValueError(
                f"SphericalHarmonics degree is {self.degree}; expected 1 to {MAX_HARMONIC_DEGREE}."
            )
        self.n_input_dims = n_input_dims
        self.n_output_dims = self.degree**2

    def forward(self, x: Float[Tensor, "n 3"]) -> Float[Tensor, "n f"]:
        """Evaluates the harmonics at 2x - 1; pass (direction + 1) / 2 of a unit direction."""
        return torch.stack(_harmonics(x * 2 - 1, self.degree), dim=-1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # tiny-cuda-nn stores an empty vector for encodings that have nothing to learn.
        state_dict.pop(prefix + "params", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _harmonics(direction: Tensor, degree: int) -> list[Tensor]:
    x, y, z = direction.unbind(-1)
    values = [torch.full_like(x, 0.5 * math.sqrt(1 / math.pi))]
    if degree > 1:
        band = math.sqrt(3 / (4 * math.pi))
        values += [-band * y, band * z, -band * x]
    if degree > 2:
        band = math.sqrt(15 / (4 * math.pi))
        values += [
            band * x * y,
            -band * y * z,
            math.sqrt(5 / (16 * math.pi)) * (3 * z * z - 1),
            -band * x * z,
            band / 2 * (x * x - y * y),
        ]
    if degree > 3:
        outer = math.sqrt(35 / (32 * math.pi))
        middle = math.sqrt(105 / (4 * math.pi))
        inner = math.sqrt(21 / (32 * math.pi))
        values += [
            outer * y * (y * y - 3 * x * x),
            middle * x * y * z,
            inner * y * (1 - 5 * z * z),
            math.sqrt(7 / (16 * math.pi)) * z * (5 * z * z - 3),
            inner * x * (1 - 5 * z * z),
            middle / 2 * z * (x * x - y * y),
            outer * x * (3 * y * y - x * x),
        ]
    return values


class TCNNEncoding(nn.Module):
    """A tiny-cuda-nn style encoding by its ``otype``, on our own back ends.

    The name and the attribute ``encoding`` are the contract's; weights of a grid lie in
    ``encoding.params``.

    Args:
        in_channels: dimensions of the input.
        config: ``otype`` "HashGrid", "Grid", "DenseGrid", "SphericalHarmonics", "Frequency",
            "Identity" or "Composite" and its keys; for grids also ``backend`` (see
            `threestudio.kernels.hash_grid`). Not changed.
        dtype: of the features.

    Raises:
        ValueError: another ``otype``; names the nearest ones.
    """

    def __init__(
        self, in_channels: int, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.n_input_dims = in_channels
        otype = config.get("otype", "HashGrid")
        if otype in GRID_OTYPES:
            backend = config.get("backend", "auto")
            self.encoding: nn.Module = HashGridEncoding(in_channels, config, backend, dtype)
        elif otype == "SphericalHarmonics":
            self.encoding = SphericalHarmonics(in_channels, config)
        elif otype in PLAIN_OTYPES:
            self.encoding = tinycudann.Encoding(in_channels, config, dtype=dtype)
        else:
            known = (*GRID_OTYPES, *PLAIN_OTYPES, "SphericalHarmonics")
            raise unknown_otype("encoding", otype, known)
        self.n_output_dims = self.encoding.n_output_dims

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        return self.encoding(x)


def unknown_otype(what: str, otype: object, known: tuple[str, ...]) -> ValueError:
    """The error for an ``otype`` that nobody offers."""
    close = ", ".join(repr(name) for name in nearest(str(otype), known))
    return ValueError(f"Unknown {what} otype {otype!r}; the nearest known ones are {close}.")


class ProgressiveBandFrequency(nn.Module, Updateable):
    """Sines and cosines at octave frequencies, opened one after another.

    Args:
        in_channels: dimensions of the input.
        config: ``n_frequencies``; ``n_masking_step`` (0 = all open from the start): the step at
            which the last band is fully open.
    """

    def __init__(self, in_channels: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.n_input_dims = self.in_channels = in_channels
        self.N_freqs = int(config["n_frequencies"])
        self.n_masking_step = config.get("n_masking_step", 0)
        self.n_output_dims = in_channels * 2 * self.N_freqs
        self.register_buffer("freq_bands", 2.0 ** torch.arange(self.N_freqs), persistent=False)
        self.register_buffer("mask", torch.ones(self.N_freqs), persistent=False)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        """Features ordered by frequency, then sine before cosine, then input dimension."""
        phases = x.unsqueeze(1) * self.freq_bands.view(-1, 1)  # [n, frequencies, d]
        waves = torch.stack((phases.sin(), phases.cos()), dim=2)
        return (waves * self.mask.view(-1, 1, 1)).flatten(1)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Opens band k by (1 - cos(pi clamp(N step / n_masking_step - k, 0, 1))) / 2."""
        if self.n_masking_step <= 0 or global_step is None:
            self.mask.fill_(1.0)
            return
        progress = global_step / self.n_masking_step * self.N_freqs
        opened = (progress - torch.arange(self.N_freqs, device=self.mask.device)).clamp(0, 1)
        self.mask.copy_((1 - torch.cos(math.pi * opened)) / 2)


class ProgressiveBandHashGrid(nn.Module, Updateable):
    """A hash grid whose fine levels are opened during training; closed levels give zeros.

    Args:
        in_channels: dimensions of the input.
        config: the grid's keys, and ``start_level`` (levels open at first), ``start_step``,
            ``update_steps`` (steps from one level to the next). Not changed.
        dtype: of the features.
    """

    def __init__(
        self, in_channels: int, config: Mapping[str, Any], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.n_input_dims = in_channels
        grid_config = {**config, "otype": "Grid", "type": "Hash"}
        backend = config.get("backend", "auto")
        self.encoding = HashGridEncoding(in_channels, grid_config, backend, dtype)
        self.n_output_dims = self.encoding.n_output_dims
        self.n_level = self.encoding.layout.n_levels
        self.n_features_per_level = self.encoding.layout.n_features_per_level
        self.start_level = int(config["start_level"])
        self.start_step = int(config["start_step"])
        self.update_steps = int(config["update_steps"])
        self.current_level = min(self.start_level, self.n_level)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        features = self.encoding(x)
        n_open = self.current_level * self.n_features_per_level
        return features * (torch.arange(features.shape[1], device=features.device) < n_open)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Sets the number of open levels, which depends on the step alone."""
        opened = max(global_step - self.start_step, 0) // self.update_steps
        self.current_level = min(self.start_level + opened, self.n_level)


class CompositeEncoding(nn.Module, Updateable):
    """An encoding, optionally behind the scaled input itself; the outermost part of every encoding.

    Args:
        encoding: the wrapped encoding.
        include_xyz: put ``x * xyz_scale + xyz_offset`` before the features.
    """

    def __init__(
        self,
        encoding: nn.Module,
        include_xyz: bool = False,
        xyz_scale: float = 2.0,
        xyz_offset: float = -1.0,
    ) -> None:
        super().__init__()
        self.encoding = encoding
        self.include_xyz = include_xyz
        self.xyz_scale, self.xyz_offset = xyz_scale, xyz_offset
        self.n_input_dims = encoding.n_input_dims
        self.n_output_dims = int(include_xyz) * encoding.n_input_dims + encoding.n_output_dims

    @property
    def accepts_frame_times(self) -> bool:
        """Whether the wrapped encoding depends on scene time."""
        declared = getattr(self.encoding, "accepts_frame_times", None)
        if declared is None:
            declared = "frame_times" in inspect.signature(self.encoding.forward).parameters
        return declared

    def forward(
        self,
        x: Float[Tensor, "n d"],
        *args: Any,
        frame_times: Float[Tensor, "*times"] | None = None,
        **kwargs: Any,
    ) -> Float[Tensor, "n f"]:
        """Encodes positions; ``frame_times`` reach an encoding that takes them, others never.

        What the encoding returns besides features (a displacement) follows them unchanged.
        """
        if frame_times is not None and self.accepts_frame_times:
            kwargs["frame_times"] = frame_times
        encoded = self.encoding(x, *args, **kwargs)
        if not self.include_xyz:
            return encoded
        features, *others = encoded if isinstance(encoded, tuple) else (encoded,)
        features = torch.cat((x * self.xyz_scale + self.xyz_offset, features), dim=-1)
        return (features, *others) if others else features
