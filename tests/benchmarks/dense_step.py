"""A dense training step without guidance, beside what the memory system allows.

    python tests/benchmarks/dense_step.py [--device cpu|cuda] [--repeats 5] [--cpu-time] [--write]

64 x 64 parallel rays of 64 samples each, 2^18 points, none skipped: 4D-fy's 3D and 4D grid at the
published size (16 levels x 2 features, 2^19 entries), density and colour network of 64 neurons,
compositing, a mean squared error, backward, fused Adam on all of the tables. The field and the
renderer are those that training uses. On the CPU the floor is bare loops over the very table
addresses of these points: gather for the forward pass, read-add-write for the backward pass, of
both grids; floor and step run in turn, and the ratio is that of each pair. `--cpu-time` counts the
time that the process itself was running, for one thread on a busy machine. `--write` stores the
report under tests/benchmarks/results/, `--json` stores it where `kernel_bounds.py` wants it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import RESULTS, as_lines, describe_circumstances, result_path  # noqa: E402
from hash_grid import PAPER, floor_probes  # noqa: E402
from step_clock import BackwardMark, StepClock  # noqa: E402

EDGE = 64
N_SAMPLES = 64
BOUND = 2.5
"""Of the step over its floor."""
PARTS = ("rendering, forward", "loss, backward", "rendering, backward", "optimizer")


def make_parts(device: torch.device) -> tuple[Any, list[torch.nn.Parameter]]:
    """Return the renderer of an untrained scene, and its parameters."""
    import threestudio
    from threestudio.launcher.extensions import load_extensions

    load_extensions(ROOT / "custom")
    network = {"otype": "VanillaMLP", "n_neurons": 64, "n_hidden_layers": 1}
    geometry = threestudio.find("implicit-volume")({
        "radius": 1.0,
        "normal_type": "finite_difference",
        "pos_encoding_config": {**PAPER, "otype": "HashGridSpatialTime", "static": False},
        "mlp_network_config": network,
    })  # fmt: skip
    material = threestudio.find("no-material")({"n_output_dims": 3, "color_activation": "sigmoid"})
    background = threestudio.find("solid-color-background")({"color": [1.0, 1.0, 1.0]})
    renderer = threestudio.find("nerf-volume-renderer")(
        {
            "radius": 1.0,
            # The box is 2 across and its diagonal 1.732 times that; rays run along an axis.
            "num_samples_per_ray": round(1.732 * N_SAMPLES),
            "grid_prune": False,
            "prune_alpha_threshold": False,
            "randomized": False,
        },
        geometry=geometry, material=material, background=background,
    )  # fmt: skip
    renderer.to(device).train()
    for part in (geometry, material, background):
        part.to(device).train()
    return renderer, [*geometry.parameters()]


def parallel_rays(device: torch.device) -> dict[str, torch.Tensor]:
    """Return a batch of one image whose rays cross the box along z, off its faces."""
    ticks = (torch.arange(EDGE, device=device) + 0.5) / EDGE * 2 - 1
    y, x = torch.meshgrid(ticks, ticks, indexing="ij")
    origins = torch.stack((x, y, torch.full_like(x, -2.0)), dim=-1)[None]
    directions = torch.tensor([0.0, 0.0, 1.0], device=device).expand_as(origins)
    return {
        "rays_o": origins,
        "rays_d": directions,
        "light_positions": torch.zeros(1, 3, device=device),
        "frame_times": torch.tensor([0.4], device=device),
    }


class DenseStep:
    """The step, whose parts report to a clock."""

    def __init__(self, clock: StepClock, device: torch.device) -> None:
        self.clock = clock
        self.renderer, parameters = make_parts(device)
        self.batch = parallel_rays(device)
        self.optimizer = torch.optim.Adam(parameters, lr=0.01, betas=(0.9, 0.99), fused=True)
        self.n_parameters = sum(parameter.numel() for parameter in parameters)
        generator = torch.Generator().manual_seed(0)
        self.target = torch.rand((1, EDGE, EDGE, 3), generator=generator).to(device)
        self.points = torch.zeros(0, 3)

    def __call__(self) -> None:
        """Take one step."""
        clock = self.clock
        clock.step_began = clock.now()
        with clock.part("rendering, forward"):
            out = self.renderer(**self.batch)
        self.points = out["points"].detach()
        image = BackwardMark.apply(out["comp_rgb"], clock)
        loss = torch.nn.functional.mse_loss(image, self.target)
        clock.backward_began = clock.now()
        loss.backward()
        clock.add("rendering, backward", clock.now() - clock.backward_began)
        with clock.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        clock.end_step()


def floor_of(step: DenseStep, clock: StepClock) -> Any:
    """Return the function that takes the floor of a step, in milliseconds by name."""
    from threestudio.kernels import GridLayout

    unit = (step.points + 1) / 2
    times = torch.full((len(unit), 1), float(step.batch["frame_times"]))
    probes = {}
    for points in (unit, torch.cat((unit, times), dim=1)):
        dims = points.shape[1]
        layout = GridLayout.from_config(dims, PAPER)
        for name, probe in floor_probes(points, layout).items():
            probes[f"{dims}D {name}"] = probe

    def floor() -> dict[str, float]:
        taken = {}
        for name, probe in probes.items():
            began = clock.now()
            probe()
            taken[name] = (clock.now() - began) * 1e3
        return taken

    return floor


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="count process time, not wall time")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("--json", type=Path, help="also store its figures in this file")
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    os.chdir(ROOT)
    device = torch.device(arguments.device)
    clock = StepClock(device, arguments.cpu_time)
    step = DenseStep(clock, device)
    facts = describe_circumstances(torch.get_num_threads())
    facts["clock"] = "process time" if arguments.cpu_time else "wall time"
    step()  # builds, allocates, and shows its points
    facts["points"] = len(step.points)
    facts["parameters"] = step.n_parameters
    floor = floor_of(step, clock) if device.type == "cpu" else None
    floors = []
    for _ in range(arguments.repeats):
        step()
        if floor is not None:
            floors.append(floor())
    steps = clock.steps[1:]
    lines = ["# Dense step of 64 x 64 rays x 64 samples", "", *as_lines(facts), ""]
    lines += ["| part | ms, median | best |", "|---|---|---|"]
    totals = [each["total"] for each in steps]
    for name in (*PARTS, "total"):
        values = [each.get(name.replace("loss,", "guidance,"), 0.0) for each in steps]
        lines.append(f"| {name} | {statistics.median(values):.1f} | {min(values):.1f} |")
    report: dict[str, Any] = {"benchmark": "dense_step", "circumstances": facts, "steps": steps}
    if floors:
        for name in floors[0]:
            values = [each[name] for each in floors]
            lines.append(f"| floor: {name} | {statistics.median(values):.1f} | {min(values):.1f} |")
        ratios = [total / sum(each.values()) for total, each in zip(totals, floors, strict=True)]
        report |= {"floors": floors, "ratios": ratios, "ratio": statistics.median(ratios)}
        verdict = "reached" if report["ratio"] <= BOUND else "not reached"
        best = min(totals) / min(sum(each.values()) for each in floors)
        lines.append("")
        lines.append(
            f"Step over its floor: median of the pairs {report['ratio']:.2f}, best over best "
            f"{best:.2f}; at most {BOUND} is asked: {verdict}."
        )
    text = "\n".join(lines) + "\n"
    print(text)
    figures = json.dumps(report, indent=1) + "\n"
    if arguments.json:
        arguments.json.write_text(figures, encoding="utf-8")
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        for suffix, content in (("md", text), ("json", figures)):
            result_path(f"dense_step_{device.type}", suffix).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
