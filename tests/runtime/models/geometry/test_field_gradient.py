"""Slopes of fields whose derivative is known by hand."""

import pytest
import torch
from threestudio.models.geometry.field_gradient import (
    analytic_gradient,
    check_normal_type,
    differentiable,
    finite_difference,
)


def parabola(points):
    """x^2 + 3 y - z: slope (2 x, 3, -1)."""
    x, y, z = points.unbind(-1)
    return (x * x + 3 * y - z).unsqueeze(-1)


POINTS = torch.tensor([[[0.5, -0.25, 0.125]], [[-0.75, 0.5, 0.0]]], dtype=torch.float64)
SLOPE = torch.tensor([[[1.0, 3.0, -1.0]], [[-1.5, 3.0, -1.0]]], dtype=torch.float64)
STEP = 0.125


def test_one_side_is_off_by_the_step_where_the_field_bends():
    slope = finite_difference(parabola, POINTS, parabola(POINTS), STEP, is_central=False)
    # ((x + e)^2 - x^2) / e = 2 x + e.
    torch.testing.assert_close(slope, SLOPE + torch.tensor([STEP, 0.0, 0.0]).double())


def test_both_sides_are_exact_for_a_parabola_whatever_the_value_given():
    slope = finite_difference(parabola, POINTS, torch.full_like(POINTS[..., :1], 9.0), STEP, True)
    torch.testing.assert_close(slope, SLOPE)


def test_neighbours_stay_in_the_box():
    seen = []

    def field(points):
        seen.append(points)
        return parabola(points)

    finite_difference(field, POINTS, parabola(POINTS), 0.5, is_central=True, radius=0.75)
    (asked,) = seen
    assert asked.shape == (2, 1, 6, 3)
    assert float(asked.abs().max()) == 0.75


def test_the_gradient_is_found_in_evaluation_and_keeps_a_graph_only_on_request():
    with torch.no_grad(), differentiable(POINTS, is_needed=True) as points:
        bare = analytic_gradient(parabola(points), points, keeps_graph=False)
        kept = analytic_gradient(parabola(points), points, keeps_graph=True)
    torch.testing.assert_close(bare, SLOPE)
    assert not bare.requires_grad and kept.requires_grad
    assert not POINTS.requires_grad


def test_points_stay_as_they_are_where_no_derivative_is_taken():
    with torch.no_grad(), differentiable(POINTS, is_needed=False) as points:
        assert points is POINTS and not torch.is_grad_enabled()
    own = POINTS.clone().requires_grad_(True)
    with differentiable(own, is_needed=True) as points:
        assert points is own


def test_gradients_are_off_again_after_a_failure():
    with torch.no_grad():
        with pytest.raises(ZeroDivisionError), differentiable(POINTS, is_needed=True):
            _ = 1 / 0
        assert not torch.is_grad_enabled()


def test_an_unknown_way_to_a_normal_is_refused_with_the_known_ones():
    check_normal_type(None)
    check_normal_type("analytic")
    with pytest.raises(ValueError, match="normal_type is 'analytic'; expected one of pred or null"):
        check_normal_type("analytic", ("pred",))
