"""Updateable, BaseObject and BaseModule: section 1.3."""

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
from threestudio.utils.misc import get_device


class Recorder(Updateable):
    """Writes down every visit."""

    def __init__(self, name, visits):
        self.name = name
        self.visits = visits

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.visits.append((self.name, epoch, global_step, on_load_weights))

    def update_step_end(self, epoch, global_step):
        self.visits.append((self.name, epoch, global_step, "end"))


class Net(BaseModule):
    """A module whose construction and visits can be watched."""

    @dataclass
    class Config(BaseModule.Config):
        width: int = 2

    def configure(self, visits=None, depth=0):
        assert self.cfg.width and self.device == get_device()
        self.visits = [] if visits is None else visits
        self.depth = depth
        self.layer = torch.nn.Linear(self.cfg.width, 1)

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.visits.append(("net", epoch, global_step, on_load_weights))


def test_children_first_and_the_object_last():
    visits = []
    root = Recorder("root", visits)
    root.child = Recorder("child", visits)
    root.child.inner = Recorder("inner", visits)
    root.do_update_step(1, 20)
    assert visits == [
        ("inner", 1, 20, False), ("child", 1, 20, False), ("root", 1, 20, False)
    ]  # fmt: skip
    visits.clear()
    root.do_update_step_end(1, 20)
    assert [visit[0] for visit in visits] == ["inner", "child", "root"]
    assert {visit[3] for visit in visits} == {"end"}


def test_the_flag_of_loading_reaches_every_part():
    visits = []
    root = Recorder("root", visits)
    root.child = Recorder("child", visits)
    root.do_update_step(0, 7, on_load_weights=True)
    assert visits == [("child", 0, 7, True), ("root", 0, 7, True)]


def test_private_attributes_and_containers_are_not_searched():
    visits = []
    root = Recorder("root", visits)
    hidden = Recorder("hidden", visits)
    root._private = hidden
    root.in_list, root.in_dict = [hidden], {"a": hidden}
    root.in_module = torch.nn.Sequential(torch.nn.Linear(1, 1))
    root.in_module.part = hidden
    root.do_update_step(0, 0)
    assert [visit[0] for visit in visits] == ["root"]


def test_properties_are_evaluated_and_their_failures_passed_over():
    visits = []

    class WithProperties(Recorder):
        @property
        def borrowed(self):
            return self.kept[0]

        @property
        def geometry(self):
            return self.never_set

        @property
        def strange(self):
            raise RuntimeError("not now")

    root = WithProperties("root", visits)
    root.kept = [Recorder("borrowed", visits)]
    root.do_update_step(0, 0)
    assert [visit[0] for visit in visits] == ["borrowed", "root"]


def test_a_child_is_visited_once_for_each_of_its_names():
    visits = []
    root = Recorder("root", visits)
    root.a = root.b = Recorder("child", visits)
    root.do_update_step(0, 0)
    assert [visit[0] for visit in visits] == ["child", "child", "root"]


def test_torch_modules_are_walked_in_alphabetical_order():
    visits = []
    root = Net({}, visits=[])
    for name in ("zebra", "apple", "mango"):
        part = Net({}, visits=visits)
        part.update_step = lambda *args, name=name, **kwargs: visits.append(name)
        setattr(root, name, part)
    root.do_update_step(0, 0)
    assert visits == ["apple", "mango", "zebra"]


def test_helpers_pass_over_what_cannot_be_updated():
    visits = []
    update_if_possible(torch.nn.Linear(1, 1), 0, 0)
    update_if_possible(Recorder("a", visits), 2, 3)
    update_end_if_possible(object(), 0, 0)
    update_end_if_possible(Recorder("b", visits), 4, 5)
    assert visits == [("a", 2, 3, False), ("b", 4, 5, "end")]


def test_an_object_is_configured_last_and_hides_its_tensors():
    class Guidance(BaseObject):
        @dataclass
        class Config(BaseObject.Config):
            scale: float = 2.0

        def configure(self, factor, offset=0.0):
            self.weight = torch.ones(3, device=self.device)
            self.value = self.cfg.scale * factor + offset

    assert Guidance({"scale": 3}, 4.0, offset=1.0).value == 13.0
    assert Guidance(None, 1.0).value == 2.0
    assert not isinstance(Guidance(None, 1.0), torch.nn.Module)

    holder = torch.nn.Module()
    holder.guidance = Guidance(None, 1.0)
    assert holder.state_dict() == {}


def test_the_legacy_configurable_only_parses():
    class Old(Configurable):
        @dataclass
        class Config(Configurable.Config):
            a: int = 1

    assert Old({"a": 5}).cfg.a == 5 and Old().cfg.a == 1


def test_a_module_passes_arguments_on_and_has_an_unsaved_dummy():
    net = Net({"width": 3}, None, depth=4)
    assert (net.cfg.width, net.depth, net.layer.in_features) == (3, 4, 3)
    assert net._dummy.numel() == 0
    assert set(net.state_dict()) == {"layer.weight", "layer.bias"}


def test_weights_of_one_module_are_loaded_strictly_and_announced(tmp_path):
    source = Net({})
    path = tmp_path / "last.ckpt"
    state = {f"geometry.{key}": value for key, value in source.state_dict().items()}
    state["material.layer.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "epoch": 3, "global_step": 40}, path)
    loaded = Net({"weights": f"{path}:geometry"})
    assert torch.equal(loaded.layer.weight, source.layer.weight)
    assert loaded.visits == [("net", 3, 40, True)]

    del state["geometry.layer.bias"]
    torch.save({"state_dict": state, "epoch": 3, "global_step": 40}, tmp_path / "partial.ckpt")
    with pytest.raises(RuntimeError, match="layer.bias"):
        Net({"weights": f"{tmp_path / 'partial.ckpt'}:geometry"})
    with pytest.raises(ValueError):
        Net({"weights": str(path)})
