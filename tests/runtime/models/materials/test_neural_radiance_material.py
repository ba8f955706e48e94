"""Colour by direction: against the network by hand."""

import pytest
import threestudio
import torch

NETWORK = {"otype": "VanillaMLP", "activation": "ReLU", "n_neurons": 6, "n_hidden_layers": 1}


def build(**config):
    return threestudio.find("neural-radiance-material")(
        {"input_feature_dims": 4, "mlp_network_config": NETWORK, **config}
    )


def test_colour_is_the_network_of_features_and_harmonics():
    material = build(dir_encoding_config={"otype": "SphericalHarmonics", "degree": 2})
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, generator=g)
    directions = torch.nn.functional.normalize(torch.randn(2, 5, 3, generator=g), dim=-1)
    colors = material(features=features, viewdirs=directions, positions=None, density=None)
    assert colors.shape == (2, 5, 3) and material.n_input_dims == 8
    first, last = (layer.weight for layer in material.network.layers if hasattr(layer, "weight"))
    x, y, z = directions[1, 2].tolist()
    # Bands 0 and 1 of the real harmonics.
    harmonics = torch.tensor([0.28209479, -0.48860251 * y, 0.48860251 * z, -0.48860251 * x])
    inputs = torch.cat([features[1, 2], harmonics])
    torch.testing.assert_close(colors[1, 2], torch.sigmoid(last @ torch.relu(first @ inputs)))


def test_defaults_are_the_contracts():
    material = threestudio.find("neural-radiance-material")({})
    assert (material.n_input_dims, material.requires_normal) == (8 + 9, False)
    assert material.network.n_neurons == 16 and material.network.n_hidden_layers == 2


def test_another_number_of_features_is_refused():
    with pytest.raises(ValueError, match="got 3 features; expected input_feature_dims = 4"):
        build()(features=torch.zeros(2, 3), viewdirs=torch.zeros(2, 3))
