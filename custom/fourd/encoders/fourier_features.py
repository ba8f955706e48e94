"""Random Fourier features with a scale of its own for each input axis.

The features of a vector x are [sin(W x), cos(W x)], without 2 pi, where entry (k, a) of W is normal
with standard deviation sigma_a. A larger sigma tells finer differences along an axis apart: moving
by delta along axis a changes the features by sqrt(2 - 2 exp(-(sigma_a delta)^2 / 2)) of their norm
on average, 6 % over the whole of [-1, 1] for sigma 0.03 and about 140 % from sigma 1 on.

Dimensions: ``n_axes`` inputs, ``n_features`` outputs (sines, then as many cosines).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

AXIS_FAMILIES = ("step", "layer", "time", "view")


@dataclass(frozen=True)
class FourierPreset:
    """How a mapper encodes its inputs, each scaled to [-1, 1] first."""

    n_features: int
    """Sines and cosines together; even."""
    sigma_step: float
    """Of the noise level or diffusion step."""
    sigma_layer: float
    """Of the index of the cross-attention layer."""
    sigma_time: float
    """Of scene times and distances between them."""
    sigma_view: float
    """Of everything that describes a camera."""
    normalize: bool
    """Divide the features by their norm, which for sines and cosines is a constant."""

    def sigma(self, family: str) -> float:
        """The scale of one of `AXIS_FAMILIES`."""
        return getattr(self, f"sigma_{family}")


PRESETS = {
    "default": FourierPreset(128, 1.0, 2.0, 4.0, 1.0, False),
    # What ViewNeTI publishes and 4Distillation took over. The step hardly changes these features,
    # and neighbouring frames of a long clip are nearly the same: kept to compare with.
    "legacy_arch15": FourierPreset(64, 0.03, 2.0, 1.0, 0.5, False),
}


def fourier_preset(name: str) -> FourierPreset:
    """The encoding of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"the encoding is {name!r}; expected one of {', '.join(PRESETS)}.")
    return PRESETS[name]


class FourierFeatures(nn.Module):
    """[sin(W x), cos(W x)] with a fixed random W, which is saved with the weights.

    Args:
        sigmas: standard deviation of W's column for each input axis.
        n_features: sines and cosines together; even.
        normalize: divide the features by their L2 norm.
        generator: source of W; a private one, so that no other draw shifts.

    Not trained; differentiable in x.

    Raises:
        ValueError: no axis, a negative sigma, or an odd number of features.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        n_features: int,
        generator: torch.Generator,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if not sigmas or any(sigma < 0 for sigma in sigmas):
            raise ValueError(
                f"sigmas is {list(sigmas)}; expected one number of at least 0 for each input."
            )
        if n_features < 2 or n_features % 2:
            raise ValueError(
                f"n_features is {n_features}; expected an even number, half of them sines and "
                "half cosines."
            )
        self.normalize = normalize
        frequencies = torch.randn(n_features // 2, len(sigmas), generator=generator)
        self.register_buffer("frequencies", frequencies * torch.tensor(sigmas))

    @property
    def n_features(self) -> int:
        """Width of what `forward` returns."""
        return 2 * self.frequencies.shape[0]

    def forward(self, inputs: Float[Tensor, "*batch n_axes"]) -> Float[Tensor, "*batch n_features"]:
        """Encode inputs, each scaled to [-1, 1] (sines and cosines of angles already are)."""
        phases = inputs.to(self.frequencies) @ self.frequencies.T
        features = torch.cat((phases.sin(), phases.cos()), dim=-1)
        if self.normalize:
            features = features / features.norm(dim=-1, keepdim=True)
        return features
