"""Tiny parts of a scene, as configs of the contract describe them."""

import copy

import pytest

GEOMETRY = {
    "radius": 1.0,
    "pos_encoding_config": {
        "otype": "HashGrid",
        "n_levels": 3,
        "n_features_per_level": 2,
        "log2_hashmap_size": 9,
        "base_resolution": 4,
        "per_level_scale": 1.5,
    },
    "mlp_network_config": {
        "otype": "VanillaMLP",
        "activation": "ReLU",
        "output_activation": "none",
        "n_neurons": 8,
        "n_hidden_layers": 1,
    },
}


@pytest.fixture
def small_geometry():
    """Config of an implicit volume that costs nothing; change it freely."""
    return copy.deepcopy(GEOMETRY)
