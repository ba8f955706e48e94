"""Base classes: order of construction, recursion of the step, weights of a module."""

from dataclasses import dataclass

import pytest
import torch
from threestudio.utils.base import (
    BaseModule,
    BaseObject,
    Configurable,
    Updateable,
    update_end_if_possible,
    update_if_possible,
)
from threestudio.utils.checkpoint import save_checkpoint


class Recorder(Updateable):
    """Writes its name into a shared list when it is updated."""

    def __init__(self, name, log):
        self.name, self._log = name, log

    def update_step(self, epoch, global_step, on_load_weights=False):
        self._log.append((self.name, epoch, global_step, on_load_weights))

    def update_step_end(self, epoch, global_step):
        self._log.append((self.name, "end"))


def tree(log):
    root = Recorder("root", log)
    root.child = Recorder("child", log)
    root.child.grandchild = Recorder("grandchild", log)
    root._private = Recorder("private", log)
    root.in_a_list = [Recorder("listed", log)]
    return root


def test_children_are_updated_before_their_parent_and_hidden_ones_never():
    log = []
    tree(log).do_update_step(1, 20)
    assert log == [
        ("grandchild", 1, 20, False),
        ("child", 1, 20, False),
        ("root", 1, 20, False),
    ]


def test_loading_weights_is_told_to_every_part():
    log = []
    tree(log).do_update_step(0, 5, on_load_weights=True)
    assert [entry[3] for entry in log] == [True, True, True]


def test_the_end_of_a_step_takes_the_same_way():
    log = []
    tree(log).do_update_step_end(0, 0)
    assert log == [("grandchild", "end"), ("child", "end"), ("root", "end")]


def test_a_child_with_two_names_is_updated_twice():
    log = []
    root = Recorder("root", log)
    root.a = root.b = Recorder("shared", log)
    root.do_update_step(0, 0)
    assert [entry[0] for entry in log] == ["shared", "shared", "root"]


class WithProperties(Updateable):
    """One property that gives an updateable child, one that fails."""

    def __init__(self, log):
        self._child = Recorder("behind a property", log)

    @property
    def child(self):
        return self._child

    @property
    def broken(self):
        raise RuntimeError("never set")


def test_properties_are_followed_and_failing_ones_passed_over():
    log = []
    WithProperties(log).do_update_step(0, 3)
    assert log == [("behind a property", 0, 3, False)]


class Module(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        size: int = 2

    cfg: Config

    def configure(self, extra=0):
        self.seen = (self.cfg.size, self.device, extra)
        self.layer = torch.nn.Linear(self.cfg.size, 1, bias=False)
        self.steps = []

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.steps.append((epoch, global_step, on_load_weights))


def test_modules_of_a_torch_module_are_reached():
    root = Module()
    root.part = Module()
    root.sequence = torch.nn.Sequential(Module())
    root.do_update_step(0, 1)
    assert root.steps == [(0, 1, False)]
    assert root.part.steps == [(0, 1, False)]
    assert root.sequence[0].steps == []  # a plain module hides its children


def test_module_is_configured_after_cfg_and_device_are_set():
    module = Module({"size": 3}, extra=5)
    assert module.seen == (3, module.device, 5)
    assert "_dummy" in dict(module.named_buffers())
    assert set(module.state_dict()) == {"layer.weight"}


def test_module_weights_are_loaded_strictly_and_announced(tmp_path):
    folder = tmp_path / "a:b"  # a colon in the path itself
    folder.mkdir()
    weight = torch.tensor([[1.0, 2.0]])
    payload = {"state_dict": {"geometry.layer.weight": weight}, "epoch": 1, "global_step": 40}
    save_checkpoint(folder / "x.ckpt", payload)
    module = Module({"weights": f"{folder}/x.ckpt:geometry"})
    assert torch.equal(module.layer.weight, weight)
    assert module.steps == [(1, 40, True)]
    with pytest.raises(RuntimeError, match="size mismatch"):
        Module({"size": 3, "weights": f"{folder}/x.ckpt:geometry"})


@pytest.mark.parametrize("weights", ["x.ckpt", ":geometry", "x.ckpt:"])
def test_malformed_weights_are_refused(weights):
    with pytest.raises(ValueError, match="expected 'path:module_name'"):
        Module({"weights": weights})


class Thing(BaseObject):
    @dataclass
    class Config(BaseObject.Config):
        scale: float = 1.0

    cfg: Config

    def configure(self, *parts):
        self.parts = parts


def test_object_is_configured_and_is_no_module():
    thing = Thing({"scale": "0.5"}, "a", "b")
    assert thing.cfg.scale == 0.5 and thing.parts == ("a", "b")
    assert thing.device == Module().device
    assert not isinstance(thing, torch.nn.Module)


def test_objects_without_a_cfg_take_the_defaults():
    assert Thing().cfg.scale == 1.0
    assert Configurable().cfg == {}


def test_whatever_is_not_updateable_is_passed_over():
    log = []
    update_if_possible(object(), 0, 0)
    update_end_if_possible(None, 0, 0)
    update_if_possible(Recorder("a", log), 0, 7)
    update_end_if_possible(Recorder("a", log), 0, 7)
    assert log == [("a", 0, 7, False), ("a", "end")]
