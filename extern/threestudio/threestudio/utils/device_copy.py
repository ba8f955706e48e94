"""Copies between the host and a device that nobody waits for.

An ordinary ``.to(device)`` of a tensor in pageable memory, ``.item()`` and ``.cpu()`` make the host
wait until the device has done all that was asked before. Here a tensor goes to the device through
pinned memory, and a number comes back when it comes.
"""

import torch
from torch import Tensor


def upload(value: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, without waiting where that is a GPU and the tensor is not.

    Args:
        value: on any device; given back as it is where nothing changes.
        device: where to.
        dtype: of the result; converted before the copy. None keeps it.
    """
    value = value if dtype is None else value.to(dtype)
    if value.device == device:
        return value
    if value.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


class LateReading:
    """A device tensor of integers whose values the host may read once they have arrived.

    Args:
        value: any device and shape; copied, so that it may change afterwards.
    """

    def __init__(self, value: Tensor) -> None:
        is_on_gpu = value.device.type == "cuda" and torch.cuda.is_available()
        self._host = torch.empty(value.shape, dtype=value.dtype, pin_memory=is_on_gpu)
        self._host.copy_(value.detach(), non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if is_on_gpu:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    @property
    def has_arrived(self) -> bool:
        """Whether `value` can be read now. Asking does not wait."""
        return self._event is None or self._event.query()

    @property
    def value(self) -> int | list:
        """The number, or the nested list of numbers; meaningless before `has_arrived`."""
        return self._host.numpy().tolist()
