"""Every random draw of a run, as a pure function of (seed, role, step, item).

A stream is named by four things and by nothing else: the seed of the experiment, the *role* of the
draw (a short string written where the draw is made: "camera", "latent-noise", "background", ...),
the training step, and the *item*, which is the global index of the object, clip or view group
within the step: ``rank * local_batch + i``. Draws that the whole batch shares leave the item out.

Nothing is consumed and nothing is remembered, so prefetching, resuming, adding another stream or
changing the number of ranks never changes a value. The bits of one stream depend on the device
that the generator lives on, therefore the batch helpers draw on the CPU and move the result.
"""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from threestudio.utils.device_copy import upload

_SEED_BITS = 63
_experiment_seed = 0


def set_experiment_seed(seed: int) -> None:
    """Set the seed that every later draw of this process starts from.

    Called once by the launcher, with the config's ``seed``; all ranks pass the same number.

    Raises:
        TypeError: if ``seed`` is not an integer.
    """
    global _experiment_seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; expected an integer. Write for example seed=0.")
    _experiment_seed = seed


def experiment_seed() -> int:
    """Return the seed of the experiment, 0 unless `set_experiment_seed` was called."""
    return _experiment_seed


def derive_seed(role: str, step: int, item: int | None = None, seed: int | None = None) -> int:
    """Return the 63-bit seed of the stream (seed, role, step, item).

    The fields are hashed with BLAKE2b, each behind a separator that cannot occur in a number, so
    that neighbouring steps and items give unrelated streams and no two tuples share an encoding.

    Args:
        role: what the draw is for; any non-empty string.
        step: global training step.
        item: global index within the step, or None for a draw that the batch shares.
        seed: overrides the experiment's seed.

    Raises:
        ValueError: if ``role`` is empty.
    """
    if not role:
        raise ValueError("role is empty; expected the purpose of the draw, such as 'camera'.")
    base = _experiment_seed if seed is None else seed
    name = role.encode("utf-8")
    shared = "-" if item is None else str(int(item))
    fields = f"{int(base)}|{int(step)}|{shared}|{len(name)}|".encode("ascii")
    digest = hashlib.blake2b(fields + name, digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - _SEED_BITS)


def generator(
    role: str,
    step: int,
    item: int | None = None,
    device: torch.device | str = "cpu",
    seed: int | None = None,
) -> torch.Generator:
    """Return a fresh generator at the start of the stream (seed, role, step, item)."""
    return torch.Generator(device=device).manual_seed(derive_seed(role, step, item, seed))


def randn_items(
    shape: Sequence[int],
    role: str,
    step: int,
    first_item: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw N(0, 1) values, row i from its own stream ``first_item + i``.

    Args:
        shape: shape of the result; ``shape[0]`` counts the items.
        role: what the draw is for.
        step: global training step.
        first_item: global index of row 0, ``rank * local_batch`` in a distributed run.
        device: where the result goes; the draw itself is made on the CPU in fp32.
        dtype: type of the result.
    """
    return _draw_items(torch.randn, shape, role, step, first_item, device, dtype)


def rand_items(
    shape: Sequence[int],
    role: str,
    step: int,
    first_item: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw U[0, 1) values, row i from its own stream ``first_item + i``; see `randn_items`."""
    return _draw_items(torch.rand, shape, role, step, first_item, device, dtype)


def _draw_items(draw, shape, role, step, first_item, device, dtype) -> Tensor:
    if len(shape) == 0:
        raise ValueError("shape is (); expected at least one dimension, which counts the items.")
    item_shape = tuple(int(size) for size in shape[1:])
    rows = torch.empty((int(shape[0]), *item_shape), dtype=torch.float32)
    for index in range(rows.shape[0]):
        stream = generator(role, step, first_item + index)
        rows[index] = draw(item_shape, generator=stream)
    return upload(rows, torch.device(device), dtype)


def seed_global_generators(step: int, role: str = "global") -> None:
    """Re-seed Python's, NumPy's and torch's global generators from the stream (role, step).

    Our own code never draws from them; this makes foreign modules that do resume alike.
    """
    seed = derive_seed(role, step)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # torch.manual_seed would queue a call with its stack trace for each device back end that is
    # not initialised yet, which costs more than a small step and grows without bound.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
