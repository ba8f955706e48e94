"""What a system takes out of checkpoints, what it refuses, and what it leaves out of its own."""

import pytest
import torch
from threestudio.utils.checkpoint import save_checkpoint

from tests.fixtures.small_system import EVENTS, System, config, stored

pytestmark = pytest.mark.usefixtures("small_parts")


def test_weights_are_taken_and_the_parts_told(tmp_path):
    source = System(config())
    path = stored(source, tmp_path / "a.ckpt")
    EVENTS.clear()
    system = System(config(weights=path))
    assert torch.equal(system.geometry.layer.weight, source.geometry.layer.weight)
    assert system.geometry.updates == [(0, 40, True)]
    assert EVENTS == ["configure", ("system", 40), "post_configure"]
    assert system.true_global_step == 0


def test_a_new_module_starts_fresh_and_an_old_one_is_ignored(tmp_path, caplog):
    source = System(config())
    state = {k: v for k, v in source.state_dict().items() if not k.startswith("background")}
    state["guidance.lora"] = torch.ones(1)
    save_checkpoint(tmp_path / "a.ckpt", {"state_dict": state})
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        System(config(weights=str(tmp_path / "a.ckpt")))
    assert f"background is not in {tmp_path}/a.ckpt and starts fresh." in caplog.text
    assert "guidance of" in caplog.text and "is ignored" in caplog.text


def test_unfit_weights_are_refused_with_their_keys(tmp_path):
    path = stored(System(config()), tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"geometry\.layer\.weight: shape \(1, 2\) in the file, "
                                         r"\(1, 3\) here"):
        System(config(weights=path, geometry={"width": 3}))
    save_checkpoint(tmp_path / "b.ckpt", {"state_dict": {"other.w": torch.ones(1)}})
    with pytest.raises(ValueError, match=r"nothing in common with this system; expected .*geom"):
        System(config(weights=str(tmp_path / "b.ckpt")))
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt does not exist"):
        System(config(weights="none.ckpt"))


def test_ignored_modules_keep_their_own_weights(tmp_path):
    source = System(config())
    path = stored(source, tmp_path / "a.ckpt")
    system = System(config(weights=path, geometry={"width": 3},
                           weights_ignore_modules=["geometry"]))
    assert system.geometry.layer.weight.shape == (1, 3)
    assert torch.equal(system.material.layer.weight, source.material.layer.weight)


def test_strict_loading_ignores_other_roots_only(caplog):
    system = System(config())
    state = system.state_dict()
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        system.load_state_dict({**state, "guidance.x": torch.ones(1)})
    assert "guidance of the checkpoint is not part of this system" in caplog.text
    with pytest.raises(ValueError, match=r"geometry\.extra: in the file, but not here"):
        system.load_state_dict({**state, "geometry.extra": torch.ones(1)})
    del state["geometry.layer.bias"]
    with pytest.raises(ValueError, match=r"geometry\.layer\.bias: here, but not in the file"):
        system.load_state_dict(state)
    system.load_state_dict(state, strict=False)


def test_frozen_guidance_is_not_stored_and_not_missed():
    system = System(config())
    system.guidance = torch.nn.ModuleDict({"frozen": torch.nn.BatchNorm1d(2),
                                           "lora": torch.nn.Linear(1, 1)})
    system.guidance["frozen"].requires_grad_(False)
    checkpoint = {"state_dict": dict(system.state_dict())}
    system.on_save_checkpoint(checkpoint)
    kept = {key for key in checkpoint["state_dict"] if key.startswith("guidance")}
    assert kept == {"guidance.lora.weight", "guidance.lora.bias"}
    system.load_state_dict(checkpoint["state_dict"])


class LateSystem(System):
    late_modules = ("guidance_single_view",)

    def build(self, width=1):
        self.guidance_single_view = torch.nn.Linear(width, 1)
        self.load_late_weights()


def test_a_module_that_is_built_later_gets_its_weights_then(tmp_path, caplog):
    source = LateSystem(config())
    source.build()
    path = stored(source, tmp_path / "a.ckpt")
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        system = LateSystem(config(weights=path))
        system.build()
    assert torch.equal(system.guidance_single_view.weight, source.guidance_single_view.weight)
    assert "is ignored" not in caplog.text and "starts fresh" not in caplog.text
    with pytest.raises(ValueError, match=r"guidance_single_view\.weight: shape \(1, 1\) in the f"):
        LateSystem(config(weights=path)).build(width=2)


def test_a_late_module_may_be_new_or_left_out(tmp_path, caplog):
    path = stored(System(config()), tmp_path / "a.ckpt")
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        LateSystem(config(weights=path)).build()
    assert f"guidance_single_view is not in {path} and starts fresh." in caplog.text
    source = LateSystem(config())
    source.build(width=2)
    path = stored(source, tmp_path / "b.ckpt")
    LateSystem(config(weights=path, weights_ignore_modules=["guidance_single_view"])).build()
    LateSystem(config()).build()
