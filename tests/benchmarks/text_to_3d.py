"""How right are scenes made from words, by the README's main command, on sixteen prompts?

    python tests/benchmarks/text_to_3d.py [--jobs 2] [--minutes 90] [--write] [key=value ...]

Each (prompt, seed) trains in a process of its own by `launch.py --train profile=embedded`, then its
last checkpoint is rendered from eight azimuths that neither validation nor the final test uses, at
three elevations, over fixed white, and compared with the world's exact images and with those of a
wrong prompt (every object's colour and shape changed). One line of JSON per finished run goes to
`runs.jsonl` in the output folder; the same command again skips what is finished there, so the
benchmark can be cut off and continued. `key=value` overrides reach every training and are
recorded. `--write` stores the report and a contact sheet under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import (  # noqa: E402
    RESULTS,
    as_lines,
    describe_circumstances,
    embedded_weights,
    result_path,
)
from text_to_3d_report import markdown, summarise, write_contact_sheet  # noqa: E402

from custom.fourd.world.grammar import WorldObject, WorldScene, parse_caption  # noqa: E402
from custom.fourd.world.vocabulary import COLOURS, SHAPES  # noqa: E402

CONFIG = "custom/configs/fourdfy_stage_1.yaml"
# Seen and held-out prompts in turn, so that the first few already hold both.
PROMPTS = (
    "a red cube",
    "a yellow sphere",
    "a red cube next to a blue sphere",
    "a blue cube next to a small orange cone",
    "a large purple cone",
    "a small blue cube",
    "a pink torus",
    "a green torus",
    "a pink cone on top of a large purple cylinder",
    "a yellow sphere on top of a cyan cylinder",
    "a small cyan sphere",
    "a red pyramid",
    "a striped green cylinder",
    "a large orange cylinder",
    "a green pyramid next to a yellow torus",
    "a red pyramid next to a large purple sphere",
)
SEEDS = (0,)
MORE_SEEDS = {prompt: (0, 1, 2) for prompt in PROMPTS[:4]}

# Validation stands at multiples of 90 degrees and the final test at multiples of 7.5.
AZIMUTHS_DEG = tuple(11.25 + 45.0 * i for i in range(8))
ELEVATIONS_DEG = (5.0, 15.0, 25.0)
SHEET_ELEVATION_DEG = 15.0
DISTANCE, FOVY_DEG, SIZE_PX = 3.0, 40.0, 128
VIEWS_AT_ONCE = 4
RUN_TIMEOUT_SEC = 45 * 60


@dataclass(frozen=True)
class Run:
    """One training of the benchmark."""

    prompt: str
    seed: int

    @property
    def tag(self) -> str:
        """Name of its output folder."""
        return f"{self.prompt.replace(' ', '_')}-seed{self.seed}"

    @property
    def label(self) -> str:
        """What a line about it calls it."""
        return f"{self.prompt} (seed {self.seed})"


def planned_runs(prompts: Sequence[str] = PROMPTS) -> list[Run]:
    """Return all runs; the first seed of every prompt comes before any further one."""
    runs = [(seed, Run(p, seed)) for p in prompts for seed in MORE_SEEDS.get(p, SEEDS)]
    return [run for _, run in sorted(runs, key=lambda item: item[0] != 0)]


def wrong_prompt(prompt: str) -> str:
    """Return the prompt with the colour and the shape of every object changed."""
    scene = parse_caption(prompt)
    colours = tuple(COLOURS)

    def changed(item: WorldObject) -> WorldObject:
        shape = SHAPES[(SHAPES.index(item.shape) + 1) % len(SHAPES)]
        colour = colours[(colours.index(item.colour) + 3) % len(colours)]
        return WorldObject(shape, colour, item.size, item.material, item.motion)

    return WorldScene(tuple(changed(item) for item in scene.objects), scene.relation).caption


def evaluation_cameras() -> tuple[torch.Tensor, torch.Tensor]:
    """Return c2w [24, 4, 4] and fovy [24] in radians, elevation by elevation."""
    from custom.fourd.ops.camera import camera_from_orbit

    elevations = torch.tensor([e for e in ELEVATIONS_DEG for _ in AZIMUTHS_DEG])
    azimuths = torch.tensor(AZIMUTHS_DEG).repeat(len(ELEVATIONS_DEG))
    c2w = camera_from_orbit(elevations, azimuths, torch.full_like(azimuths, DISTANCE))
    return c2w, torch.full_like(azimuths, math.radians(FOVY_DEG))


def evaluate(checkpoint: Path, prompt: str, strip: Path) -> dict[str, Any]:
    """Compare a trained scene with the truth of its prompt and of a wrong one.

    Args:
        checkpoint: the last checkpoint of a run.
        strip: PNG to write: one row of renders above one of truth.
    """
    import custom.fourd  # noqa: F401
    from custom.fourd.renderers.scene import load_scene
    from custom.fourd.systems.world_evaluation import WorldEvaluation

    scene = load_scene(checkpoint)
    right = WorldEvaluation(parse_caption(prompt))
    wrong = WorldEvaluation(parse_caption(wrong_prompt(prompt)))
    c2w, fovy = evaluation_cameras()
    white = torch.ones(3)
    renders, truths = [], []
    for first in range(0, len(c2w), VIEWS_AT_ONCE):
        part = slice(first, first + VIEWS_AT_ONCE)
        images = scene.render(c2w[part], fovy[part], SIZE_PX, SIZE_PX, background=white)
        truths.append(right.add(images, c2w[part], fovy[part]))
        wrong.add(images, c2w[part], fovy[part])
        renders.append(images.rgb)
    first = ELEVATIONS_DEG.index(SHEET_ELEVATION_DEG) * len(AZIMUTHS_DEG)
    shown = slice(first, first + len(AZIMUTHS_DEG))
    _write_strip(strip, torch.cat(renders)[shown], torch.cat(truths)[shown])
    values = right.summary()
    return values | {"psnr_wrong_prompt": wrong.summary()["psnr"]}


def train(run: Run, folder: Path, threads: int, overrides: Sequence[str]) -> tuple[Path, float]:
    """Run the main command for a prompt; return its trial's folder and the wall seconds.

    Raises:
        RuntimeError: the command failed; the end of its log is quoted.
    """
    trial = folder / "runs" / "text_to_3d" / run.tag
    shutil.rmtree(trial, ignore_errors=True)  # of a benchmark that was cut off
    arguments = [
        "--config", CONFIG, "--train", "profile=embedded",
        f"system.prompt_processor.prompt={run.prompt}", f"seed={run.seed}",
        f"exp_root_dir={folder / 'runs'}", "name=text_to_3d", f"tag={run.tag}",
        "use_timestamp=false", *overrides,
    ]  # fmt: skip
    return trial, launch(arguments, folder / "logs" / f"{run.tag}.log", threads)


def launch(arguments: Sequence[str], log: Path, threads: int) -> float:
    """Run `launch.py` in a process of its own; return the wall seconds.

    Raises:
        RuntimeError: it failed; the end of its log is quoted.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "launch.py", *arguments]
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=out, stderr=out, timeout=RUN_TIMEOUT_SEC
        ).returncode
    if status != 0:
        end = log.read_text(encoding="utf-8", errors="replace")[-800:]
        raise RuntimeError(f"{log.stem} exited with {status}:\n{end}")
    return time.monotonic() - started


def measure(run: Run, folder: Path, threads: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate one run; return its line of `runs.jsonl`."""
    trial, wall_seconds = train(run, folder, threads, overrides)
    own = json.loads((trial / "save" / "metrics.json").read_text(encoding="utf-8"))
    scene = parse_caption(run.prompt)
    values = evaluate(trial / "ckpts" / "last.ckpt", run.prompt, strip_path(folder, run))
    return {
        "prompt": run.prompt,
        "seed": run.seed,
        "objects": len(scene.objects),
        "held_out": scene.is_held_out,
        "wrong_prompt": wrong_prompt(run.prompt),
        "overrides": list(overrides),
        "embedded_weights": embedded_weights(),
        "threads": threads,
        "steps": own["steps"],
        "seconds": own["seconds"],
        "steps_per_second": round(own["steps"] / own["seconds"], 3),
        "wall_seconds": round(wall_seconds, 1),
        "peak_memory_gb": own["peak_memory_gb"],
        **{name: round(value, 4) for name, value in values.items()},
    }


def strip_path(folder: Path, run: Run) -> Path:
    """Return where the picture of a run lies."""
    return folder / "strips" / f"{run.tag}.png"


def run_of(row: dict[str, Any]) -> Run:
    """Return the run that a line of `runs.jsonl` is of."""
    return Run(row["prompt"], row["seed"])


def finished_rows(
    folder: Path,
    overrides: Sequence[str],
    weights: Any = None,
    run_of: Callable[[dict[str, Any]], Any] = run_of,
) -> dict[Any, dict[str, Any]]:
    """Return the finished runs that were made with these overrides and these embedded weights.

    Args:
        weights: what a row's `embedded_weights` must be; None takes those of the multi-view prior.
        run_of: makes the keys of the result.
    """
    weights = embedded_weights() if weights is None else weights
    path = folder / "runs.jsonl"
    rows: dict[Any, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the last line of a run that was killed while writing it
        if (row["overrides"], row["embedded_weights"]) == (list(overrides), weights):
            rows[run_of(row)] = row
    return rows


def told(row: dict[str, Any]) -> str:
    """Return what a finished run's line on the screen says before the run's name."""
    return (
        f"{row['psnr']:6.2f} dB (white {row['psnr_white']:5.2f}), IoU {row['alpha_iou']:.3f}, "
        f"{row['seconds']:.0f} s"
    )


def run_all(
    runs: Sequence[Any],
    folder: Path,
    job: Callable[[Any], dict[str, Any]],
    jobs: int,
    deadline: float,
    told: Callable[[dict[str, Any]], str] = told,
) -> None:
    """Run what is not finished, `jobs` at a time, and append each row as it is done.

    No run starts after ``deadline`` (monotonic seconds). A run that fails is reported and left out.
    """

    def one(run: Any) -> None:
        if time.monotonic() > deadline:
            return
        try:
            row = job(run)
        except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as error:
            print(f"FAILED {run.label}: {error}", flush=True)
            return
        with (folder / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{told(row)}  {run.label}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, runs))


def _write_strip(path: Path, renders: torch.Tensor, truths: torch.Tensor) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = torch.cat([torch.cat(list(row), dim=1) for row in (renders.cpu(), truths)], dim=0)
    cv2.imwrite(str(path), (rows.clamp(0, 1).flip(-1) * 255).round().byte().numpy())


def parse_arguments(
    argv: Sequence[str] | None = None,
    name: str = "text_to_3d",
    n_prompts: int = len(PROMPTS),
    description: str | None = None,
) -> argparse.Namespace:
    """Read the command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description or __doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks", name))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--threads", type=int, help="threads each; default: cores / jobs")
    parser.add_argument("--minutes", type=float, default=90, help="start no run after this")
    parser.add_argument("--prompts", type=int, default=n_prompts, help="only the first N")
    parser.add_argument("--steps", type=int, help="trainer.max_steps, for a trial of the script")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None:
        arguments.overrides.append(f"trainer.max_steps={arguments.steps}")
    arguments.threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)
    return arguments


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    folder, overrides = arguments.output.resolve(), arguments.overrides
    runs = planned_runs(PROMPTS[: arguments.prompts])
    done = finished_rows(folder, overrides)
    missing = [run for run in runs if run not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished in {arguments.output}.")
    torch.set_num_threads(arguments.threads)  # the evaluation shares the cores with trainings
    started = time.monotonic()
    run_all(
        missing,
        folder,
        lambda run: measure(run, folder, arguments.threads, overrides),
        arguments.jobs,
        started + 60 * arguments.minutes,
    )
    done = finished_rows(folder, overrides)
    rows = [done[run] for run in runs if run in done]
    if not rows:
        raise SystemExit("No run finished.")
    report = {
        "benchmark": "text_to_3d",
        "circumstances": describe_circumstances(arguments.threads),
        "jobs": arguments.jobs,
        "planned_runs": len(runs),
        "views": f"azimuths {AZIMUTHS_DEG}, elevations {ELEVATIONS_DEG} degrees, {SIZE_PX} px",
        **summarise(rows),
        "runs": rows,
    }
    text = markdown(report, as_lines(report["circumstances"]))
    print(text)
    shown = [run for run in runs if run.seed == 0 and run in done]
    targets = {suffix: folder / f"report.{suffix}" for suffix in ("json", "md", "png")}
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        targets = {suffix: result_path("text_to_3d", suffix) for suffix in targets}
    targets["json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    targets["md"].write_text(text, encoding="utf-8")
    write_contact_sheet(targets["png"], {run.prompt: strip_path(folder, run) for run in shown})
    print(f"Written: {', '.join(str(path) for path in targets.values())}")


if __name__ == "__main__":
    main()
