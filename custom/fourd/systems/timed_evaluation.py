"""What a test of our systems begins with, and what `metrics.json` says of a run beside figures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from threestudio.launcher.progress import memory_gb
from torch import Tensor


class TimedEvaluation:
    """Mixin of a system with a `TrainingClock`, for the evaluation that it is mixed into."""

    def on_test_start(self) -> None:
        super().on_test_start()
        self._begin_test()

    def on_predict_start(self) -> None:
        super().on_predict_start()
        self._begin_test()  # An exporter with `save_video` tests, too.

    def _begin_test(self) -> None:
        """Take the time; evaluations add what they collect."""
        # An interrupted training is tested without having reached its end.
        self._stop_clock()
        self._test_started = time.monotonic()

    def _facts_of_run(self, views: Sequence[Float[Tensor, "h w 3"]]) -> dict[str, Any]:
        """How the tested views came about: steps, seconds, memory, profile, number and size."""
        seconds = self.training_seconds
        height, width = views[0].shape[:2]
        return {
            "steps": self.true_global_step,
            "seconds": None if seconds is None else round(seconds, 2),
            "evaluation_seconds": round(time.monotonic() - self._test_started, 2),
            "peak_memory_gb": round(memory_gb(self.device), 3),
            "profile": self.profile,
            "views": len(views),
            "height": int(height),
            "width": int(width),
        }
