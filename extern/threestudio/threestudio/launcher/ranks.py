"""What follows for the trainer when several processes share a training.

Each process (rank) draws its own cameras and noise, `batch_size` of them, so that N ranks make a
step of N times that batch; they average their gradients, and rank 0 alone writes. One machine:

  torchrun --standalone --nproc-per-node 2 launch.py --config FILE --train tag=NAME

and on processors instead of GPUs the same with ``trainer.accelerator=cpu``.
"""

from collections.abc import Mapping
from typing import Any

# A step trains what its guidance reaches: an image step leaves the motion alone. Plain DDP waits
# for the gradients of all.
STRATEGY = "ddp_find_unused_parameters_true"


def share_among_ranks(
    options: dict[str, Any], environment: Mapping[str, str], n_gpus: int = 1
) -> dict[str, Any]:
    """Complete the arguments of `pytorch_lightning.Trainer` for several processes.

    Args:
        options: the arguments so far; those of one process come back as they are.
        environment: variables of this process, from which torchrun's count of processes is taken.
        n_gpus: processes that ``devices=-1`` means, and no ``devices``.

    Returns:
        The arguments with ``devices`` and ``num_nodes`` as torchrun has them, unless given; a
        strategy that allows parameters without a gradient in place of "auto" and "ddp"; and with
        all views in every rank, since rank 0 writes them.
    """
    options = dict(options)
    world_size = int(environment.get("WORLD_SIZE", 1))
    if world_size > 1 and "TORCHELASTIC_RUN_ID" in environment:
        n_local = int(environment["LOCAL_WORLD_SIZE"])
        options.setdefault("devices", n_local)
        options.setdefault("num_nodes", world_size // n_local)
    if world_size == 1 and _count(options.get("devices", n_gpus), n_gpus) == 1:
        return options
    if options.get("strategy", "auto") in ("auto", "ddp"):
        options["strategy"] = STRATEGY
    options.setdefault("use_distributed_sampler", False)
    return options


def _count(devices: Any, n_gpus: int) -> int:
    if isinstance(devices, (list, tuple)):
        return len(devices)
    if devices in (-1, "-1", "auto"):
        return n_gpus
    if isinstance(devices, str) and "," in devices:
        return len([part for part in devices.split(",") if part.strip()])
    return int(devices)
