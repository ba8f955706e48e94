"""Optical flow between two pictures: DIS by OpenCV, RAFT by torchvision where it is installed.

Legend: pictures [h w 3] in [0, 1]; flow [2 h w] in pixels of them, x right first, y down, of the
first picture's pixels: first(x) shows what second(x + flow(x)) shows.

Flow is made for originals, never for edited pictures. Nothing is random, nothing is
differentiable. Both libraries are imported when the first flow is estimated.
"""

from __future__ import annotations

import importlib.util
import math
import threading
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

KINDS = ("auto", "raft", "dis")
LUMA = (0.299, 0.587, 0.114)
DIS_PRESETS = ("ultrafast", "fast", "medium")
DIS_SHORT_SIDE_PX = 64
"""DIS enlarges smaller pictures to this. Enlarging the world's clips of 64 pixels too gave warps
that look right by a flow that is wrong: its end-point error grew five times."""
RAFT_MULTIPLE_PX, RAFT_LEAST_PX = 8, 128


@runtime_checkable
class FlowEstimator(Protocol):
    """What estimates flow; a cache of flows needs no more than this either."""

    @property
    def identity(self) -> str:
        """All that decides a flow besides the two pictures."""
        ...

    def estimate(self, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]) -> Tensor:
        """The flow [2 h w] of ``a``'s pixels towards ``b``."""
        ...


class DISFlow:
    """Dense inverse search (Kroeger et al. 2016) on the processor; needs OpenCV alone.

    Args:
        preset: "ultrafast", "fast" or "medium", OpenCV's settings.
        short_side_px: pictures with a shorter side are enlarged to it first; 0 never does.

    Raises:
        ValueError: ``preset`` is unknown.
    """

    def __init__(self, preset: str = "medium", short_side_px: int = DIS_SHORT_SIDE_PX) -> None:
        if preset not in DIS_PRESETS:
            raise ValueError(f"preset is {preset!r}; expected one of {', '.join(DIS_PRESETS)}.")
        self.preset, self.short_side_px = preset, short_side_px

    @property
    def identity(self) -> str:
        """All that decides a flow besides the two pictures."""
        import cv2

        return f"dis {self.preset} {self.short_side_px} opencv {cv2.__version__}"

    def estimate(
        self, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]
    ) -> Float[Tensor, "2 h w"]:
        """Return the flow of ``a``'s pixels towards ``b``, on the device of ``a``.

        Raises:
            ValueError: the pictures differ in shape.
        """
        import cv2

        _check_pair(a, b)
        height, width = a.shape[:2]
        factor = max(1, math.ceil(self.short_side_px / min(height, width)))
        size = height * factor, width * factor
        # An object of its own for each call: OpenCV's holds buffers, and callers may be threads.
        search = cv2.DISOpticalFlow_create(
            getattr(cv2, f"DISOPTICAL_FLOW_PRESET_{self.preset.upper()}")
        )
        pair = [_luma(image, size).numpy() for image in (a, b)]
        flow = torch.from_numpy(search.calc(*pair, None)).movedim(-1, 0)
        if factor > 1:
            flow = functional.avg_pool2d(flow, factor) / factor
        return flow.contiguous().to(a.device)


class RAFTFlow:
    """RAFT (Teed and Deng 2020), torchvision's large network, on the device of the pictures.

    Args:
        n_updates: refinements, 20 as published.
        weights: torchvision's name; "C_T_V1" is the authors' raft-things, as released. The first
            use downloads it into torch's hub folder.

    Raises:
        ValueError: torchvision is not installed.
    """

    def __init__(self, n_updates: int = 20, weights: str = "C_T_V1") -> None:
        if importlib.util.find_spec("torchvision") is None:
            raise ValueError(
                "flow 'raft' needs torchvision, which is not installed; install the one for this "
                "torch (`pip install torchvision`), or choose flow 'dis'."
            )
        self.n_updates, self.weights = n_updates, weights
        self._network: Any = None
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """All that decides a flow besides the two pictures."""
        return f"raft large {self.weights} {self.n_updates}"

    @torch.no_grad()
    def estimate(
        self, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]
    ) -> Float[Tensor, "2 h w"]:
        """Return the flow of ``a``'s pixels towards ``b``, on the device of ``a``.

        Raises:
            ValueError: the pictures differ in shape, or the weights cannot be fetched.
        """
        _check_pair(a, b)
        network = self._load().to(a.device)
        left, right, top, bottom = padding = raft_padding(*a.shape[:2])
        pair = [
            functional.pad(image.movedim(-1, 0)[None].float() * 2 - 1, padding, mode="replicate")
            for image in (a, b)
        ]
        # Half precision loses whole pixels of flow in the correlation volume.
        with torch.autocast(a.device.type, enabled=False):
            flow = network(*pair, num_flow_updates=self.n_updates)[-1][0]
        _, height, width = flow.shape
        return flow[:, top : height - bottom, left : width - right].contiguous()

    def _load(self) -> torch.nn.Module:
        from urllib.error import URLError

        from torchvision.models import optical_flow

        with self._lock:
            if self._network is None:
                weights = getattr(optical_flow.Raft_Large_Weights, self.weights)
                try:
                    network = optical_flow.raft_large(weights=weights, progress=False)
                except (URLError, OSError) as error:
                    raise ValueError(
                        f"RAFT's weights {self.weights} could not be fetched ({error}); fetch them "
                        "with a network once, or choose flow 'dis'."
                    ) from error
                self._network = network.eval().requires_grad_(False)
        return self._network


def make_flow_estimator(kind: str = "auto") -> DISFlow | RAFTFlow:
    """Return the estimator of a kind: "raft", "dis", or "auto", RAFT where torchvision is there.

    Raises:
        ValueError: the kind is unknown, or torchvision is asked for and not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"flow is {kind!r}; expected one of {', '.join(KINDS)}.")
    if kind == "auto":
        kind = "dis" if importlib.util.find_spec("torchvision") is None else "raft"
    return RAFTFlow() if kind == "raft" else DISFlow()


def estimate_both(
    estimator: FlowEstimator, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]
) -> tuple[Float[Tensor, "2 h w"], Float[Tensor, "2 h w"]]:
    """Return the flow of ``a``'s pixels towards ``b``, and that of ``b``'s towards ``a``."""
    return estimator.estimate(a, b), estimator.estimate(b, a)


def raft_padding(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (left, right, top, bottom) pixels that centre a picture in a size RAFT takes."""
    sides = []
    for side in (width, height):
        full = max(RAFT_LEAST_PX, math.ceil(side / RAFT_MULTIPLE_PX) * RAFT_MULTIPLE_PX)
        before = (full - side) // 2
        sides += [before, full - side - before]
    return tuple(sides)


def _luma(image: Float[Tensor, "h w 3"], size: tuple[int, int]) -> UInt8[Tensor, "h2 w2"]:
    """Brightness in 8 bits, rounded: DIS takes nothing finer."""
    grey = (image.detach().float().cpu() @ torch.tensor(LUMA))[None, None]
    if grey.shape[-2:] != size:
        grey = functional.interpolate(grey, size, mode="bicubic", align_corners=False)
    return (grey[0, 0].clamp(0, 1) * 255).round().to(torch.uint8)


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 3 or a.shape[-1] != 3 or a.shape != b.shape:
        raise ValueError(
            f"the pictures have shapes {tuple(a.shape)} and {tuple(b.shape)}; expected the same "
            "(height, width, 3)."
        )
