"""What a machine has, for a report: versions, memory, GPU, compiler, optional packages, disks."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from threestudio.stand_ins.finder import is_installed
from threestudio.utils.misc import get_device

GIB = 2**30

_VERSIONS = (
    "torch", "pytorch-lightning", "diffusers", "transformers", "peft", "huggingface-hub",
    "safetensors", "omegaconf", "numpy",
)  # fmt: skip
# Distribution, module, what its absence means.
_OPTIONAL = (
    ("tinycudann", "tinycudann", "hash grids on a GPU are several times slower"),
    ("nerfacc", "nerfacc", "our own sampler serves"),
    ("torchvision", "torchvision", "nothing here needs it"),
    ("wandb", "wandb", "system.loggers.wandb.enable has no effect"),
    ("tensorboard", "tensorboard", "tb_logs is not written"),
)


@dataclass(frozen=True)
class Machine:
    """Facts about this machine; sizes in GiB (2^30 bytes), None where they cannot be asked for."""

    platform: str
    processor: str
    cores: int
    versions: dict[str, str]
    packages: dict[str, str]
    ram_gib: float | None
    ram_free_gib: float | None
    gpu: str
    gpu_gib: float | None
    gpu_free_gib: float | None
    grid_backend: str
    grid_remark: str

    @property
    def has_gpu(self) -> bool:
        return self.gpu_gib is not None


@dataclass(frozen=True)
class Folder:
    """A place that runs write to: free GiB, and why it cannot be written ("" if it can)."""

    path: str
    free_gib: float
    problem: str


def describe_machine() -> Machine:
    """Ask this machine; needs no GPU and opens no connection. The hash grid's kernel is built."""
    gpu, gpu_gib, gpu_free_gib = _gpu()
    ram_gib, ram_free_gib = _ram()
    backend, remark = _grid()
    import threestudio

    return Machine(
        platform=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=_processor(),
        cores=_usable_cores(),
        versions={
            "python": platform.python_version(),
            "threestudio": threestudio.__version__,
            **{name: _version(name) for name in _VERSIONS},
        },
        packages={name: _package(name, module, why) for name, module, why in _OPTIONAL},
        ram_gib=ram_gib,
        ram_free_gib=ram_free_gib,
        gpu=gpu,
        gpu_gib=gpu_gib,
        gpu_free_gib=gpu_free_gib,
        grid_backend=backend,
        grid_remark=remark,
    )


def describe_folder(path: str | Path) -> Folder:
    """Tell the space at a folder, or where it would be made, and whether it can be written.

    Nothing is left behind: the folder is not created.
    """
    wanted = Path(path).absolute()
    existing = next(parent for parent in (wanted, *wanted.parents) if parent.exists())
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        problem = error.strerror or str(error)
    return Folder(str(path), shutil.disk_usage(existing).free / GIB, problem)


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _package(distribution: str, module: str, meaning: str) -> str:
    """The version of an optional package, or "absent (...)" or "broken (...)"."""
    if not is_installed(module):
        return f"absent ({meaning})"
    version = _version(distribution)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever an installation that does not fit raises
        text = " ".join(str(error).split())[:120]
        return f"{version}, broken ({type(error).__name__}: {text})"
    return version


def _gpu() -> tuple[str, float | None, float | None]:
    device = get_device()
    if device.type != "cuda":
        return "none", None, None
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.get_device_name(device), total / GIB, free / GIB


def _ram() -> tuple[float | None, float | None]:
    """(all, available) memory of the machine; less where a container's limit says so."""
    found: dict[str, float] = {}
    try:
        for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            found[name] = int(value.split()[0]) * 1024 / GIB
    except (OSError, ValueError, IndexError):
        return None, None
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    limit = _container_limit_gib()
    if total is not None and limit is not None and limit < total:
        return limit, min(available or limit, limit)
    return total, available


def _container_limit_gib() -> float | None:
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text(encoding="utf-8")) / GIB
        except (OSError, ValueError):
            continue  # absent, or "max"
    return None


def _usable_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or "unknown"])[0]


def _grid() -> tuple[str, str]:
    """(the hash-grid back end that "auto" takes here, what to know about it)."""
    from threestudio.kernels import cpu_backend, hash_grid
    from threestudio.kernels.grid_layout import GridLayout
    from threestudio.kernels.native_build import BuildError, find_compiler

    layout = GridLayout.from_config(3, {"n_levels": 2, "log2_hashmap_size": 8,
                                        "base_resolution": 4})  # fmt: skip
    device = get_device()
    backend = next(iter(_preferred(hash_grid, layout, device)))
    if device.type == "cuda":
        slow = backend == "torch"
        return backend, "several times slower than tiny-cuda-nn" if slow else ""
    reason = cpu_backend.unavailable_reason(layout)
    if reason:
        return backend, f"12 to 14 times slower than the compiled kernel: {reason}"
    try:
        return backend, f"compiled by {' '.join(find_compiler())}"
    except BuildError:
        return backend, "compiled before; there is no compiler now"


def _preferred(hash_grid, layout, device) -> list[str]:
    """Back ends that serve this device, in the order in which "auto" takes them."""
    usable = hash_grid.available_backends(layout, device, torch.float32)
    # The compiled ones in the table's order; PyTorch's twin serves any device, and comes last.
    return [name for name in hash_grid.BACKENDS if name in usable and name != "torch"] + ["torch"]
