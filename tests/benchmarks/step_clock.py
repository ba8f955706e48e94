"""Where the time of a training step goes: a clock with named parts, and the bare loop it watches.

A step is: data, occupancy update, rendering, guidance, backward, optimizer. Backward is split where
the renders leave the renderer: before that point it is the guidance's, after it the renderer's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch

U_NET = "guidance, U-Net"
PARTS = (
    "data",
    "occupancy update",
    "rendering, forward",
    U_NET,
    "guidance, rest of forward",
    "guidance, backward",
    "rendering, backward",
    "optimizer",
    "rest",
)
LONGEST_WARM_UP_STEPS = 8


class StepClock:
    """Milliseconds of each part of each step.

    `part` may be entered at any time; `end_step` closes a step and puts the remainder to "rest".

    Args:
        device: waits for this GPU at every reading; None on a CPU.
        uses_cpu_time: count the time that the process itself was running, which a busy machine
            leaves alone; right for one thread.
    """

    def __init__(self, device: torch.device | None = None, uses_cpu_time: bool = False) -> None:
        self.device = device
        self.read = time.process_time if uses_cpu_time else time.perf_counter
        self.steps: list[dict[str, Any]] = []
        self.current: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self.step_began = self.now()
        self.backward_began: float | None = None

    def now(self) -> float:
        """Return seconds, all work of the device done."""
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.read()

    def add(self, part: str, seconds: float) -> None:
        """Add to a part of the running step."""
        self.current[part] = self.current.get(part, 0.0) + seconds * 1e3

    def note(self, **facts: Any) -> None:
        """Keep facts of the running step beside its times."""
        self.notes.update(facts)

    @contextmanager
    def part(self, name: str):
        """Time a block as a part of the running step."""
        began = self.now()
        try:
            yield
        finally:
            self.add(name, self.now() - began)

    def timed(self, name: str, function: Callable) -> Callable:
        """Return ``function`` with its calls timed as a part."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def end_step(self) -> None:
        """Close the running step and begin the next."""
        now = self.now()
        total = (now - self.step_began) * 1e3
        self.current["rest"] = total - sum(self.current.values())
        self.steps.append({**self.current, "total": total, **self.notes})
        self.current, self.notes, self.step_began = {}, {}, now

    def table(self, kind: str | None = None) -> dict[str, float]:
        """Return the mean milliseconds of every part and of the total, warm-up left out.

        Args:
            kind: of the steps' note "kind"; None takes all steps.
        """
        kept = self.kept(kind)
        names = (*PARTS, "total")
        return {name: statistics.fmean(step.get(name, 0.0) for step in kept) for name in names}

    def kept(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the steps after the warm-up, of one kind if one is named."""
        kept = self.steps[warm_up_steps(len(self.steps)) :]
        return [step for step in kept if kind in (None, step.get("kind"))]


def warm_up_steps(n_steps: int) -> int:
    """Return how many of the first steps are left out: they compile, allocate and fill caches."""
    return min(LONGEST_WARM_UP_STEPS, n_steps // 4)


class BackwardMark(torch.autograd.Function):
    """The identity; tells the clock when the backward pass comes by."""

    @staticmethod
    def forward(ctx, images: torch.Tensor, clock: StepClock) -> torch.Tensor:
        ctx.clock = clock
        return images.view_as(images)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        clock = ctx.clock
        now = clock.now()
        if clock.backward_began is not None:
            clock.add("guidance, backward", now - clock.backward_began)
        clock.backward_began = now
        return gradient, None


def instrument(system: Any, clock: StepClock) -> None:
    """Make the parts of a system's steps report to the clock; steps note their kind and size."""
    render, drawn = system.renderer.forward, system.drawn_guidance
    watched: set[int] = set()

    def timed_render(*args: Any, **kwargs: Any) -> dict:
        if not system.renderer.training:  # Evaluation belongs to no step.
            return render(*args, **kwargs)
        with clock.part("rendering, forward"):
            out = render(*args, **kwargs)
        clock.note(rays=out["opacity"].numel(), samples=out["ray_indices"].numel())
        if out["comp_rgb"].requires_grad:
            out["comp_rgb"] = BackwardMark.apply(out["comp_rgb"], clock)
        return out

    def timed_guidance(kind: str) -> tuple[Any, Any]:
        guidance, prompt_utils = drawn(kind)
        clock.note(kind=kind)
        unet = getattr(guidance, "unet", None)
        if isinstance(unet, torch.nn.Module) and id(unet) not in watched:
            watched.add(id(unet))
            unet.forward = clock.timed(U_NET, unet.forward)

        def call(*args: Any, **kwargs: Any) -> Any:
            before, began = clock.current.get(U_NET, 0.0), clock.now()
            result = guidance(*args, **kwargs)
            unet_ms = clock.current.get(U_NET, 0.0) - before
            clock.add("guidance, rest of forward", clock.now() - began - unet_ms * 1e-3)
            return result

        return call, prompt_utils

    system.renderer.forward = timed_render
    system.drawn_guidance = timed_guidance
    system.do_update_step = clock.timed("occupancy update", system.do_update_step)


def bare_loop(
    cfg: Any,
    n_steps: int,
    clock: StepClock,
    prepare: Callable[[Any], None] | None = None,
    device: torch.device | None = None,
) -> Any:
    """Take training steps without a trainer, and return the system.

    Args:
        cfg: a checked experiment.
        prepare: is called with the system before it is instrumented.
        device: None takes the CPU.
    """
    import threestudio
    from threestudio.utils.base import update_if_possible
    from threestudio.utils.rng import seed_global_generators, set_experiment_seed

    set_experiment_seed(int(cfg.seed))
    seed_global_generators(-1)
    datamodule = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.setup("fit")
    system.log = lambda *args, **kwargs: None  # logging is the trainer's
    if device is not None:
        system.to(device)
    if prepare is not None:
        prepare(system)
    datamodule.setup("fit")
    dataset = datamodule.train_dataset
    optimizer = system.configure_optimizers()["optimizer"]
    instrument(system, clock)
    places = iter(dataset)
    clock.step_began = clock.now()
    for step in range(n_steps):
        system.set_resume_status(0, step)
        with clock.part("data"):
            update_if_possible(dataset, 0, step)
            batch = _moved(dataset.collate(next(places)), device)
        system.do_update_step(0, step)
        loss = system.training_step(batch, step)["loss"]
        clock.backward_began = clock.now()
        loss.backward()
        clock.add("rendering, backward", clock.now() - clock.backward_began)
        with clock.part("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        clock.end_step()
    return system


def _moved(batch: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    if device is None:
        return batch
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }


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


def plan(root: Any, config: str, overrides: Sequence[str], folder: Any) -> Any:
    """Return the checked experiment that the launcher would run for one config file."""
    from threestudio.launcher.arguments import parse_arguments
    from threestudio.launcher.extensions import load_extensions
    from threestudio.launcher.stages import plan_stages

    load_extensions(root / "custom")
    argv = ["--config", str(root / config), "--train", f"exp_root_dir={folder}"]
    if not any(each.startswith("profile=") for each in overrides):
        argv.append("profile=embedded")
    return plan_stages(parse_arguments([*argv, *overrides]), root)[0].cfg
