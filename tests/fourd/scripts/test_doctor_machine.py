import sys

import pytest
import torch

from custom.fourd.scripts import doctor_machine
from custom.fourd.scripts.doctor_machine import describe_folder, describe_machine


@pytest.fixture(scope="module")
def machine():
    return describe_machine()


def test_this_machine_is_described(machine):
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["python"].startswith("3.") and machine.cores >= 1
    assert machine.has_gpu == torch.cuda.is_available()
    assert set(machine.packages) == {"tinycudann", "nerfacc", "torchvision", "wandb", "tensorboard"}
    if machine.ram_gib is not None:
        assert 0 < machine.ram_free_gib <= machine.ram_gib


@pytest.mark.skipif(torch.cuda.is_available(), reason="the grid of a machine without a GPU")
def test_the_grid_is_the_one_that_auto_takes(machine):
    from threestudio.kernels import cpu_backend, hash_grid, torch_backend
    from threestudio.kernels.grid_layout import GridLayout

    layout = GridLayout.from_config(3, {"n_levels": 2, "log2_hashmap_size": 8})
    taken = hash_grid._select("auto", torch.zeros(layout.n_params), layout)
    expected = {cpu_backend.encode: "cpu", torch_backend.encode: "torch"}
    assert machine.grid_backend == expected[taken]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the grid of a machine without a GPU")
def test_a_machine_without_a_compiler_is_told_so(monkeypatch):
    from threestudio.kernels import cpu_backend

    monkeypatch.setattr(cpu_backend, "unavailable_reason", lambda *case: "no C++ compiler.")
    backend, remark = doctor_machine._grid()
    assert backend == "torch"
    assert remark == "12 to 14 times slower than the compiled kernel: no C++ compiler."


def test_packages_are_absent_broken_or_have_a_version(tmp_path, monkeypatch):
    text = "raise RuntimeError('operator x::y\\ndoes not exist')"
    (tmp_path / "a_broken_one.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    broken = doctor_machine._package("a-broken-one", "a_broken_one", "nothing")
    assert broken == "absent, broken (RuntimeError: operator x::y does not exist)"
    assert doctor_machine._package("no-such", "no_such_module", "why") == "absent (why)"
    assert doctor_machine._package("numpy", "numpy", "why") == sys.modules["numpy"].__version__


def test_a_folder_is_tried_and_left_alone(tmp_path):
    wanted = tmp_path / "outputs" / "deep"
    folder = describe_folder(wanted)
    assert folder.problem == "" and folder.free_gib > 0 and not (tmp_path / "outputs").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_says_why(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor_machine.tempfile, "TemporaryFile", refuse)
    assert describe_folder(tmp_path).problem == "Permission denied"


def test_a_container_may_have_less_memory_than_its_machine(monkeypatch):
    whole, _ = doctor_machine._ram()
    if whole is None:
        pytest.skip("this system has no /proc/meminfo")
    monkeypatch.setattr(doctor_machine, "_container_limit_gib", lambda: 0.5)
    assert doctor_machine._ram() == (0.5, 0.5)
    monkeypatch.setattr(doctor_machine, "_container_limit_gib", lambda: whole * 2)
    assert doctor_machine._ram()[0] == whole
