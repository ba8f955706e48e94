"""Factories of encodings and networks from config, and the contract's names of both."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Float
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from threestudio.kernels import tinycudann
from threestudio.models.encodings import (
    GRID_OTYPES,
    PLAIN_OTYPES,
    CompositeEncoding,
    ProgressiveBandFrequency,
    ProgressiveBandHashGrid,
    SphericalHarmonics,
    TCNNEncoding,
    unknown_otype,
)
from threestudio.models.mlp import SphereInitVanillaMLP, VanillaMLP
from threestudio.models.spatial_time_encoding import (
    HashGridSpatialTime,
    HashGridSpatialTimeDeform,
)
from threestudio.utils.base import Updateable

__all__ = [
    "CompositeEncoding",
    "HashGridSpatialTime",
    "HashGridSpatialTimeDeform",
    "NetworkWithInputEncoding",
    "ProgressiveBandFrequency",
    "ProgressiveBandHashGrid",
    "SphereInitVanillaMLP",
    "SphericalHarmonics",
    "TCNNEncoding",
    "TCNNNetwork",
    "VanillaMLP",
    "create_network_with_input_encoding",
    "get_encoding",
    "get_mlp",
]

ENCODINGS: dict[str, Callable[[int, Mapping[str, Any]], nn.Module]] = {
    **dict.fromkeys((*GRID_OTYPES, *PLAIN_OTYPES, "SphericalHarmonics"), TCNNEncoding),
    "HashGridSpatialTime": HashGridSpatialTime,
    "HashGridSpatialTimeDeform": HashGridSpatialTimeDeform,
    "ProgressiveBandFrequency": ProgressiveBandFrequency,
    "ProgressiveBandHashGrid": ProgressiveBandHashGrid,
}


class TCNNNetwork(nn.Module):
    """A network in tiny-cuda-nn's layout: its weights lie in ``network.params``, one flat vector.

    Args:
        dim_in, dim_out: features in and out.
        config: see `threestudio.kernels.tinycudann.NetworkWithInputEncoding`. Not changed.
    """

    def __init__(self, dim_in: int, dim_out: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.network = tinycudann.Network(dim_in, dim_out, config)

    def forward(self, x: Float[Tensor, "*batch dim_in"]) -> Float[Tensor, "*batch dim_out"]:
        return self.network(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


NETWORKS: dict[str, Callable[[int, int, Mapping[str, Any]], nn.Module]] = {
    **dict.fromkeys(("FullyFusedMLP", "CutlassMLP"), TCNNNetwork),
    "VanillaMLP": VanillaMLP,
    "SphereInitVanillaMLP": SphereInitVanillaMLP,
}


def get_encoding(n_input_dims: int, config: Mapping[str, Any] | DictConfig) -> CompositeEncoding:
    """Builds an encoding of inputs in [0, 1].

    Args:
        n_input_dims: dimensions of the input, time not counted.
        config: ``otype``, one of `ENCODINGS`, with its keys; ``include_xyz`` (default False) puts
            2x - 1 before the features. Not changed.

    Raises:
        ValueError: unknown ``otype``; names the nearest ones.
    """
    plain = _plain(config)
    build = _look_up("encoding", ENCODINGS, plain)
    return CompositeEncoding(
        build(n_input_dims, plain), include_xyz=bool(plain.get("include_xyz", False))
    )


def get_mlp(
    n_input_dims: int, n_output_dims: int, config: Mapping[str, Any] | DictConfig
) -> nn.Module:
    """Builds a network.

    Args:
        config: ``otype``, one of `NETWORKS`, with its keys. Not changed.

    Raises:
        ValueError: unknown ``otype``; names the nearest ones.
    """
    plain = _plain(config)
    return _look_up("network", NETWORKS, plain)(n_input_dims, n_output_dims, plain)


class NetworkWithInputEncoding(nn.Module, Updateable):
    """A network behind an encoding."""

    def __init__(self, encoding: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.encoding, self.network = encoding, network

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n f"]:
        return self.network(self.encoding(x))


def create_network_with_input_encoding(
    n_input_dims: int,
    n_output_dims: int,
    encoding_config: Mapping[str, Any] | DictConfig,
    network_config: Mapping[str, Any] | DictConfig,
) -> NetworkWithInputEncoding:
    """Builds an encoding of inputs in [0, 1] and a network that takes its features."""
    encoding = get_encoding(n_input_dims, encoding_config)
    network = get_mlp(encoding.n_output_dims, n_output_dims, network_config)
    return NetworkWithInputEncoding(encoding, network)


def _plain(config: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """The config as plain containers, with interpolations resolved."""
    if isinstance(config, DictConfig):
        return OmegaConf.to_container(config, resolve=True)
    return dict(config)


def _look_up(what: str, table: Mapping[str, Callable], config: Mapping[str, Any]) -> Callable:
    otype = config.get("otype")
    if otype not in table:
        raise unknown_otype(what, otype, tuple(table))
    return table[otype]
