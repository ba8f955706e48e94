"""The layout is tiny-cuda-nn's, number for number."""

import pytest
from threestudio.kernels import GridLayout

PAPER = {
    "otype": "HashGrid",
    "n_levels": 16,
    "n_features_per_level": 2,
    "log2_hashmap_size": 19,
    "base_resolution": 16,
    "per_level_scale": 1.447269237440378,
}
PAPER_RESOLUTIONS = (
    16, 24, 34, 49, 71, 102, 148, 213, 308, 446, 646, 934, 1352, 1956, 2831, 4096,
)  # fmt: skip


@pytest.mark.parametrize(("dims", "n_params", "n_dense"), [(3, 12_599_920, 5), (4, 15_474_688, 2)])
def test_published_grid_has_the_published_sizes(dims, n_params, n_dense):
    layout = GridLayout.from_config(dims, PAPER)
    assert layout.resolutions == PAPER_RESOLUTIONS
    assert layout.n_params == n_params
    assert [layout.is_hashed(level) for level in range(16)] == [False] * n_dense + [True] * (
        16 - n_dense
    )
    assert layout.n_output_dims == 32


def test_entries_are_rounded_up_to_eight_and_offsets_accumulate(small_layout):
    layout = small_layout(3, base_resolution=5)
    # scales 4, 6.5, 10.25, 15.875: resolutions 5, 8, 12, 17; 125 rounds up to 128, 512 is hashed.
    assert layout.resolutions == (5, 8, 12, 17)
    assert layout.entries == (128, 256, 256, 256)
    assert layout.offsets == (0, 128, 384, 640, 896)
    assert layout.n_params == 896 * 2


def test_a_level_that_fits_exactly_is_dense(small_layout):
    layout = small_layout(2, base_resolution=16, n_levels=2)
    assert layout.entries[0] == 256  # 16^2, the whole capacity
    assert not layout.is_hashed(0)
    assert layout.is_hashed(1)


@pytest.mark.parametrize("config", [{"otype": "DenseGrid"}, {"otype": "Grid", "type": "Dense"}])
def test_dense_grids_ignore_the_capacity(small_layout, config):
    layout = small_layout(3, **config)
    assert layout.entries[3] == 14**3  # scale 12.5; 2744 is a multiple of 8
    assert not any(layout.is_hashed(level) for level in range(4))


def test_defaults_are_tiny_cuda_nns():
    layout = GridLayout.from_config(3, {})
    assert (layout.n_levels, layout.n_features_per_level) == (16, 2)
    assert layout.resolutions[:3] == (16, 32, 64)


@pytest.mark.parametrize("otype", ["HashGrid", "DenseGrid"])
def test_to_config_gives_the_same_layout_back(small_layout, otype):
    layout = small_layout(4, otype=otype, n_features_per_level=4)
    assert GridLayout.from_config(4, layout.to_config()) == layout


def test_config_is_not_changed():
    config = dict(PAPER)
    GridLayout.from_config(3, config)
    assert config == PAPER


def test_keys_of_other_encodings_are_ignored(small_layout):
    extra = {"start_level": 4, "start_step": 0, "update_steps": 500, "static": True}
    assert small_layout(3, **extra) == small_layout(3)


@pytest.mark.parametrize(
    ("dims", "overrides", "message"),
    [
        (5, {}, r"over 5 input dimensions is not supported; expected one of \(2, 3, 4\)"),
        (3, {"n_features_per_level": 3}, r"n_features_per_level is 3; expected one of"),
        (3, {"interpolation": "Smoothstep"}, r"interpolation is 'Smoothstep'; only 'Linear'"),
        (3, {"otype": "Grid", "type": "Tiled"}, r"Grid type 'Tiled' is not supported"),
        (3, {"n_levels": 0}, r"n_levels=0, .* must be positive"),
        (3, {"log2_hashmap_size": 40}, r"log2_hashmap_size=40 within 0\.\.31"),
    ],
)
def test_unsupported_configs_are_refused(small_layout, dims, overrides, message):
    with pytest.raises(ValueError, match=message):
        small_layout(dims, **overrides)


def test_misspelt_key_is_refused_with_the_right_one():
    with pytest.raises(ValueError, match=r"Unknown key 'n_level'.*did you mean 'n_levels'"):
        GridLayout.from_config(3, {"n_level": 4})
