"""The contract's small helpers."""

import sys
import types

import pytest
import torch
from threestudio.utils import misc
from threestudio.utils.checkpoint import save_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    weights = {
        "geometry.a": torch.tensor([1.0]),
        "geometry.net.b": torch.tensor([2.0]),
        "geometry_extra.c": torch.tensor([3.0]),
        "background.d": torch.tensor([4.0]),
    }
    save_checkpoint(path, {"state_dict": weights, "epoch": 2, "global_step": 30})
    return path


def test_versions_compare_as_versions():
    assert misc.parse_version("0.10.0") > misc.parse_version("0.9.1")


def test_weights_of_one_module_lose_its_prefix(checkpoint):
    weights, epoch, step = misc.load_module_weights(checkpoint, module_name="geometry")
    assert {k: v.item() for k, v in weights.items()} == {"a": 1.0, "net.b": 2.0}
    assert (epoch, step) == (2, 30)


def test_ignored_modules_are_left_out_by_whole_names(checkpoint):
    weights, _, _ = misc.load_module_weights(checkpoint, ignore_modules=["geometry"])
    assert set(weights) == {"geometry_extra.c", "background.d"}


def test_without_a_filter_everything_is_read(checkpoint):
    assert len(misc.load_module_weights(checkpoint)[0]) == 4


def test_both_filters_exclude_each_other(checkpoint):
    with pytest.raises(ValueError, match="exclude each other"):
        misc.load_module_weights(checkpoint, module_name="a", ignore_modules=["b"])


def test_a_module_that_the_file_lacks_is_named_with_what_it_has(checkpoint):
    with pytest.raises(ValueError, match="no weights of module 'material'; it holds background, g"):
        misc.load_module_weights(checkpoint, module_name="material")


@pytest.fixture
def runs(tmp_path):
    """Three starts of one prompt, one of a longer prompt, one start that wrote nothing."""
    for name in (
        "a_cube@20260101-000000",
        "a_cube@20260102-000000",
        "a_cube@20260102-000000-2",
        "a_cube@20260102-000000-10",
        "a_cube_and_a_ball@20260103-000000",
    ):
        (tmp_path / name / "ckpts").mkdir(parents=True)
        (tmp_path / name / "ckpts" / "last.ckpt").touch()
    (tmp_path / "a_cube@20260109-000000").mkdir()
    return tmp_path


def test_last_is_the_newest_run_of_that_prompt(runs):
    found = misc.find_last_path(f"{runs}/a cubeLAST/ckpts/last.ckpt")
    assert found == f"{runs}/a_cube@20260102-000000-10/ckpts/last.ckpt"
    assert misc.find_last_path(f"{runs}/a_cube@LAST/ckpts/last.ckpt") == found


def test_a_longer_name_serves_when_nothing_else_fits(runs):
    found = misc.find_last_path(f"{runs}/a_cube_andLAST/ckpts/last.ckpt")
    assert found == f"{runs}/a_cube_and_a_ball@20260103-000000/ckpts/last.ckpt"


def test_a_path_without_last_is_returned_as_it_is():
    assert misc.find_last_path("with space/x.ckpt") == "with space/x.ckpt"


def test_last_without_a_match_says_what_was_looked_for(runs, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds 0 entries that start with 'a_dog'"):
        misc.find_last_path(f"{runs}/a_dogLAST/ckpts/last.ckpt")
    with pytest.raises(FileNotFoundError, match="none of them with '/ckpts/other.ckpt' inside"):
        misc.find_last_path(f"{runs}/a_cubeLAST/ckpts/other.ckpt")
    with pytest.raises(FileNotFoundError, match="names no existing file"):
        misc.find_last_path(f"{tmp_path}/absent/xLAST")


def test_device_is_the_cpu_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert misc.get_device() == torch.device("cpu")


def test_device_is_the_rank_within_the_node(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("RANK", "6")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert misc.get_device() == torch.device("cuda:2")


def test_gradients_are_switched_for_all_parameters():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    misc.enable_gradient(model, False)
    assert not any(p.requires_grad for p in model.parameters())
    misc.enable_gradient(model)
    assert all(p.requires_grad for p in model.parameters())


def test_cleanup_follows_the_decorated_function(monkeypatch):
    calls = []
    monkeypatch.setattr(misc, "cleanup", lambda: calls.append("cleanup"))

    @misc.finish_with_cleanup
    def work(x):
        calls.append("work")
        return x + 1

    assert work(1) == 2
    assert calls == ["work", "cleanup"]
    assert work.__name__ == "work"


def test_cleanup_frees_what_a_loaded_tinycudann_holds(monkeypatch):
    freed = []
    stand_in = types.SimpleNamespace(free_temporary_memory=lambda: freed.append(True))
    monkeypatch.setitem(sys.modules, "tinycudann", stand_in)
    misc.cleanup()
    assert freed == ([True] if torch.cuda.is_available() else [])


def test_process_group_helpers_do_nothing_without_one():
    tensor = torch.ones(2)
    misc.barrier()
    assert misc.broadcast(tensor) is tensor
