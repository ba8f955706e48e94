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


class Model(nn.Module):
    def __init__(self, strict=False):
        super().__init__()
        self.strict_optimizer_groups = strict
        self.geometry = nn.Module()
        self.geometry.encoding = nn.Linear(2, 3)
        self.geometry.scale = nn.Parameter(torch.ones(1))
        self.background = nn.Linear(1, 1)
        self.note = "text"


def config(params=None, name="Adam", **args):
    return OmegaConf.create({"name": name, "args": {"lr": 0.01, **args}, "params": params})


ALL = {"geometry.encoding": {"lr": 0.1}, "geometry.scale": {}, "background": {"lr": 0.2}}


def test_paths_reach_modules_parameters_and_nothing():
    model = Model()
    assert getattr_recursive(model, "geometry.scale") is model.geometry.scale
    assert len(get_parameters(model, "geometry.encoding")) == 2
    assert get_parameters(model, "geometry.scale") == [model.geometry.scale]
    assert get_parameters(model, "note") == []
    with pytest.raises(ValueError, match=r"names 'geometry.encodin'.*geometry\.encoding"):
        get_parameters(model, "geometry.encodin")


def test_groups_carry_name_and_learning_rate():
    optimizer = parse_optimizer(config(ALL), Model(strict=True))
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("geometry.encoding", 0.1), ("geometry.scale", 0.01), ("background", 0.2)]


def test_without_params_everything_trains():
    optimizer = parse_optimizer(config(), Model())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5


def test_lists_become_tuples_that_checkpoints_can_hold():
    optimizer = parse_optimizer(config(betas=[0.5, 0.9]), Model())
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    groups = {**ALL, "background": {"betas": [0.1, 0.2]}}
    optimizer = parse_optimizer(config(groups, name="NAdam"), Model())
    assert optimizer.param_groups[2]["betas"] == (0.1, 0.2)
    assert type(optimizer.param_groups[2]["betas"]) is tuple


@pytest.mark.parametrize("name, args, fused", [
    ("Adam", {}, True), ("AdamW", {}, True), ("Adam", {"fused": False}, False),
    ("Adam", {"foreach": True}, None), ("SGD", {}, None)])
def test_adam_is_fused_unless_told_otherwise(name, args, fused):
    optimizer = parse_optimizer(config(name=name, **args), Model())
    assert optimizer.defaults["fused"] is fused or not fused and not optimizer.defaults["fused"]


def test_fused_and_plain_adam_agree():
    models = [Model(), Model()]
    models[1].load_state_dict(models[0].state_dict())
    for model, args in zip(models, ({}, {"fused": False})):
        optimizer = parse_optimizer(config(**args), model)
        for _ in range(5):
            optimizer.zero_grad()
            model.geometry.encoding(torch.ones(1, 2)).square().sum().backward()
            optimizer.step()
    # Same formula, another order of operations: a few units in the last place.
    assert torch.allclose(models[0].geometry.encoding.weight, models[1].geometry.encoding.weight,
                          rtol=1e-5, atol=1e-7)


def test_bundled_and_missing_optimizers(caplog):
    assert isinstance(parse_optimizer(config(name="Adan"), Model()), Adan)
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        optimizer = parse_optimizer(config(name="FusedAdam"), Model())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["weight_decay"] == 0
    assert "apex is not installed" in caplog.text
    with pytest.raises(ValueError, match=r"'Adamw'; expected .* Did you mean 'AdamW'"):
        parse_optimizer(config(name="Adamw"), Model())
    with pytest.raises(ValueError, match=r"optimizer\.args .* do not fit SGD"):
        parse_optimizer(config(name="SGD", betas=[0, 1]), Model())


def test_strict_systems_train_everything_or_stop():
    with pytest.raises(ValueError, match=r"background\.weight, background\.bias require a grad"):
        parse_optimizer(config({"geometry": {}}), Model(strict=True))
    model = Model(strict=True)
    model.background.requires_grad_(False)
    with pytest.raises(ValueError, match=r"lists 'background', which has no parameter"):
        parse_optimizer(config(ALL), model)
    with pytest.raises(ValueError, match=r"lists 'note', which has no parameter"):
        parse_optimizer(config({**ALL, "note": {}}), Model(strict=True))


class Prior:
    """A guidance that is no module."""

    def __init__(self, **trained):
        self.trained = trained

    def trainable_parameters(self):
        return self.trained


def test_a_strict_system_trains_what_its_guidances_state_under_their_own_name():
    model = Model(strict=True)
    model.guidance = model.guidance_multi_view = Prior()
    model.guidance_single_view = nn.Linear(1, 1)
    model.guidance_single_view.trainable_parameters = lambda: dict(
        model.guidance_single_view.named_parameters()
    )
    # The trap: `guidance` is the multi-view prior wherever there is one.
    with pytest.raises(ValueError, match=r"'guidance' is a Prior; the guidance that trains is "
                                         r"'guidance_single_view'"):
        parse_optimizer(config({**ALL, "guidance": {}}), model)
    with pytest.raises(ValueError, match=r"guidance_single_view\.weight, guidance_single_view"):
        parse_optimizer(config(ALL), model)
    optimizer = parse_optimizer(config({**ALL, "guidance_single_view": {"lr": 1e-4}}), model)
    assert optimizer.param_groups[3]["params"] == list(model.guidance_single_view.parameters())
    del model.guidance_single_view
    model.guidance_single_view = Prior()
    with pytest.raises(ValueError, match=r"'guidance_single_view' is a Prior; no guidance trains"):
        parse_optimizer(config({**ALL, "guidance_single_view": {}}), model)


def test_parameters_hidden_in_a_plain_guidance_are_found_once(caplog):
    model = Model(strict=True)
    model.guidance_video = model.guidance = Prior(scale=nn.Parameter(torch.ones(1)))
    with pytest.raises(ValueError, match=r"^guidance_video\.scale require a gradient but"):
        parse_optimizer(config(ALL), model)
    model.strict_optimizer_groups = False
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        parse_optimizer(config(ALL), model)
    assert "not trained: guidance_video.scale" in caplog.text


def test_foreign_systems_get_a_line(caplog):
    model = Model()
    model.background.requires_grad_(False)
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        optimizer = parse_optimizer(config({"geometry.encoding": {}, "background": {}}), model)
    assert [group["name"] for group in optimizer.param_groups] == ["geometry.encoding"]
    assert "group background has nothing to train and is dropped" in caplog.text
    assert "not trained: geometry.scale" in caplog.text


def test_overlap_and_nothing_to_train():
    with pytest.raises(ValueError, match=r"lists 'geometry.scale' and 'geometry', which share"):
        parse_optimizer(config({"geometry": {}, "geometry.scale": {}}), Model())
    with pytest.raises(ValueError, match=r"nothing to train"):
        parse_optimizer(config({"note": {}}), Model())


def scheduled(cfg, n_steps, instance=False):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = (parse_scheduler_to_instance(cfg, optimizer) if instance
                 else parse_scheduler(cfg, optimizer)["scheduler"])
    rates = []
    for _ in range(n_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_plain_sequential_and_chained_schedules_by_hand():
    exponential = {"name": "ExponentialLR", "args": {"gamma": 0.5}, "x": 3}
    constant = {"name": "ConstantLR", "args": {"factor": 0.1, "total_iters": 100}}
    assert scheduled(OmegaConf.create(exponential), 3) == [1.0, 0.5, 0.25]
    sequential = {"name": "SequentialLR", "interval": "step", "milestones": [2],
                  "schedulers": [constant, exponential]}
    assert scheduled(OmegaConf.create(sequential), 4) == pytest.approx([0.1, 0.1, 1.0, 0.5])
    chained = {"name": "ChainedScheduler", "schedulers": [constant, exponential]}
    assert scheduled(OmegaConf.create(chained), 3) == pytest.approx([0.1, 0.05, 0.025])
    sequential["name"] = "Sequential"
    assert scheduled(OmegaConf.create(sequential), 3, True) == pytest.approx([0.1, 0.1, 1.0])


def test_interval_and_unknown_names():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    step = {"name": "ExponentialLR", "args": {"gamma": 0.5}}
    assert parse_scheduler(step, optimizer)["interval"] == "epoch"
    assert parse_scheduler({**step, "interval": "step"}, optimizer)["interval"] == "step"
    with pytest.raises(ValueError, match=r"interval is 'batch'; expected 'epoch' or 'step'"):
        parse_scheduler({**step, "interval": "batch"}, optimizer)
    with pytest.raises(ValueError, match=r"'ExponentialLr'; .* Did you mean 'ExponentialLR'"):
        parse_scheduler({"name": "ExponentialLr"}, optimizer)
