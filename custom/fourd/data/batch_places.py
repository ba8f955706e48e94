"""Where in a run each batch of an endless stream stands."""

from __future__ import annotations

from collections.abc import Iterator

import pytorch_lightning as pl
from threestudio.utils.misc import get_rank
from torch.utils.data import IterableDataset


class BatchPlaces(IterableDataset):
    """The places of the batches of a run: training step, and number in it where several make one.

    What a batch holds is a pure function of its place and of the rank, so a run goes on from any
    step as if it had never stopped. `collate` of a derived class makes it; before `attach_trainer`
    a run begins at step 0, with one batch in a step and one process.
    """

    def __init__(self) -> None:
        super().__init__()
        self.start_step, self.batches_per_step = 0, 1
        self.rank, self.world_size = get_rank(), 1

    def attach_trainer(self, trainer: pl.Trainer | None) -> None:
        """Take the place in the run (first step, rank, accumulation) from a trainer, if any."""
        if trainer is None:
            return
        self.start_step = int(trainer.global_step)
        self.batches_per_step = int(trainer.accumulate_grad_batches)
        self.rank, self.world_size = int(trainer.global_rank), int(trainer.world_size)

    def __iter__(self) -> Iterator[dict[str, int]]:
        """Yield places without end."""
        step = self.start_step
        while True:
            for batch_in_step in range(self.batches_per_step):
                yield {"step": step, "batch_in_step": batch_in_step}
            step += 1

    @property
    def n_shards(self) -> int:
        """Batches of a step over all processes."""
        return self.batches_per_step * self.world_size

    def shard(self, place: dict[str, int]) -> int:
        """Which of them this process has at a place."""
        return place.get("batch_in_step", 0) * self.world_size + self.rank
