"""A training step of 4D-fy's stage 3: steps and rays per second, where the time goes, peak memory.

    python tests/benchmarks/stage_3_step.py [--steps 60] [--backends cpu torch] [key=value ...]
    python tests/benchmarks/stage_3_step.py --clip [--device cuda]

Stage 1 is trained for some steps first, so that the occupancy is that of a scene. Then the steps of
stage 3, view groups and clips by turns, are timed with the embedded priors and without guidance,
where a plain mean of the squared image stands for it, on each back end of the hash grid; without
guidance also with each sampler, nerfacc's where it is installed beside a GPU. Peak memory is what a
GPU allocated at most in a case; on a CPU it is the process's so far. `--clip` times clips of 16
frames at 288 x 160 alone, without guidance, in the published grid: the rendering of a video step.
`--cpu-time` counts the time that the process itself was running, for one thread on a busy machine.
`--write` stores the report under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import RESULTS, as_lines, describe_circumstances, result_path  # noqa: E402
from step_clock import StepClock, bare_loop, lines_of, plan, warm_up_steps  # noqa: E402

STAGE_1 = "custom/configs/fourdfy_stage_1.yaml"
STAGE_3 = "custom/configs/fourdfy_stage_3.yaml"
BACKEND = "system.geometry.pos_encoding_config.backend"
SAMPLER = "system.renderer.sampler"
RENDERING = ("rendering, forward", "rendering, backward")
PUBLISHED_GRID = (
    "system.geometry.pos_encoding_config.n_levels=16",
    "system.geometry.pos_encoding_config.log2_hashmap_size=19",
    "system.geometry.pos_encoding_config.base_resolution=16",
    "system.geometry.pos_encoding_config.per_level_scale=1.447269237440378",
    "system.renderer.num_samples_per_ray=256",
)
CLIPS = (
    "data.prob_multi_view=0.0",
    "data.single_view.num_frames=16",
    "data.single_view.width_vid=288",
    "data.single_view.height_vid=160",
)


def without_guidance(system: Any) -> None:
    """Let the mean of the squared images stand for every prior."""

    def drawn(kind: str) -> tuple[Any, None]:
        name = "loss_sds_video" if kind == "video" else "loss_sds"
        return lambda rgb, *_, **__: {name: rgb.square().mean()}, None

    system.drawn_guidance = drawn


def scene_at_rest(given: list[str], n_steps: int, device: torch.device, folder: Path) -> Path:
    """Train stage 1 for some steps and return its checkpoint."""
    cfg = plan(ROOT, STAGE_1, given, folder)
    clock = StepClock(device)
    system = bare_loop(cfg, n_steps, clock, device=device)
    path = folder / "at_rest.ckpt"
    state = {"state_dict": system.state_dict(), "epoch": 0, "global_step": n_steps}
    torch.save(state, path)
    return path


def measure(
    arguments: argparse.Namespace,
    given: list[str],
    folder: Path,
    backend: str,
    sampler: str,
    guided: bool,
) -> dict[str, Any]:
    """Take the steps of one case; return its times by kind of step, its rates and its memory."""
    device = torch.device(arguments.device)
    own = [f"{BACKEND}={backend}", f"{SAMPLER}={sampler}"]
    cfg = plan(ROOT, STAGE_3, [*given, *own], folder)
    clock = StepClock(device, arguments.cpu_time)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    bare_loop(cfg, arguments.steps, clock, None if guided else without_guidance, device)
    kinds = sorted({step["kind"] for step in clock.kept() if "kind" in step})
    steps = clock.kept()
    own_ms = sum(sum(step.get(name, 0.0) for name in RENDERING) for step in steps)
    rays = sum(step["rays"] for step in steps)
    return {
        "backend": backend,
        "sampler": sampler,
        "guided": guided,
        "tables": {"all": clock.table(), **{kind: clock.table(kind) for kind in kinds}},
        "steps_of_kind": {kind: len(clock.kept(kind)) for kind in kinds},
        "rays_per_step": rays / len(steps),
        "samples_per_step": sum(step["samples"] for step in steps) / len(steps),
        "rays_per_second_of_step": rays / sum(step["total"] for step in steps) * 1e3,
        "rays_per_second_of_rendering": rays / own_ms * 1e3,
        "peak_memory_mib": peak_memory_mib(device),
    }


def peak_memory_mib(device: torch.device) -> float:
    """Return what the GPU held at most in this case, or the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def text_of(case: dict[str, Any]) -> list[str]:
    """Return a case as Markdown."""
    title = "with the embedded priors" if case["guided"] else "without guidance"
    counts = ", ".join(f"{count} {kind}" for kind, count in case["steps_of_kind"].items())
    return [
        f"## Grid back end {case['backend']}, sampler {case['sampler']}, {title}",
        "",
        *lines_of(case["tables"]),
        "",
        f"- steps counted: {counts}",
        f"- rays per step: {case['rays_per_step']:.0f}; samples: {case['samples_per_step']:.0f}",
        f"- rays per second of the whole step: {case['rays_per_second_of_step']:.0f}; "
        f"of rendering, forward and backward: {case['rays_per_second_of_rendering']:.0f}",
        f"- peak memory: {case['peak_memory_mib']:.0f} MiB",
        "",
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=60, help="steps of each case")
    parser.add_argument("--stage-1-steps", type=int, default=60, help="steps of the scene at rest")
    parser.add_argument("--backends", nargs="+", help="of the hash grid; default: all but the twin")
    parser.add_argument("--samplers", nargs="+", help="of the renderer; default: auto and nerfacc")
    parser.add_argument("--clip", action="store_true", help="16 frames at 288 x 160, no guidance")
    parser.add_argument("--cpu-time", action="store_true", help="count process time, not wall time")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", default=[])
    return parser.parse_intermixed_args()


def default_backends(device: torch.device) -> list[str]:
    """Return every back end that serves this device, the slow twin only where it is alone."""
    from threestudio.kernels import GridLayout
    from threestudio.kernels.hash_grid import available_backends

    layout = GridLayout.from_config(3, {"n_levels": 2, "log2_hashmap_size": 8})
    found = available_backends(layout, device, torch.float32)
    return [name for name in found if name != "torch"] or found


def default_samplers(device: torch.device) -> list[str]:
    """Return what the renderer takes by itself, and nerfacc where it can march."""
    from threestudio.stand_ins.finder import is_installed

    has_nerfacc = device.type == "cuda" and is_installed("nerfacc")
    return ["auto", "nerfacc"] if has_nerfacc else ["auto"]


def cases_of(
    backends: list[str], samplers: list[str], with_guidance: bool
) -> list[tuple[str, str, bool]]:
    """Return back end, sampler and whether the priors guide of every case.

    What the priors take does not depend on the sampler: they guide with the first alone.
    """
    guided = [(backend, samplers[0], True) for backend in backends if with_guidance]
    return guided + [(backend, sampler, False) for backend in backends for sampler in samplers]


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.chdir(ROOT)
    device = torch.device(arguments.device)
    facts = describe_circumstances(torch.get_num_threads())
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    given = [*(PUBLISHED_GRID if arguments.clip else ()), *arguments.overrides]
    cases = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = scene_at_rest(given, arguments.stage_1_steps, device, folder)
        given = [f"system.weights={weights}", *(CLIPS if arguments.clip else ()), *given]
        backends = arguments.backends or default_backends(device)
        samplers = arguments.samplers or default_samplers(device)
        for backend, sampler, guided in cases_of(backends, samplers, not arguments.clip):
            cases.append(measure(arguments, given, folder, backend, sampler, guided))
    what = "stage_3_clip" if arguments.clip else "stage_3_step"
    lines = [
        f"# One step of stage 3, {facts['date']}",
        "",
        *as_lines(facts),
        f"- {arguments.steps} steps after {arguments.stage_1_steps} of stage 1; the first "
        f"{warm_up_steps(arguments.steps)} are left out of the means",
        "",
    ]
    for case in cases:
        lines += text_of(case)
    text = "\n".join(lines)
    print(text)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        report = {"benchmark": what, "circumstances": facts, "cases": cases}
        for suffix, content in (("md", text), ("json", json.dumps(report, indent=1) + "\n")):
            result_path(f"{what}_{device.type}", suffix).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
