"""Muon's update by singular values and by hand."""

import pytest
import torch

from custom.fourd.scripts.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_orthogonalising_keeps_singular_vectors_and_evens_their_values(shape):
    g = torch.Generator().manual_seed(0)
    rank = min(shape)
    u, _ = torch.linalg.qr(torch.randn(shape[0], rank, generator=g))
    v, _ = torch.linalg.qr(torch.randn(shape[1], rank, generator=g))
    matrix = u @ torch.diag(torch.linspace(1.0, 0.3, rank)) @ v.T
    core = u.T @ orthogonalise(matrix[None])[0] @ v
    values = core.diagonal()
    assert (core - torch.diag(values)).abs().max() < 1e-4
    assert (values - 1).abs().max() < 0.35


def test_a_step_by_hand():
    g = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(3, 2, 2, generator=g))
    before, gradient = weight.detach().clone(), torch.randn(3, 2, 2, generator=g)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    weight.grad = gradient.clone()
    optimizer.step()
    momentum = 0.1 * gradient
    direction = (0.1 * gradient + 0.9 * momentum).view(1, 3, 4)
    update = orthogonalise(direction)[0] * 0.2 * 2.0
    expected = before * (1 - 0.1 * 0.5) - 0.1 * update.view(3, 2, 2)
    torch.testing.assert_close(weight.detach(), expected)


def test_parameters_without_gradient_stay():
    still, moving = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    moving.grad = torch.eye(2)
    Muon([still, moving], lr=0.1).step()
    assert torch.equal(still, torch.ones(2, 2)) and not torch.equal(moving, torch.ones(2, 2))
