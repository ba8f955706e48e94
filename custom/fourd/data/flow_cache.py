"""Flows on disk, by the content of the two pictures: originals never change, so neither do they."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import threestudio
import torch
from jaxtyping import Float
from torch import Tensor

from ..ops.optical_flow import FlowEstimator

LARGEST_PX = float(np.finfo(np.float16).max)


class CachedFlow:
    """A flow estimator that remembers, over restarts and for all processes that share a folder.

    The key is the estimator's identity with the pictures' sizes and values, so that another
    picture, preset or version of a library is another flow. Flows are kept with 16 bits, some
    1/1000 of their length, and returned so the first time too: whether one was remembered changes
    nothing. Files appear whole or not at all; one that is damaged is made again.

    Args:
        estimator: what makes a flow that is not there.
        folder: where they are kept; made when the first one is.
    """

    def __init__(self, estimator: FlowEstimator, folder: str | Path) -> None:
        self.estimator, self.folder = estimator, Path(folder)
        self._identity = estimator.identity

    @property
    def identity(self) -> str:
        """That of the estimator, at 16 bits."""
        return f"{self._identity} 16 bits"

    def estimate(
        self, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]
    ) -> Float[Tensor, "2 h w"]:
        """Return the flow of ``a``'s pixels towards ``b``, in pixels, on the device of ``a``.

        Raises:
            ValueError: the pictures do not fit, or the flow is not finite.
        """
        path = self.path(a, b)
        flow = self._read(path, (2, *a.shape[:2]))
        if flow is None:
            flow = self._make(a, b)
            self._write(path, flow)
        return torch.from_numpy(flow.astype(np.float32)).to(a.device)

    def path(self, a: Float[Tensor, "h w 3"], b: Float[Tensor, "h w 3"]) -> Path:
        """Return the file of a flow, whether or not it is there."""
        digest = hashlib.sha256(self._identity.encode())
        for image in (a, b):
            digest.update(str(tuple(image.shape)).encode())
            values = image.detach().float().cpu().contiguous().numpy()
            digest.update(values.tobytes())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.npy"

    def _make(self, a: Tensor, b: Tensor) -> np.ndarray:
        flow = self.estimator.estimate(a, b)
        # NaN compares false, so it is caught too.
        if not bool((flow.abs() <= LARGEST_PX).all()):
            raise ValueError(
                f"the flow by {self._identity} holds NaN or more than {LARGEST_PX:.0f} pixels; "
                "expected finite displacements. Are the pictures finite and in [0, 1]?"
            )
        return flow.detach().cpu().numpy().astype(np.float16)

    def _read(self, path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
        try:
            flow = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            threestudio.warn("%s is damaged (%s); this flow is estimated again.", path, error)
            return None
        if flow.shape != shape or flow.dtype != np.float16:
            threestudio.warn("%s holds another array; this flow is estimated again.", path)
            return None
        return flow

    def _write(self, path: Path, flow: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, flow)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
