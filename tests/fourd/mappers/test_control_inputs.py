"""What mappers are told: by hand, for cameras on an orbit."""

import math

import pytest
import torch

from custom.fourd.mappers.control_inputs import (
    VIEW_AXES,
    control_values,
    neutral_batch,
    time_axes,
    view_axes,
)
from custom.fourd.ops.camera import camera_from_orbit


def camera(elevation, azimuth, radius, fovy_deg=40.0):
    values = [torch.tensor([float(value)]) for value in (elevation, azimuth, radius)]
    return {
        "c2w": camera_from_orbit(*values),
        "fovy": torch.tensor([math.radians(fovy_deg)]),
        "elevation": values[0],
        "azimuth": values[1],
        "radius": values[2],
    }


def values_of(axes, batch):
    values = control_values(axes, batch)
    assert values.shape == (1, len(axes))
    return dict(zip([axis.name for axis in axes], values[0].tolist(), strict=True))


def times(i, j):
    return {"time_i": torch.tensor([i]), "time_j": torch.tensor([j])}


def test_times_signed_and_unsigned():
    assert values_of(time_axes(), times(0.75, 0.25)) == {"time_j": 0.25, "delta_time": -0.5}
    unsigned = time_axes("relative", "unsigned")
    # The seed's |i - j|: forwards and backwards are the same number.
    assert values_of(unsigned, times(0.75, 0.25)) == {"distance_time": 0.5}
    assert values_of(unsigned, times(0.25, 0.75)) == {"distance_time": 0.5}
    assert values_of(time_axes("absolute"), times(0.75, 0.25)) == {"time_j": 0.25}


def test_relative_spherical_by_hand():
    batch = {"camera_a": camera(10, 350, 2.0), "camera_b": camera(40, 80, 3.0)}
    found = values_of(view_axes("relative"), batch)
    expected = {
        "delta_elevation": math.radians(30),
        "sin_delta_azimuth": 1.0,
        "cos_delta_azimuth": 0.0,
        "log_radius_ratio": math.log(1.5),
        "elevation_a": math.radians(10),
    }
    assert found == pytest.approx(expected, abs=1e-6)


def test_absolute_spherical_by_hand():
    batch = {"camera_a": camera(10, 0, 2.0), "camera_b": camera(-30, 210, 3.0)}
    expected = {
        "elevation_b": math.radians(-30),
        "sin_azimuth_b": -0.5,
        "cos_azimuth_b": -math.sqrt(3) / 2,
        "log_radius_b": math.log(3.0),
    }
    assert values_of(view_axes("absolute"), batch) == pytest.approx(expected, abs=1e-6)


def test_se3_takes_camera_b_into_the_frame_of_camera_a():
    # From azimuth 0 to 90 degrees at elevation 0: camera b looks along what is a's own left.
    batch = {"camera_a": camera(0, 0, 2.0), "camera_b": camera(0, 90, 2.0, fovy_deg=20)}
    found = values_of(view_axes("relative", "rel_se3_focal"), batch)
    rotation = [found[f"rotation_{i}"] for i in range(6)]
    # b's right axis is a's backward turned once: (0, 0, -1) in a's frame; up stays up.
    assert rotation == pytest.approx([0, 0, -1, 0, 1, 0], abs=1e-6)
    # b stands one radius to the right of a and one radius ahead of it (-z).
    assert [found[f"translation_{axis}"] for axis in "xyz"] == pytest.approx([1, 0, -1], abs=1e-6)
    ratio = math.tan(math.radians(20)) / math.tan(math.radians(10))
    assert found["log_focal_ratio"] == pytest.approx(math.log(ratio), abs=1e-6)
    assert len(view_axes("relative", "rel_se3")) == 9


def test_flat12_is_the_pose():
    batch = {"camera_a": camera(0, 0, 2.0), "camera_b": camera(20, 30, 2.5)}
    values = control_values(view_axes("absolute", absolute="flat12"), batch)
    assert torch.equal(values.view(3, 4), batch["camera_b"]["c2w"][0, :3])


def test_both_is_absolute_then_relative():
    assert view_axes("both") == VIEW_AXES["abs_spherical"] + VIEW_AXES["rel_spherical"]


def test_neutral_inputs_are_those_of_no_change():
    batch = {**times(0.5, 0.9), "camera_a": camera(10, 20, 2.0), "camera_b": camera(20, 60, 2.0)}
    still = values_of(time_axes(), neutral_batch(batch, "time"))
    assert still == pytest.approx({"time_j": 0.5, "delta_time": 0.0})
    stays = values_of(view_axes("relative"), neutral_batch(batch, "view"))
    assert stays["sin_delta_azimuth"] == 0 and stays["cos_delta_azimuth"] == 1
    assert stays["delta_elevation"] == 0 and stays["log_radius_ratio"] == 0
    assert float(batch["time_j"]) == pytest.approx(0.9), "the batch itself is not changed"


def test_what_is_unknown_or_missing_is_refused():
    with pytest.raises(ValueError, match="time_input is 'relativ'; expected one of absolute"):
        time_axes("relativ")
    with pytest.raises(ValueError, match="time_distance is 'abs'; expected one of signed"):
        time_axes("both", "abs")
    with pytest.raises(ValueError, match="view_relative is 'flat12'; expected one of rel_sph"):
        view_axes("relative", "flat12")
    with pytest.raises(ValueError, match="view_absolute is 'rel_se3'"):
        view_axes("absolute", absolute="rel_se3")
    with pytest.raises(ValueError, match="the batch has no time_j; expected both time_i and"):
        control_values(time_axes(), {"time_i": torch.zeros(1)})
    with pytest.raises(ValueError, match="no camera_a and no camera_b"):
        control_values(view_axes(), times(0.0, 1.0))
