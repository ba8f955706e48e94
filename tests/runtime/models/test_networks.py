"""The factories: what a config names, what it may leave out, and how it fails."""

import copy

import pytest
import torch
from omegaconf import OmegaConf
from threestudio.models import networks
from threestudio.models.networks import (
    create_network_with_input_encoding,
    get_encoding,
    get_mlp,
)

GRID = {"n_levels": 4, "log2_hashmap_size": 8, "base_resolution": 4, "per_level_scale": 1.5}
MLP = {"otype": "VanillaMLP", "n_neurons": 16, "n_hidden_layers": 1}
PROGRESSIVE = {**GRID, "start_level": 2, "start_step": 0, "update_steps": 50}


@pytest.mark.parametrize(
    ("config", "n_output_dims"),
    [
        ({"otype": "HashGrid", **GRID}, 8),
        ({"otype": "Grid", "type": "Hash", **GRID}, 8),
        ({"otype": "DenseGrid", **GRID}, 8),
        ({"otype": "SphericalHarmonics", "degree": 3}, 9),
        ({"otype": "Frequency", "n_frequencies": 4}, 24),
        ({"otype": "Identity"}, 3),
        ({"otype": "Composite", "nested": [{"otype": "Identity"}]}, 3),
        ({"otype": "ProgressiveBandHashGrid", **PROGRESSIVE}, 8),
        ({"otype": "ProgressiveBandFrequency", "n_frequencies": 4}, 24),
        ({"otype": "HashGridSpatialTime", **GRID, "static": True}, 8),
        ({"otype": "HashGrid", **GRID, "include_xyz": True}, 11),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_every_encoding_is_built_and_declares_its_width(config, n_output_dims, structured):
    encoding = get_encoding(3, OmegaConf.create(config) if structured else config)
    assert isinstance(encoding, networks.CompositeEncoding)
    assert encoding.n_output_dims == n_output_dims
    assert encoding(torch.full((2, 3), 0.4)).shape == (2, n_output_dims)


def test_interpolations_of_the_surrounding_config_are_resolved():
    config = OmegaConf.create(
        {"static": False, "enc": {"otype": "HashGridSpatialTime", **GRID, "static": "${static}"}}
    )
    assert get_encoding(3, config.enc).encoding.static is False


@pytest.mark.parametrize("structured", [False, True])
def test_configs_are_not_changed(structured):
    make = OmegaConf.create if structured else copy.deepcopy
    encoding, network = make({"otype": "ProgressiveBandHashGrid", **PROGRESSIVE}), make(MLP)
    before = copy.deepcopy(encoding), copy.deepcopy(network)
    create_network_with_input_encoding(3, 2, encoding, network)
    assert (encoding, network) == before


@pytest.mark.parametrize(
    ("otype", "nearest"), [("HashGird", "HashGrid"), ("hashgridspatialtime", "HashGridSpatialTime")]
)
def test_unknown_encoding_names_the_nearest(otype, nearest):
    with pytest.raises(ValueError, match=rf"Unknown encoding otype '{otype}'.*'{nearest}'"):
        get_encoding(3, {"otype": otype})


def test_unknown_network_names_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown network otype 'VanilaMLP'.*'VanillaMLP'"):
        get_mlp(3, 1, {**MLP, "otype": "VanilaMLP"})


def test_missing_otype_is_an_error():
    with pytest.raises(ValueError, match="Unknown encoding otype None"):
        get_encoding(3, GRID)


@pytest.mark.parametrize("otype", ["FullyFusedMLP", "CutlassMLP"])
def test_networks_of_tinycudann_keep_its_layout(otype):
    """One vector of row-major matrices, [16, 16] and [16, 16]; the padded inputs are ones."""
    network = get_mlp(5, 2, {**MLP, "otype": otype})
    assert list(network.state_dict()) == ["network.params"]
    first, last = network.network.params.view(2, 16, 16)
    x = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([x, torch.ones(3, 4, 11)], dim=-1)
    expected = torch.relu(padded @ first.t()) @ last[:2].t()
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize("otype", ["VanillaMLP", "SphereInitVanillaMLP"])
def test_every_network_is_built(otype):
    network = get_mlp(5, 2, {**MLP, "otype": otype})
    assert type(network).__name__ == otype
    assert network(torch.zeros(4, 5)).shape == (4, 2)


def test_network_with_encoding_composes_and_trains():
    module = create_network_with_input_encoding(3, 2, {"otype": "HashGrid", **GRID}, MLP)
    x = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), module.network(module.encoding(x)))
    module(x).sum().backward()
    assert module.encoding.encoding.encoding.params.grad.any()


def test_steps_reach_the_encoding_inside():
    module = create_network_with_input_encoding(
        3, 2, {"otype": "ProgressiveBandHashGrid", **PROGRESSIVE}, MLP
    )
    module.do_update_step(0, 50)
    assert module.encoding.encoding.current_level == 3


def test_unlisted_encodings_of_the_wrapper_are_named_too():
    with pytest.raises(ValueError, match=r"Unknown encoding otype 'OneBlob'"):
        networks.TCNNEncoding(3, {"otype": "OneBlob"})
