"""Weights of a module, as our checkpoints hold them; the rest is in tests/contract."""

from dataclasses import dataclass

import pytest
import torch
from threestudio.utils.base import BaseModule
from threestudio.utils.checkpoint import save_checkpoint


class Module(BaseModule):
    @dataclass
    class Config(BaseModule.Config):
        size: int = 2

    cfg: Config

    def configure(self):
        self.layer = torch.nn.Linear(self.cfg.size, 1, bias=False)
        self.steps = []

    def update_step(self, epoch, global_step, on_load_weights=False):
        self.steps.append((epoch, global_step, on_load_weights))


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
