"""Distances of spheres and ellipsoids by hand, and what describes none."""

import pytest
import torch
from threestudio.models.geometry.shape_distance import shape_distance

POINTS = torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.4, 0.0], [0.0, 0.0, 2.0]])


def test_sphere_by_hand():
    found = shape_distance("sphere", 0.5, POINTS, "sdf_bias")
    torch.testing.assert_close(found, torch.tensor([[-0.5], [0.0], [1.5]]))


def test_ellipsoid_by_hand():
    found = shape_distance("ellipsoid", [0.3, 0.4, 1.0], POINTS, "sdf_bias")
    torch.testing.assert_close(found, torch.tensor([[-1.0], [2**0.5 - 1.0], [1.0]]))
    round_one = shape_distance("ellipsoid", (0.5, 0.5, 0.5), POINTS, "sdf_bias")
    sphere = shape_distance("sphere", 0.5, POINTS, "sdf_bias")
    torch.testing.assert_close(0.5 * round_one, sphere)


@pytest.mark.parametrize("shape, params, message", [
    ("sphere", None, "shape_init_params is None; expected a positive number"),
    ("sphere", -1.0, "shape_init_params is -1.0; expected a positive number"),
    ("ellipsoid", 0.5, "expected three positive numbers, the ellipsoid's half-axes"),
    ("ellipsoid", [0.5, 0.5], r"shape_init_params is \[0.5, 0.5\]; expected three"),
    ("mesh:a.obj", 1.0, "shape_init is 'mesh:a.obj'; expected sphere or ellipsoid.*pysdf"),
    ("cube", 1.0, "shape_init is 'cube'; expected sphere or ellipsoid"),
])  # fmt: skip
def test_what_describes_no_shape_is_refused(shape, params, message):
    with pytest.raises(ValueError, match=message):
        shape_distance(shape, params, POINTS, "shape_init")
