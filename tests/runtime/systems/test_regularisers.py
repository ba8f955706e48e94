"""Regularisers against loops over rays and samples."""

import math

import pytest
import torch
from threestudio.systems.regularisers import (
    eikonal_loss,
    opaque_loss,
    orientation_loss,
    sparsity_loss,
    z_variance_loss,
)

OPACITY = torch.tensor([0.0, 0.2, 0.5, 0.75, 1.0, 0.9]).view(1, 2, 3, 1)


def test_sparsity_by_loop():
    values = [math.sqrt(o * o + 0.01) for o in OPACITY.flatten().tolist()]
    assert float(sparsity_loss(OPACITY)) == pytest.approx(sum(values) / 6)


def test_opaque_by_loop():
    values = []
    for opacity in OPACITY.flatten().tolist():
        o = min(max(opacity, 1e-3), 1 - 1e-3)
        values.append(-(o * math.log(o) + (1 - o) * math.log(1 - o)))
    assert float(opaque_loss(OPACITY)) == pytest.approx(sum(values) / 6)
    undecided = torch.full((1, 1, 1, 1), 0.5, requires_grad=True)
    assert opaque_loss(undecided) > opaque_loss(OPACITY)


def test_depth_variance_by_loop():
    variance = torch.arange(6.0).view(1, 2, 3, 1)
    kept = [v for v, o in zip(variance.flatten(), OPACITY.flatten()) if o > 0.5]
    assert float(z_variance_loss(variance, OPACITY)) == pytest.approx(float(sum(kept)) / len(kept))
    assert float(z_variance_loss(variance, torch.zeros_like(OPACITY))) == 0


def test_orientation_by_loop_with_constant_weights():
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(9, 1, generator=g).requires_grad_()
    normals, directions = (
        torch.nn.functional.normalize(torch.randn(9, 3, generator=g), dim=-1) for _ in range(2)
    )
    normals.requires_grad_()
    total = 0.0
    for weight, normal, direction in zip(weights, normals, directions):
        total += float(weight) * max(0.0, float(normal @ direction)) ** 2
    loss = orientation_loss(weights, normals, directions, OPACITY)
    assert float(loss) == pytest.approx(total / 5), "five of six rays hit something"
    loss.backward()
    assert weights.grad is None and normals.grad.abs().sum() > 0
    facing = orientation_loss(weights, -directions, directions, OPACITY)
    assert float(facing) == 0


def test_eikonal_by_loop():
    gradients = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0], [0.5, 0.0, 0.0]])
    assert float(eikonal_loss(gradients)) == pytest.approx((4.0**2 + 0 + 0.5**2) / 3)


def test_padding_does_not_count_in_the_eikonal_mean():
    gradients = torch.tensor([[5.0, 0, 0], [0, 1.0, 0], [9.0, 9, 9], [0.5, 0, 0]])
    padding = torch.tensor([[False], [False], [True], [False]])
    kept = eikonal_loss(gradients[[0, 1, 3]])
    assert float(eikonal_loss(gradients, padding)) == pytest.approx(float(kept))
    assert float(eikonal_loss(gradients, torch.ones_like(padding))) == 0.0
