"""The grammar of optimizers and schedulers: section 3.4."""

import math

import pytest
import torch
from omegaconf import OmegaConf
from threestudio.systems.optimizers import Adan
from threestudio.systems.utils import (
    get_parameters,
    getattr_recursive,
    parse_optimizer,
    parse_scheduler,
    parse_scheduler_to_instance,
)
from torch import nn


class Holder(nn.Module):
    """A wrapper as the contract nests encodings: composite, otype, grid."""

    def __init__(self, inner):
        super().__init__()
        self.encoding = inner


class System(nn.Module):
    def __init__(self):
        super().__init__()
        self.geometry = Holder(Holder(nn.Linear(2, 2)))
        self.geometry.network = nn.Linear(2, 1)
        self.background = nn.Linear(3, 3)
        self.color = nn.Parameter(torch.zeros(3))
        self.text = "no module"


@pytest.fixture
def system():
    return System()


def adam(**params):
    return OmegaConf.create({"name": "Adam", "args": {"lr": 0.01, "betas": [0.9, 0.99],
                                                      "eps": 1e-15}, "params": params})  # fmt: skip


def test_paths_lead_through_attributes(system):
    inner = system.geometry.encoding.encoding
    assert getattr_recursive(system, "geometry.encoding.encoding") is inner
    assert getattr_recursive(system, "geometry.encoding.encoding.weight") is inner.weight


@pytest.mark.parametrize(
    ("path", "shapes"),
    [
        ("geometry.encoding.encoding", [(2, 2), (2,)]),
        ("geometry", [(2, 2), (2,), (1, 2), (1,)]),
        ("geometry.encoding.encoding.bias", [(2,)]),
        ("color", [(3,)]),
        ("text", []),
    ],
)
def test_parameters_of_a_path(system, path, shapes):
    assert [tuple(p.shape) for p in get_parameters(system, path)] == shapes


def test_groups_carry_their_path_and_unlisted_parameters_rest(system):
    entries = {"geometry.encoding.encoding": {"lr": 0.1}, "color": {"lr": 0.2}, "background": {}}
    optimizer = parse_optimizer(adam(**entries), system)
    assert [group["name"] for group in optimizer.param_groups] == list(entries)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.01]
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    assert optimizer.param_groups[0]["eps"] == 1e-15
    before = system.geometry.network.weight.clone()
    for parameter in system.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(system.geometry.network.weight, before)
    assert torch.allclose(system.color, torch.full((3,), -0.2))  # Adam's first step is lr long


def test_without_groups_everything_is_trained(system):
    optimizer = parse_optimizer({"name": "SGD", "args": {"lr": 0.5}}, system)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in system.parameters()}


@pytest.mark.parametrize(
    "name",
    ["Adam", "AdamW", "SGD", "RAdam", "NAdam", "Adamax", "RMSprop", "Adan", "FusedAdam"],
)
def test_every_optimizer_takes_plain_arguments_that_checkpoints_can_hold(name, system, tmp_path):
    args = {"lr": 0.01}
    if name == "Adan":
        args["betas"] = [0.98, 0.92, 0.99]
    elif name not in ("SGD", "RMSprop"):
        args["betas"] = [0.9, 0.99]
    cfg = OmegaConf.create({"name": name, "args": args, "params": {"color": {"lr": 0.1}}})
    optimizer = parse_optimizer(cfg, system)
    system.color.grad = torch.ones(3)
    optimizer.step()
    assert (system.color < 0).all()
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    assert state["param_groups"][0]["name"] == "color"
    assert "betas" not in args or state["param_groups"][0]["betas"] == tuple(args["betas"])


def test_wrong_names_are_refused(system):
    with pytest.raises(Exception, match="Adamm"):
        parse_optimizer({"name": "Adamm", "args": {"lr": 1}}, system)
    with pytest.raises(Exception, match="encodin"):
        parse_optimizer(adam(**{"geometry.encodin": {"lr": 1}}), system)


def test_two_steps_of_adan_by_hand():
    """theta - lr (m' + b2 v') / (sqrt(n') + eps), n of (g + b2 (g - g_before))^2, unbiased."""
    theta = nn.Parameter(torch.tensor([1.0]))
    optimizer = Adan([theta], lr=0.1, betas=(0.98, 0.92, 0.99), eps=0.0)
    b1, b2, b3 = 0.98, 0.92, 0.99
    m = v = n = 0.0
    expected, before = 1.0, None
    for step, gradient in enumerate((2.0, -1.0), start=1):
        theta.grad = torch.tensor([gradient])
        optimizer.step()
        change = 0.0 if before is None else gradient - before
        m = b1 * m + (1 - b1) * gradient
        v = b2 * v + (1 - b2) * change
        n = b3 * n + (1 - b3) * (gradient + b2 * change) ** 2
        first, second, third = (1 - b**step for b in (b1, b2, b3))
        expected -= 0.1 * (m / first + b2 * v / second) / math.sqrt(n / third)
        before = gradient
        assert theta.item() == pytest.approx(expected, rel=1e-5)


def rates(scheduler, optimizer, steps):
    made = []
    for _ in range(steps):
        made.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return made


@pytest.fixture
def optimizer():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


LINEAR = {"name": "LinearLR", "interval": "step",
          "args": {"start_factor": 0.5, "total_iters": 2}}  # fmt: skip
DECAY = {"name": "ExponentialLR", "interval": "step", "args": {"gamma": 0.1}}


def test_a_scheduler_by_its_name(optimizer):
    made = parse_scheduler(OmegaConf.create(DECAY), optimizer)
    assert made["interval"] == "step"
    assert rates(made["scheduler"], optimizer, 3) == pytest.approx([1.0, 0.1, 0.01])


def test_the_interval_is_the_epoch_by_default(optimizer):
    cfg = {"name": "StepLR", "args": {"step_size": 1}}
    assert parse_scheduler(cfg, optimizer)["interval"] == "epoch"


def test_sequential_takes_over_at_its_milestones(optimizer):
    cfg = {
        "name": "SequentialLR", "interval": "step", "milestones": [2],
        "schedulers": [LINEAR, DECAY], "warmup": 2,
    }  # fmt: skip
    made = parse_scheduler(OmegaConf.create(cfg), optimizer)
    # LinearLR from a half in two steps, then the decay from the base rate.
    assert rates(made["scheduler"], optimizer, 4) == pytest.approx([0.5, 0.75, 1.0, 0.1])


def test_chained_schedulers_multiply(optimizer):
    cfg = {"name": "ChainedScheduler", "interval": "step", "schedulers": [LINEAR, DECAY]}
    made = parse_scheduler(OmegaConf.create(cfg), optimizer)
    assert rates(made["scheduler"], optimizer, 3) == pytest.approx([0.5, 0.075, 0.01])


def test_values_that_serve_interpolation_only_are_ignored(optimizer):
    cfg = OmegaConf.create({**DECAY, "n_steps": 100})
    assert rates(parse_scheduler(cfg, optimizer)["scheduler"], optimizer, 2) == [1.0, 0.1]


def test_an_instance_spells_the_sequence_without_lr(optimizer):
    cfg = {"name": "Sequential", "milestones": [1], "schedulers": [LINEAR, DECAY]}
    made = parse_scheduler_to_instance(OmegaConf.create(cfg), optimizer)
    assert isinstance(made, torch.optim.lr_scheduler.SequentialLR)
    assert rates(made, optimizer, 3) == pytest.approx([0.5, 1.0, 0.1])
    plain = parse_scheduler_to_instance(OmegaConf.create(DECAY), optimizer)
    assert isinstance(plain, torch.optim.lr_scheduler.ExponentialLR)
