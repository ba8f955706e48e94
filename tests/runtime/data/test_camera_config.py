"""Every sentence that a wrong camera configuration can end in."""

import pytest
from omegaconf import OmegaConf
from threestudio.data.camera_config import (
    expand_schedule,
    plain_list,
    validate_camera_config,
    validate_count,
    validate_number,
    validate_range,
)
from threestudio.data.uncond import RandomCameraDataModuleConfig
from threestudio.utils.config import parse_structured


def config(**values):
    return parse_structured(RandomCameraDataModuleConfig, OmegaConf.create(values))


def test_defaults_are_valid():
    validate_camera_config(config())


def test_a_single_value_serves_all_resolutions():
    cfg = config(height=[64, 256], width=[32, 128], batch_size=4, resolution_milestones=[10])
    assert expand_schedule(cfg) == ([64, 256], [32, 128], [4, 4])
    validate_camera_config(cfg)


def test_plain_list_reads_numbers_lists_and_configs():
    assert plain_list(3) == [3]
    assert plain_list((1, 2)) == [1, 2]
    assert plain_list(OmegaConf.create([1, 2])) == [1, 2]
    assert plain_list("ab") == ["ab"]


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"height": "64"}, r"data\.height has the value '64'; expected a positive integer"),
        ({"width": 0}, r"data\.width has the value 0; expected a positive integer"),
        ({"batch_size": [4, 2.5]}, r"data\.batch_size has the value 2\.5; expected a positive"),
        ({"height": True}, r"data\.height has the value True; expected a positive integer"),
        (
            {"height": [64, 128], "width": [64, 128, 256]},
            r"uneven: data\.height has 2, data\.width has 3, data\.batch_size has 1 entries",
        ),
        (
            {"height": [64, 128], "width": [64, 128]},
            r"resolution_milestones has 0 entries \(\[\]\) for 2 resolutions; expected 1",
        ),
        (
            {"height": [8, 16, 32], "width": 8, "resolution_milestones": [20, 10]},
            r"resolution_milestones is \[20, 10\]; expected steps that grow",
        ),
        (
            {"height": [8, 16], "width": 8, "resolution_milestones": [0]},
            r"resolution_milestones has the value 0; expected an integer of at least 1",
        ),
        (
            {"elevation_range": [30, 0]},
            r"elevation_range is \[30, 0\], which is reversed; write .* first: \[0, 30\]",
        ),
        ({"elevation_range": [0, 91]}, r"elevation_range has the value 91; .*\[-90, 90\] degrees"),
        ({"azimuth_range": [1, 2, 3]}, r"azimuth_range is \[1, 2, 3\]; expected two numbers"),
        ({"azimuth_range": [0, float("inf")]}, r"azimuth_range has the value inf"),
        ({"camera_distance_range": [0, 1]}, r"camera_distance_range has the value 0; .*\(0, inf\]"),
        ({"fovy_range": [40, 180]}, r"fovy_range has the value 180; .* in \(0, 180\) degrees"),
        ({"fovy_range": ["a", 50]}, r"fovy_range has the value 'a'; expected a number"),
        ({"light_distance_range": [-1, 1]}, r"light_distance_range has the value -1"),
        ({"camera_perturb": -0.1}, r"camera_perturb has the value -0\.1; .*\[0, inf\]"),
        ({"up_perturb": float("nan")}, r"up_perturb has the value nan"),
        ({"eval_height": 0}, r"eval_height has the value 0; expected an integer of at least 1"),
        ({"n_test_views": 0}, r"n_test_views has the value 0; expected an integer of at least 1"),
        ({"progressive_until": -1}, r"progressive_until has the value -1; .* at least 0"),
        ({"eval_elevation_deg": 100.0}, r"eval_elevation_deg has the value 100\.0"),
        ({"eval_camera_distance": 0.0}, r"eval_camera_distance has the value 0\.0"),
        ({"eval_fovy_deg": 180.0}, r"eval_fovy_deg has the value 180\.0"),
        (
            {"light_sample_strategy": "sun"},
            r"light_sample_strategy is 'sun'; expected one of dreamfusion, magic3d",
        ),
    ],
)
def test_wrong_values_are_named_in_one_sentence(values, sentence):
    with pytest.raises(ValueError, match=sentence):
        validate_camera_config(config(**values))


def test_the_path_of_the_configuration_leads_the_sentence():
    with pytest.raises(ValueError, match=r"^data\.single_view\.n_val_views has the value 0"):
        validate_camera_config(config(n_val_views=0), "data.single_view")


def test_closed_and_open_bounds():
    validate_number(0, "x", 0, 1)
    validate_number(1, "x", 0, 1)
    with pytest.raises(ValueError, match=r"x has the value 0; expected a number in \(0, 1\)"):
        validate_number(0, "x", 0, 1, open_low=True, open_high=True)
    with pytest.raises(ValueError, match="x has the value None"):
        validate_number(None, "x")
    validate_range([2, 2], "x")
    with pytest.raises(ValueError, match="x has the value True; expected an integer"):
        validate_count(True, "x", 0)
