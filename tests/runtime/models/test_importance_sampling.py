"""Sampling by a density: the inverse of a distribution, the bound that a proposal must keep."""

import numpy as np
import pytest
import torch
from threestudio.models.estimators import ImportanceEstimator
from threestudio.models.importance_sampling import (
    ProposalEstimator,
    interlevel_loss,
    interval_weights,
    quantile_edges,
    spread,
)


def draws(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def ascending(seed, n_rays, n_edges):
    """Edges from 0 to 1."""
    inner = draws(seed, n_rays, n_edges - 2).sort(dim=-1).values
    return torch.cat([torch.zeros(n_rays, 1), inner, torch.ones(n_rays, 1)], dim=-1)


def test_weights_by_hand():
    # Two intervals that each let half of the light through, then a wall.
    sigmas = torch.tensor([[np.log(2.0), np.log(2.0) / 2, 1e9]], dtype=torch.float32)
    starts, ends = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[1.0, 3.0, 4.0]])
    assert torch.allclose(
        interval_weights(sigmas, starts, ends), torch.tensor([[0.5, 0.25, 0.25]]), atol=1e-6
    )


def test_spreading_by_hand():
    weights = torch.tensor([[0.0, 0.0, 0.8, 0.2, 0.0]])
    assert torch.allclose(spread(weights), torch.tensor([[0.0, 0.4, 0.8, 0.5, 0.1]]))
    assert torch.equal(spread(torch.full((1, 3), 0.5)), torch.full((1, 3), 0.5))


class TestQuantiles:
    def test_against_numpy(self):
        edges, weights, wanted = ascending(0, 5, 9), draws(1, 5, 8), draws(2, 5, 30).sort(-1).values
        weights[2] = 0.0  # an empty ray
        found = quantile_edges(edges, weights, wanted)
        for ray in range(5):
            share = weights[ray].double().numpy() + 0.01 / 8
            cdf = np.concatenate([[0.0], np.cumsum(share) / share.sum()])
            expected = np.interp(wanted[ray].numpy(), cdf, edges[ray].numpy())
            assert np.allclose(found[ray].numpy(), expected, atol=1e-5)
        assert torch.allclose(
            found[2],
            torch.from_numpy(
                np.interp(wanted[2].numpy(), np.linspace(0, 1, 9), edges[2].numpy())
            ).float(),
            atol=1e-5,
        )

    def test_where_the_weight_is_the_samples_are(self):
        weights = torch.zeros(1, 10)
        weights[0, 3] = 1.0
        edges = torch.linspace(0, 1, 11)[None]
        found = quantile_edges(edges, weights, torch.linspace(0.0, 1.0, 101)[None])
        assert ((found >= 0.3) & (found <= 0.4)).sum() >= 99
        assert found[0, 0] == 0.0 and found[0, -1] == 1.0
        assert (found.diff() >= 0).all()


def interlevel_by_loop(edges, weights, proposal_edges, proposal_weights):
    """The published sum, interval by interval, in double precision."""
    total = 0.0
    for ray in range(len(edges)):
        for i, weight in enumerate(weights[ray].double()):
            bound = sum(
                w
                for w, start, end in zip(
                    proposal_weights[ray].double(),
                    proposal_edges[ray, :-1],
                    proposal_edges[ray, 1:],
                )
                if start < edges[ray, i + 1] and end > edges[ray, i]
            )
            total += max(0.0, float(weight - bound)) ** 2 / float(weight)
    return total / len(edges)


class TestInterlevelLoss:
    def arguments(self):
        return ascending(3, 4, 8), draws(4, 4, 7) + 0.01, ascending(5, 4, 6), draws(6, 4, 5) * 0.4

    def test_against_a_loop(self):
        arguments = self.arguments()
        expected = interlevel_by_loop(*arguments)
        assert expected > 0.01
        assert interlevel_loss(*arguments).item() == pytest.approx(expected, rel=1e-4)

    def test_a_bound_that_holds_costs_nothing(self):
        edges, weights, *_ = self.arguments()
        assert interlevel_loss(edges, weights, edges, weights).item() < 1e-10
        whole = torch.tensor([[0.0, 1.0]]).expand(4, 2)
        assert interlevel_loss(edges, weights, whole, weights.sum(-1, keepdim=True)).item() < 1e-10

    def test_only_the_proposal_moves_and_only_upwards(self):
        edges, weights, proposal_edges, proposal = self.arguments()
        weights.requires_grad_(), proposal.requires_grad_()
        interlevel_loss(edges, weights, proposal_edges, proposal).backward()
        assert weights.grad is None and (proposal.grad <= 0).all() and (proposal.grad < 0).any()


def wall(starts, ends):
    """Something between the distances 2 and 2.2."""
    middles = (starts + ends) / 2
    return 20.0 * ((middles > 2.0) & (middles < 2.2)).float()


class TestSampling:
    def test_both_levels_are_rendered(self):
        starts, ends = ImportanceEstimator().sampling([wall], [30], 40, 2, 1.0, 4.0)
        assert starts.shape == ends.shape == (2, 70)
        assert torch.equal(starts[:, 1:], ends[:, :-1]) and (ends >= starts).all()
        assert (starts[:, 0] == 1.0).all() and (ends[:, -1] == 4.0).all()
        inside = (starts > 1.95) & (ends < 2.25)
        # Of the widened weights 0.73 are in the wall's two intervals.
        assert (inside.sum(dim=-1) >= 28).all(), "the second level is where the wall is"
        even = torch.linspace(1.0, 4.0, 31)
        assert all((starts[0] - edge).abs().min() < 1e-5 for edge in even[:-1])

    def test_a_proposal_is_not_rendered(self):
        starts, ends = ProposalEstimator().sampling([wall], [30], 40, 2, 1.0, 4.0)
        assert starts.shape == (2, 40) and (starts >= 1.0).all() and (ends <= 4.0).all()
        assert ((starts > 1.95) & (ends < 2.25)).sum() >= 2 * 27
        assert (ends - starts).max() < 1.0, "no sample stands for all the empty space"

    def test_two_levels_find_what_is_thin(self):
        calls = []

        def asked(starts, ends):
            calls.append(starts.shape[-1])
            return wall(starts, ends)

        starts, _ = ImportanceEstimator().sampling([asked, asked], [30, 20], 10, 1, 1.0, 4.0)
        assert calls == [30, 20] and starts.shape == (1, 30)

    def test_planes_of_each_ray_and_inverse_distance(self):
        near, far = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 8.0])
        starts, ends = ProposalEstimator().sampling(
            [lambda s, e: torch.zeros_like(s)], [6], 3, 2, near, far, sampling_type="lindisp"
        )
        inverse = torch.cat([1 / starts, 1 / ends[:, -1:]], dim=-1)
        expected = torch.stack([torch.linspace(1, 1 / 2, 4), torch.linspace(1 / 2, 1 / 8, 4)])
        assert torch.allclose(inverse, expected, atol=1e-6)

    def test_jitter_moves_samples_evenly_and_keeps_the_ends(self):
        n = 1000
        jitter = (torch.arange(n) + 0.5) / n
        starts, ends = ImportanceEstimator().sampling(
            [lambda s, e: torch.zeros_like(s)], [4], 1, n, 0.0, 1.0, stratified=True, jitter=jitter
        )
        assert (starts[:, 0] == 0).all() and (ends[:, -1] == 1).all() and (ends >= starts).all()
        # Taken together the middles are as dense everywhere: no part of the way is preferred.
        middles = (starts + ends)[:, 1:-1] / 2
        counts = torch.histc(middles, bins=4, min=0.25, max=0.75)
        assert counts.max() < 1.3 * counts.min() and middles.std(dim=0).min() > 0.03

    def test_without_a_jitter_the_global_generator_draws(self):
        def edges():
            torch.manual_seed(3)
            return ImportanceEstimator().sampling([wall], [5], 5, 3, 1.0, 4.0, stratified=True)[0]

        with torch.random.fork_rng(devices=[]):
            first = edges()
            assert torch.equal(first, edges()) and first.std(dim=0).max() > 0

    def test_what_is_kept_for_learning(self):
        scale = torch.tensor(0.1, requires_grad=True)
        estimator = ProposalEstimator()
        estimator.sampling([lambda s, e: wall(s, e) * scale], [30], 10, 2, 1.0, 4.0)
        assert estimator.loss(torch.ones(20)) is None
        starts, ends = estimator.sampling(
            [lambda s, e: wall(s, e) * scale], [30], 10, 2, 1.0, 4.0, requires_grad=True
        )
        loss = estimator.loss(interval_weights(wall(starts, ends), starts, ends).reshape(-1))
        loss.backward()
        assert scale.grad < 0, "a thin proposal has to grow"
        assert estimator.loss(torch.ones(20)) is None, "it is forgotten"


def test_refusals():
    estimator = ImportanceEstimator()
    with pytest.raises(ValueError, match="sampling_type is 'log'; expected 'uniform' or 'lindisp'"):
        estimator.sampling([wall], [3], 3, 1, 1.0, 4.0, sampling_type="log")
    with pytest.raises(ValueError, match=r"1 densities and prop_samples is \[3, 4\]; expected"):
        estimator.sampling([wall], [3, 4], 3, 1, 1.0, 4.0)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 1\); expected \(2, 3\), one number per"):
        estimator.sampling([lambda s, e: wall(s, e)[..., None]], [3], 3, 2, 1.0, 4.0)
