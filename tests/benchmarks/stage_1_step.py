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
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import RESULTS, as_lines, describe_circumstances, result_path  # noqa: E402

CONFIG = "custom/configs/fourdfy_stage_1.yaml"
PARTS = (
    "data",
    "occupancy update",
    "rendering, forward",
    "guidance, forward",
    "guidance, backward",
    "rendering, backward",
    "optimizer",
    "rest",
)
LONGEST_WARM_UP_STEPS = 8
TWIN_OVERRIDE = "system.geometry.pos_encoding_config.backend=torch"


class StepClock:
    """Milliseconds of each part of each step.

    `part` may be entered at any time; `end_step` closes a step and puts the remainder to "rest".
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = {}
        self.step_began = time.perf_counter()
        self.backward_began: float | None = None

    def add(self, part: str, seconds: float) -> None:
        """Add to a part of the running step."""
        self.current[part] = self.current.get(part, 0.0) + seconds * 1e3

    @contextmanager
    def part(self, name: str):
        """Time a block as a part of the running step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - began)

    def timed(self, name: str, function: Callable) -> Callable:
        """Return ``function`` with its calls timed as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def end_step(self) -> None:
        """Close the running step and begin the next."""
        now = time.perf_counter()
        total = (now - self.step_began) * 1e3
        self.current["rest"] = total - sum(self.current.values())
        self.steps.append({**self.current, "total": total})
        self.current, self.step_began = {}, now

    def table(self) -> dict[str, float]:
        """Return the mean milliseconds of every part and of the total, warm-up left out."""
        kept = self.steps[warm_up_steps(len(self.steps)) :]
        names = (*PARTS, "total")
        return {name: statistics.fmean(step.get(name, 0.0) for step in kept) for name in names}


def warm_up_steps(n_steps: int) -> int:
    """Return how many of the first steps are left out: they compile, allocate and fill caches."""
    return min(LONGEST_WARM_UP_STEPS, n_steps // 4)


class _BackwardMark(torch.autograd.Function):
    """The identity; tells the clock when the backward pass comes by."""

    @staticmethod
    def forward(ctx, images: torch.Tensor, clock: StepClock) -> torch.Tensor:
        ctx.clock = clock
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        now = time.perf_counter()
        clock = ctx.clock
        if clock.backward_began is not None:
            clock.add("guidance, backward", now - clock.backward_began)
        clock.backward_began = now
        return gradient, None


def instrument(system: Any, clock: StepClock) -> None:
    """Make the parts of a stage-1 system report to the clock."""
    render = system.renderer.forward

    def timed_render(*args: Any, **kwargs: Any) -> dict:
        with clock.part("rendering, forward"):
            out = render(*args, **kwargs)
        if out["comp_rgb"].requires_grad:
            out["comp_rgb"] = _BackwardMark.apply(out["comp_rgb"], clock)
        return out

    system.renderer.forward = timed_render
    for name, guidance in system._guidance.items():
        system._guidance[name] = clock.timed("guidance, forward", guidance)
    system.do_update_step = clock.timed("occupancy update", system.do_update_step)


def plan(overrides: Sequence[str], folder: Path) -> Any:
    """Return the checked experiment that the launcher would run."""
    from threestudio.launcher.arguments import parse_arguments
    from threestudio.launcher.extensions import load_extensions
    from threestudio.launcher.stages import plan_stages

    load_extensions(ROOT / "custom")
    argv = ["--config", str(ROOT / CONFIG), "--train", "profile=embedded", f"exp_root_dir={folder}"]
    return plan_stages(parse_arguments([*argv, *overrides]), ROOT)[0].cfg


def bare_loop(cfg: Any, n_steps: int) -> StepClock:
    """Take training steps without a trainer."""
    import threestudio
    from threestudio.utils.base import update_if_possible
    from threestudio.utils.rng import seed_global_generators, set_experiment_seed

    set_experiment_seed(int(cfg.seed))
    seed_global_generators(-1)
    datamodule = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.setup("fit")
    system.log = lambda *args, **kwargs: None  # logging is the trainer's
    datamodule.setup("fit")
    dataset = datamodule.train_dataset
    optimizer = system.configure_optimizers()["optimizer"]
    clock = StepClock()
    instrument(system, clock)
    places = iter(dataset)
    for step in range(n_steps):
        system.set_resume_status(0, step)
        with clock.part("data"):
            update_if_possible(dataset, 0, step)
            batch = dataset.collate(next(places))
        system.do_update_step(0, step)
        loss = system.training_step(batch, step)["loss"]
        clock.backward_began = time.perf_counter()
        loss.backward()
        clock.add("rendering, backward", time.perf_counter() - clock.backward_began)
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        clock.end_step()
    return clock


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


def lines_of(tables: dict[str, dict[str, float]]) -> list[str]:
    """Return the tables side by side as Markdown: milliseconds and share of each part."""
    names = list(tables)
    lines = [
        "| part | " + " | ".join(f"{name}, ms | share" for name in names) + " |",
        "|---|" + "---|---|" * len(names),
    ]
    for part in (*PARTS, "total"):
        cells = []
        for name in names:
            value, total = tables[name][part], tables[name]["total"]
            cells.append(f"{value:.1f} | {value / total:.0%}")
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    speeds = [f"{1e3 / tables[name]['total']:.2f} | " for name in names]
    return [*lines, "| steps per second | " + " | ".join(speeds) + "|"]


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
        tables["bare loop"] = bare_loop(plan(given, Path(folder)), arguments.steps).table()
        if arguments.twin:
            twin = plan([*given, TWIN_OVERRIDE], Path(folder))
            tables["bare loop, PyTorch grid"] = bare_loop(twin, arguments.steps).table()
        if not arguments.no_trainer:
            cfg = plan(given, Path(folder))
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
