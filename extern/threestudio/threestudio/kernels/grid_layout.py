"""Where each level of a multiresolution grid lies in the flat parameter vector.

The layout is tiny-cuda-nn's, number for number, so that checkpoints are interchangeable:

    scale_l      = base_resolution * per_level_scale^l - 1          (evaluated in fp32)
    resolution_l = ceil(scale_l) + 1
    entries_l    = min(round_up_to_8(resolution_l^D), 2^log2_hashmap_size)

A level is dense while resolution_l^D entries fit, hashed otherwise. Parameters are ordered by
level, then entry, then feature. Muller et al., "Instant Neural Graphics Primitives", 2022, sec. 3.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

SUPPORTED_INPUT_DIMS = (2, 3, 4)
SUPPORTED_FEATURES = (1, 2, 4, 8)

# One factor per input dimension. The first is 1: neighbours along x stay neighbours in memory.
HASH_PRIMES = (1, 2654435761, 805459861, 3674653429)

_DEFAULTS: dict[str, Any] = {
    "n_levels": 16,
    "n_features_per_level": 2,
    "log2_hashmap_size": 19,
    "base_resolution": 16,
    "per_level_scale": 2.0,
    "interpolation": "Linear",
    "type": "Hash",
}


@dataclass(frozen=True)
class GridLayout:
    """Sizes and offsets of every level of one grid; immutable and hashable.

    ``scales`` are fp32 values (grid cells per unit length), ``resolutions`` vertices per axis,
    ``entries`` table entries per level, ``offsets`` the first entry of each level followed by the
    total. One entry holds ``n_features_per_level`` numbers. The other fields repeat the config.
    """

    n_input_dims: int
    n_features_per_level: int
    kind: str
    log2_hashmap_size: int
    base_resolution: int
    per_level_scale: float
    scales: tuple[float, ...]
    resolutions: tuple[int, ...]
    entries: tuple[int, ...]
    offsets: tuple[int, ...]

    @property
    def n_levels(self) -> int:
        return len(self.scales)

    @property
    def n_output_dims(self) -> int:
        return self.n_levels * self.n_features_per_level

    @property
    def n_params(self) -> int:
        """Length of the flat parameter vector."""
        return self.offsets[-1] * self.n_features_per_level

    def is_hashed(self, level: int) -> bool:
        """Whether the vertices of ``level`` outnumber its entries, so that they share them."""
        return self.resolutions[level] ** self.n_input_dims > self.entries[level]

    @classmethod
    def from_config(cls, n_input_dims: int, config: Mapping[str, Any]) -> GridLayout:
        """Derives the layout from a tiny-cuda-nn style encoding config, which is not changed.

        Args:
            n_input_dims: 2, 3 or 4.
            config: ``n_levels`` (16), ``n_features_per_level`` (2; one of 1, 2, 4, 8),
                ``log2_hashmap_size`` (19), ``base_resolution`` (16), ``per_level_scale`` (2.0),
                ``interpolation`` ("Linear" only), ``otype`` "HashGrid", "DenseGrid", or "Grid" with
                ``type`` "Hash" or "Dense". Keys of other encodings are ignored, as tiny-cuda-nn
                does, unless they look like a misspelling of one of these.

        Raises:
            ValueError: an unsupported dimension, feature count, type or interpolation, or a
                misspelt key.
        """
        _refuse_misspelt_keys(config)
        if n_input_dims not in SUPPORTED_INPUT_DIMS:
            raise ValueError(
                f"A hash grid over {n_input_dims} input dimensions is not supported; expected one "
                f"of {SUPPORTED_INPUT_DIMS}."
            )
        values = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
        n_features = int(values["n_features_per_level"])
        if n_features not in SUPPORTED_FEATURES:
            raise ValueError(
                f"n_features_per_level is {n_features}; expected one of {SUPPORTED_FEATURES}."
            )
        if str(values["interpolation"]).lower() != "linear":
            raise ValueError(
                f"interpolation is {values['interpolation']!r}; only 'Linear' is supported."
            )
        n_levels, base = int(values["n_levels"]), int(values["base_resolution"])
        growth, log2_size = float(values["per_level_scale"]), int(values["log2_hashmap_size"])
        if n_levels < 1 or base < 1 or growth <= 0 or not 0 <= log2_size <= 31:
            raise ValueError(
                f"n_levels={n_levels}, base_resolution={base} and per_level_scale={growth} must be "
                f"positive, and log2_hashmap_size={log2_size} within 0..31."
            )
        kind = _kind(config.get("otype", "HashGrid"), values["type"])
        scales = _level_scales(n_levels, base, growth)
        resolutions = tuple(math.ceil(scale) + 1 for scale in scales)
        capacity = math.inf if kind == "Dense" else 2**log2_size
        entries = tuple(min(-(-(res**n_input_dims) // 8) * 8, capacity) for res in resolutions)
        offsets = (0, *itertools.accumulate(entries))
        return cls(
            n_input_dims=n_input_dims,
            n_features_per_level=n_features,
            kind=kind,
            log2_hashmap_size=log2_size,
            base_resolution=base,
            per_level_scale=growth,
            scales=scales,
            resolutions=resolutions,
            entries=entries,
            offsets=offsets,
        )

    def to_config(self) -> dict[str, Any]:
        """The tiny-cuda-nn config that gives this layout."""
        return {
            "otype": "Grid",
            "type": self.kind,
            "n_levels": self.n_levels,
            "n_features_per_level": self.n_features_per_level,
            "log2_hashmap_size": self.log2_hashmap_size,
            "base_resolution": self.base_resolution,
            "per_level_scale": self.per_level_scale,
            "interpolation": "Linear",
        }


def can_sum(static: GridLayout, dynamic: GridLayout) -> bool:
    """Whether two grids can be summed in one pass: 3D and 4D, of the same scales and features."""
    same = static.scales == dynamic.scales
    same &= static.n_features_per_level == dynamic.n_features_per_level
    return same and static.n_input_dims == 3 and dynamic.n_input_dims == 4


def _level_scales(n_levels: int, base: int, per_level_scale: float) -> tuple[float, ...]:
    # In fp32 and through log2/exp2, as tiny-cuda-nn computes it: at scale 1.4473 the finest level
    # would otherwise differ by 1.5e-3 cells, and a level near an integer by a whole vertex.
    log2_scale = np.log2(np.float32(per_level_scale))
    levels = np.arange(n_levels, dtype=np.float32)
    scales = np.exp2(levels * log2_scale) * np.float32(base) - np.float32(1)
    return tuple(float(scale) for scale in scales.astype(np.float32))


def _kind(otype: str, grid_type: str) -> str:
    """ "Hash" or "Dense", from the two ways in which tiny-cuda-nn lets a config say it."""
    named = {"hashgrid": "hash", "densegrid": "dense"}.get(str(otype).lower(), str(grid_type))
    if named.lower() not in ("hash", "dense"):
        raise ValueError(f"Grid type {grid_type!r} is not supported; expected 'Hash' or 'Dense'.")
    return named.capitalize()


def _refuse_misspelt_keys(config: Mapping[str, Any]) -> None:
    for key in config:
        if key in _DEFAULTS or key == "otype":
            continue
        nearest = difflib.get_close_matches(str(key), _DEFAULTS, n=1, cutoff=0.85)
        if nearest and nearest[0] not in config:
            raise ValueError(
                f"Unknown key {key!r} in the encoding config; did you mean {nearest[0]!r}?"
            )
