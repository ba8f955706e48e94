"""Counting the memory of torch operations without doing them, on the meta device or any other."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that the operations inside made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple] = {}
        self._given: set[int] = set()
        self._now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Weights and what they are viewed as were there before.
        self._given |= {key for key, _ in _storages((args, kwargs)) if key not in self._made}
        out = func(*args, **kwargs)
        for key, storage in _storages(out):
            if key not in self._made and key not in self._given:
                reference = StorageWeakRef(storage)
                self._made[key] = (reference, storage.nbytes())
                self._now += storage.nbytes()
        if self._now > self.peak:  # a bound, which only now needs to be exact
            self.peak = max(self.peak, self.now)
        return out

    @property
    def now(self) -> int:
        """Bytes that live at this moment."""
        self._made = {k: v for k, v in self._made.items() if not v[0].expired()}
        self._now = sum(size for _, size in self._made.values())
        return self._now


def _storages(tree) -> list[tuple[int, torch.UntypedStorage]]:
    storages = [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return [(storage._cdata, storage) for storage in storages]


class FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel leaves it behind: the result alone. For passes without graph."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            return torch.empty_like(args[0] if args else kwargs["query"])
        return func(*args, **(kwargs or {}))
