"""Steps per second of 4D-fy's stage 1 in the embedded profile, and where the time goes.

    python tests/benchmarks/stage_1_step.py [--steps 60] [--write] [key=value ...]

The same system is timed twice: in a bare loop (data, occupancy update, step, backward, optimizer),
and through the launcher's trainer, whose extra cost (Lightning, logs, progress, checkpoints) is
what is left. Backward is split where the renders leave the renderer: before that point it is the
guidance's, after it the renderer's. `--twin` adds the bare loop on the PyTorch twin of the hash
grid. `--write` stores the report under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import RESULTS, as_lines, describe_circumstances, result_path  # noqa: E402
from step_clock import (  # noqa: E402
    StepClock,
    bare_loop,
    instrument,
    lines_of,
    plan,
    warm_up_steps,
)

CONFIG = "custom/configs/fourdfy_stage_1.yaml"
TWIN_OVERRIDE = "system.geometry.pos_encoding_config.backend=torch"


def timed_bare_loop(cfg: Any, n_steps: int) -> dict[str, float]:
    """Return the milliseconds of each part without a trainer."""
    clock = StepClock()
    bare_loop(cfg, n_steps, clock)
    return clock.table()


def through_trainer(cfg: Any) -> StepClock:
    """Take training steps as `launch.py` does."""
    import pytorch_lightning as pl
    import threestudio
    from threestudio.launcher.trainer import run_stage

    clock = StepClock()

    class Watch(pl.Callback):
        def setup(self, trainer: Any, system: Any, stage: str) -> None:
            if stage == "fit":
                dataset = trainer.datamodule.train_dataset
                dataset.collate = clock.timed("data", dataset.collate)

        def on_train_start(self, trainer: Any, system: Any) -> None:
            instrument(system, clock)
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(self.after_update)
            clock.step_began = time.perf_counter()

        def on_before_backward(self, trainer: Any, system: Any, loss: Any) -> None:
            clock.backward_began = time.perf_counter()

        def on_after_backward(self, trainer: Any, system: Any) -> None:
            clock.add("rendering, backward", time.perf_counter() - clock.backward_began)

        def on_before_optimizer_step(self, trainer: Any, system: Any, optimizer: Any) -> None:
            self.update_began = time.perf_counter()

        def after_update(self, *_: Any) -> None:
            clock.add("optimizer", time.perf_counter() - self.update_began)

        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step:
                clock.end_step()

        def on_train_end(self, *_: Any) -> None:
            clock.end_step()

    # Lightning asks a system for callbacks of its own.
    cls = threestudio.find(cfg.system_type)
    cls.configure_callbacks = lambda system: [Watch()]
    try:
        run_stage(cfg, "train")
    finally:
        del cls.configure_callbacks
    return clock


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="steps of each loop")
    parser.add_argument("--twin", action="store_true", help="also on the PyTorch hash grid")
    parser.add_argument("--no-trainer", action="store_true", help="leave the trainer out")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(ROOT)
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        given = [*arguments.overrides, f"trainer.max_steps={arguments.steps}"]
        # Views that the trainer renders besides its steps would count as their time.
        given.append(f"trainer.val_check_interval={arguments.steps + 1}")
        given.append("data.single_view.n_test_views=1")
        tables["bare loop"] = timed_bare_loop(
            plan(ROOT, CONFIG, given, Path(folder)), arguments.steps
        )
        if arguments.twin:
            twin = plan(ROOT, CONFIG, [*given, TWIN_OVERRIDE], Path(folder))
            tables["bare loop, PyTorch grid"] = timed_bare_loop(twin, arguments.steps)
        if not arguments.no_trainer:
            cfg = plan(ROOT, CONFIG, given, Path(folder))
            tables["through the trainer"] = through_trainer(cfg).table()
    report = {
        "benchmark": "stage_1_step",
        "circumstances": describe_circumstances(torch.get_num_threads()),
        "steps": arguments.steps,
        "warm_up_steps": warm_up_steps(arguments.steps),
        "milliseconds": {
            name: {part: round(value, 3) for part, value in table.items()}
            for name, table in tables.items()
        },
    }
    text = "\n".join([
        f"# One step of stage 1, profile embedded, {report['circumstances']['date']}",
        "",
        *as_lines(report["circumstances"]),
        f"- {arguments.steps} steps; the first {report['warm_up_steps']} are left out of the means",
        "",
        *lines_of(tables),
        "",
    ])  # fmt: skip
    print(text)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        for suffix, content in (("md", text), ("json", json.dumps(report, indent=1) + "\n")):
            result_path("stage_1_step", suffix).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
