"""The network that learns where to sample: what it gives, when it learns, how it goes on."""

import pytest
import torch
from threestudio.models.proposal_network import ProposalNetwork

BOX = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
NETWORK = {
    "n_input_dims": 3,
    "n_output_dims": 1,
    "encoding_config": {"otype": "Frequency", "n_frequencies": 2},
    "network_config": {"otype": "VanillaMLP", "n_neurons": 8, "n_hidden_layers": 1},
}
OPTIMIZER = {"name": "Adam", "args": {"lr": 0.01, "betas": [0.9, 0.99]}}
HALVES = {"name": "ExponentialLR", "args": {"gamma": 0.5}}


def build(unbounded=False, scheduler=None, optimizer=OPTIMIZER, **changes):
    return ProposalNetwork(BOX, unbounded, {**NETWORK, **changes}, optimizer, scheduler)


def points(n=20, scale=0.9):
    drawn = torch.rand((n, 3), generator=torch.Generator().manual_seed(0))
    return (drawn * 2 - 1) * scale


def learn(network, step, target=3.0):
    network.update_step(0, step)
    loss = (network.density(points()) - target).square().mean()
    network.learn(loss)
    return loss.item()


def test_density_is_the_shifted_exponential_inside_and_nothing_outside():
    network = build()
    inside = points()
    raw = network.network(network.encoding((inside + 1) / 2))[:, 0]
    assert torch.allclose(network.density(inside), torch.exp(raw - 1), rtol=1e-5)
    outside = torch.tensor([[1.1, 0.0, 0.0], [0.0, 0.0, -7.0]])
    assert not network.density(outside).any()
    assert (build(unbounded=True).density(outside) > 0).all()


def test_it_learns_often_at_first_and_every_sixth_step_later():
    network = build()
    due = []
    for step in range(2000):
        network.update_step(0, step)
        due.append(network.is_due)
    assert all(due[:200]) and due[1000:].count(True) == len(range(1002, 2000, 6))
    network.eval()
    network.update_step(0, 0)
    assert not network.is_due


def test_learning_lowers_the_loss_and_leaves_no_gradient():
    network = build()
    losses = [learn(network, step) for step in range(40)]
    assert losses[-1] < losses[0] / 4
    assert all(parameter.grad is None for parameter in network.parameters())


def test_the_rate_advances_once_in_a_step():
    network = build(scheduler=HALVES)
    rates = []
    for step in (0, 0, 1, 1, 4):
        learn(network, step)
        rates.append(network.optimizer_state()["optimizer"]["param_groups"][0]["lr"])
    assert rates == [0.01, 0.01, 0.005, 0.005, 0.0025]


@pytest.mark.parametrize("scheduler", [None, HALVES])
def test_it_goes_on_to_the_same_bits(scheduler):
    whole, first = build(scheduler=scheduler), build(scheduler=scheduler)
    for step in range(6):
        learn(whole, step)
    for step in range(3):
        learn(first, step)
    second = build(scheduler=scheduler)
    second.load_state_dict(first.state_dict())
    second.load_optimizer_state(first.optimizer_state())
    assert second.optimizer_state()["learnt_step"] == 2, "it may be saved before it learns"
    for step in range(3, 6):
        learn(second, step)
    for mine, theirs in zip(second.parameters(), whole.parameters()):
        assert torch.equal(mine, theirs)


def test_a_gradient_that_is_not_finite_counts_as_zero():
    network = build()
    before = [parameter.clone() for parameter in network.parameters()]
    learn(network, 0, target=float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))
    learn(network, 1)
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_one_part_that_is_not_finite_stops_all_parts():
    network = build(optimizer={"name": "SGD", "args": {"lr": 1.0}})
    before = [parameter.clone() for parameter in network.parameters()]
    first, *others = (p for p in network.parameters() if p.numel() > 0)
    network.learn(first.sum() * float("inf") + sum(other.sum() for other in others))
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters()))


def test_all_ranks_learn_the_mean(tmp_path):
    """A group of one process; what several do is `all_reduce`, which torch tests."""
    alone, grouped = build(), build()
    learn(alone, 0)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        learn(grouped, 0)
        grouped.learn(None)
    finally:
        torch.distributed.destroy_process_group()
    alone.learn(None)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), grouped.parameters()))


def test_refusals():
    with pytest.raises(ValueError, match="'proposal' and proposal_network_config is empty; expec"):
        ProposalNetwork(BOX, False, None, OPTIMIZER)
    with pytest.raises(ValueError, match="'proposal' and prop_optimizer_config is empty; expected"):
        build(optimizer=None)
    with pytest.raises(ValueError, match="has 'encoding'; expected .* Did you mean 'encoding_conf"):
        build(encoding={})
    with pytest.raises(ValueError, match="proposal_network_config.n_output_dims is 4; expected 1"):
        build(n_output_dims=4)
    with pytest.raises(ValueError, match="proposal_network_config has no network_config; expected"):
        build(network_config=None)
