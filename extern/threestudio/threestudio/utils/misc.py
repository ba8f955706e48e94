"""Small helpers of the contract: schedules, device, rank, weights, paths, process groups."""

import functools
import gc
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging import version
from torch import Tensor, nn

from threestudio.logs import get_rank
from threestudio.utils.schedules import C

__all__ = [
    "C",
    "barrier",
    "broadcast",
    "cleanup",
    "enable_gradient",
    "find_last_path",
    "finish_with_cleanup",
    "get_device",
    "get_rank",
    "load_module_weights",
    "parse_version",
]


def parse_version(text: str) -> version.Version:
    """Return a version that compares as packaging's versions do."""
    return version.parse(text)


def get_device() -> torch.device:
    """Return the device of this process: its own GPU where CUDA is available, else the CPU.

    The index is the rank within the node (LOCAL_RANK), so several nodes are addressed rightly.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    index = get_rank() if local_rank is None else int(local_rank)
    return torch.device(f"cuda:{index % torch.cuda.device_count()}")


def load_module_weights(
    path: str | Path,
    module_name: str | None = None,
    ignore_modules: Sequence[str] | None = None,
    map_location: Any = None,
) -> tuple[dict[str, Tensor], int, int]:
    """Read model weights from a checkpoint.

    Args:
        path: checkpoint file.
        module_name: keep only the entries of this module and strip its name from them.
        ignore_modules: drop the entries of these modules; excludes ``module_name``.
        map_location: device of the tensors, "cpu" if None.

    Returns:
        state_dict: name to tensor.
        epoch: the checkpoint's epoch.
        global_step: the checkpoint's step.

    Raises:
        ValueError: if both filters are given, or the module has no entry, or the file is damaged.
        FileNotFoundError: if there is no such file.
    """
    from threestudio.utils.checkpoint import load_checkpoint

    if module_name is not None and ignore_modules is not None:
        raise ValueError("module_name and ignore_modules exclude each other; give one of them.")
    checkpoint = load_checkpoint(path, map_location="cpu" if map_location is None else map_location)
    weights = checkpoint["state_dict"]
    if ignore_modules is not None:
        prefixes = tuple(f"{name}." for name in ignore_modules)
        weights = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    if module_name is not None:
        prefix = f"{module_name}."
        roots = sorted({key.split(".")[0] for key in weights})
        weights = {
            key.removeprefix(prefix): value
            for key, value in weights.items()
            if key.startswith(prefix)
        }
        if not weights:
            raise ValueError(
                f"{path} holds no weights of module {module_name!r}; it holds {', '.join(roots)}."
            )
    return weights, checkpoint["epoch"], checkpoint["global_step"]


def find_last_path(path: str) -> str:
    """Expand ``LAST`` in a path to the newest run whose name starts with what precedes it.

    ``outputs/fourdfy/a red cubeLAST/ckpts/last.ckpt`` becomes
    ``outputs/fourdfy/a_red_cube@20260102-030405/ckpts/last.ckpt``. Spaces count as underscores. A
    run whose name is the prefix and a time stamp goes before runs with a merely longer name; among
    equals the latest time stamp wins, and runs that lack the rest of the path are passed over.

    Raises:
        FileNotFoundError: if no run fits.
    """
    if "LAST" not in path:
        return path
    before, after = path.replace(" ", "_").split("LAST", 1)
    parent, prefix = os.path.split(before)
    parent = parent or "."
    names = os.listdir(parent) if os.path.isdir(parent) else []
    matching = [name for name in names if name.startswith(prefix)]
    stamped = re.compile(re.escape(prefix) + r"@?\d{8}-\d{6}.*")
    matching.sort(key=lambda name: (bool(stamped.fullmatch(name)), _natural_key(name)))
    for name in reversed(matching):
        candidate = os.path.join(parent, name) + after
        if os.path.exists(candidate):
            return candidate
    raise FileNotFoundError(
        f"{path!r} names no existing file: {parent!r} holds {len(matching)} entries that start "
        f"with {prefix!r}, none of them with {after!r} inside."
    )


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that compares runs of digits as numbers, so that a ``-10`` follows a ``-9``."""
    return [
        (0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name) if part
    ]


def cleanup() -> None:
    """Collect garbage and give cached GPU memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        tinycudann = sys.modules.get("tinycudann")
        if hasattr(tinycudann, "free_temporary_memory"):
            tinycudann.free_temporary_memory()


def finish_with_cleanup(func: Callable) -> Callable:
    """Decorate a function to call `cleanup` after it returns."""

    @functools.wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        cleanup()
        return result

    return wrapper


def barrier() -> None:
    """Wait for all ranks; does nothing without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def broadcast(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite ``tensor`` on every rank with that of rank ``src``, in place; return it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(tensor, src=src)
    return tensor


def enable_gradient(model: nn.Module, enabled: bool = True) -> None:
    """Set ``requires_grad`` of every parameter of ``model``."""
    for parameter in model.parameters():
        parameter.requires_grad_(enabled)
