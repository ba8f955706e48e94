"""How right is time and view control taught by moving scenes, and what does each part of it give?

    python tests/benchmarks/time_view.py [--jobs 2] [--minutes 150] [--write] [key=value ...]
    python tests/benchmarks/time_view.py --ablations [--jobs 2] [--write] [key=value ...]

Each of six scenes of the world trains in a process of its own by `launch.py --config
time_view_mapper --train profile=embedded`, on every other frame and three of four azimuths. What it
scores at its end, unseen cells at least 4 frames or 45 degrees from their source, is what counts:
PSNR beside copied sources, the image prompt alone, controls alone and oracle tokens; the time and
the azimuth that images show; what turned signs do; and the cell that asks for no change.

`--ablations` trains variants on one scene instead, and tests the compositions of one training and
the schedule (time alone, view alone, both composed untrained, both trained on). As text_to_3d.py
otherwise: finished runs in `runs.jsonl` are skipped, overrides reach every training and are
recorded, `--prompts N` takes the first N scenes (or variants), and `--write` stores report and
contact sheet.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import (  # noqa: E402
    ASSET_MANIFEST,
    RESULTS,
    as_lines,
    describe_circumstances,
    embedded_weights,
    result_path,
)
from text_to_3d import finished_rows, launch, run_all  # noqa: E402
from text_to_3d_report import write_contact_sheet  # noqa: E402
from time_view_report import above_copy, markdown, summarise  # noqa: E402

from custom.fourd.world.grammar import parse_caption  # noqa: E402

# Seen and held out in turn; every motion word once.
SCENES = (
    "a red cube bouncing",
    "a pink cube growing",
    "a purple cube orbiting",
    "a large blue sphere sliding next to a large red pyramid sliding",
    "a cyan cube spinning",
    "a yellow cone shrinking",
)
ABLATED = "a purple cube orbiting"
FULL = "full"
TRAINED = {
    FULL: (),
    "base alone": ("system.mapper.outputs=base",),
    "bypass alone": ("system.mapper.outputs=bypass",),
    "literal bypass": ("system.injection.mode=literal",),
    "unconstrained bypass": ("system.injection.mode=unconstrained",),
    "alpha 0.05": ("system.injection.bypass_strength=0.05",),
    "alpha 1": ("system.injection.bypass_strength=1.0",),
    "alpha 5": ("system.injection.bypass_strength=5.0",),
    "absolute": ("system.mapper.time_input=absolute", "system.mapper.view_input=absolute"),
    "relative": ("system.mapper.time_input=relative", "system.mapper.view_input=relative"),
    "relative, unsigned": (
        "system.mapper.time_input=relative", "system.mapper.view_input=relative",
        "system.mapper.time_distance=unsigned",
    ),
    "adapter scale 0.3": ("system.ip_adapter.scale=0.3",),
    "adapter scale 0.8": ("system.ip_adapter.scale=0.8",),
    "sigma of step 15": ("system.mapper.sigma_step=15",),
    "sigma of time 1": ("system.mapper.sigma_time=1",),
    "sigma of time 15": ("system.mapper.sigma_time=15",),
    "sigma of view 4": ("system.mapper.sigma_view=4",),
    "encoding of arch 15": ("system.mapper.encoding=legacy_arch15",),
    "one joint token": ("system.compose.mode=joint_token",),
}  # fmt: skip
TESTED = {
    "composed by attention": ("system.compose.mode=attention",),
    "composed by guidance": ("system.compose.mode=guidance",),
}
"""Tests of what `FULL` trained."""
SCHEDULE = ("time alone (A)", "view alone (B)", "A and B, composed", "A and B, then both (C)")
VARIANTS = (*TRAINED, *TESTED, *SCHEDULE)
MODEL = "image"
CONFIG, CONFIG_A, CONFIG_B = "time_view_mapper", "time_mapper", "view_mapper"
N_TIMES, N_VIEWS, SIZE_PX = 8, 4, 64
SHEET_VIEWS = (0, 1)
SHEET_ROWS = 2 * len(SHEET_VIEWS)


@dataclass(frozen=True)
class Run:
    """One training or test."""

    scene: str
    variant: str = FULL

    @property
    def tag(self) -> str:
        """Name of its output folder."""
        return f"{self.scene}-{self.variant}".replace(" ", "_").replace(",", "")

    @property
    def label(self) -> str:
        """What a line about it calls it."""
        return f"{self.scene} ({self.variant})"


def trial_of(folder: Path, run: Run) -> Path:
    """Return where a run writes."""
    return folder / "runs" / "time_view" / run.tag


def mapper_of(folder: Path, run: Run, kind: str) -> Path:
    """Return the last mapper of a kind that a run wrote.

    Raises:
        RuntimeError: there is none: the run has not finished.
    """
    found = sorted(
        (trial_of(folder, run) / "save").glob(f"{kind}-mapper-step-*.safetensors"),
        key=lambda path: int(path.stem.rsplit("-", 1)[-1]),
    )
    if not found:
        raise RuntimeError(f"{run.label} left no {kind} mapper; run it first.")
    return found[-1]


def command(run: Run, folder: Path, overrides: Sequence[str]) -> list[str]:
    """Return the arguments of `launch.py` for a run."""
    config, mode, own = CONFIG, "--train", list(TRAINED.get(run.variant, ()))
    if run.variant in TESTED:
        trained = trial_of(folder, Run(run.scene)) / "ckpts" / "last.ckpt"
        mode, own = "--test", [f"resume={trained}", *TESTED[run.variant]]
    elif run.variant in SCHEDULE:
        place = SCHEDULE.index(run.variant)
        config = (CONFIG_A, CONFIG_B, CONFIG, CONFIG)[place]
        if place >= 2:
            files = [mapper_of(folder, Run(run.scene, SCHEDULE[i]), kind)
                     for i, kind in enumerate(("time", "view"))]  # fmt: skip
            own = [f"system.mapper_weights=[{','.join(str(file) for file in files)}]"]
            mode = "--test" if place == 2 else "--train"
    if run.variant == FULL:
        own.append("system.evaluation.baselines=[copy,image_only,control_only,oracle]")
    return [
        "--config", f"custom/configs/{config}.yaml", mode, "profile=embedded",
        f'data.scenes=["{run.scene}"]', "data.eval_batch_size=8",
        f"system.grid.n_times={N_TIMES}", f"system.grid.n_views={N_VIEWS}",
        f"exp_root_dir={folder / 'runs'}", "name=time_view", f"tag={run.tag}",
        "use_timestamp=false", *own, *overrides,
    ]  # fmt: skip


def measure(run: Run, folder: Path, threads: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and test one run; return its line of `runs.jsonl`."""
    trial = trial_of(folder, run)
    arguments = command(run, folder, overrides)
    shutil.rmtree(trial, ignore_errors=True)  # of a benchmark that was cut off
    wall_seconds = launch(arguments, folder / "logs" / f"{run.tag}.log", threads)
    own = json.loads((trial / "save" / "metrics.json").read_text(encoding="utf-8"))
    for grid in own["grids"][:1]:
        write_strip(strip_path(folder, run), trial / "save" / grid["folder"] / "sheet.png")
    scene = parse_caption(run.scene)
    names = ("protocols", "control", "reversal", "identity", "feature_space", "absent", "steps",
             "seconds", "compose")  # fmt: skip
    return {
        "scene": run.scene,
        "variant": run.variant,
        "held_out": scene.is_held_out or scene.has_held_out_motion,
        "overrides": list(overrides),
        "embedded_weights": weights(),
        "threads": threads,
        "wall_seconds": round(wall_seconds, 1),
        **{name: rounded(own[name]) for name in names},
    }


def weights() -> str | None:
    """Hash of the embedded image model, or of the multi-view one where there is none."""
    manifest = json.loads(ASSET_MANIFEST.read_text(encoding="utf-8"))
    return embedded_weights(model=MODEL if MODEL in manifest else "multiview")


def rounded(values: Any) -> Any:
    """Numbers of nested mappings to five places."""
    if isinstance(values, dict):
        return {key: rounded(value) for key, value in values.items()}
    return round(values, 5) if isinstance(values, float) else values


def strip_path(folder: Path, run: Run) -> Path:
    """Return where the picture of a run lies."""
    return folder / "strips" / f"{run.tag}.png"


def write_strip(path: Path, sheet: Path) -> None:
    """Write, for some views of a grid's sheet, a row of generated cells above one of the truth."""
    import cv2
    import numpy as np

    picture = cv2.imread(str(sheet))
    if picture is None:
        return
    n_rows = max(1, round(picture.shape[0] / SIZE_PX))
    width = (picture.shape[1] // SIZE_PX - 1) // 2 * SIZE_PX
    rows = []
    for view in SHEET_VIEWS:
        place = min(view, n_rows - 1) * SIZE_PX
        row = picture[place : place + SIZE_PX]
        rows += [row[:, :width], row[:, width + SIZE_PX :]]
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.concatenate(rows))


def told(row: dict[str, Any]) -> str:
    """Return what a finished run's line on the screen says before the run's name."""
    parts = [f"{k} {v:+.2f}" for k in row["protocols"] if (v := above_copy(row, k)) is not None]
    return f"above copy, dB: {', '.join(parts) or 'unknown'}; {row['wall_seconds']:.0f} s"


def planned_runs(ablations: bool, count: int | None = None) -> list[Run]:
    """Return all runs; those that others need come first."""
    if ablations:
        return [Run(ABLATED, variant) for variant in VARIANTS][:count]
    return [Run(scene) for scene in SCENES][:count]


def run_batches(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that may go at the same time, in order: what is trained on others' results is last."""
    late = {*TESTED, *SCHEDULE[2:]}
    batches = [
        [run for run in runs if run.variant not in late],
        [run for run in runs if run.variant in late],
    ]
    return [batch for batch in batches if batch]


def run_of(row: dict[str, Any]) -> Run:
    """Return the run that a line of `runs.jsonl` is of."""
    return Run(row["scene"], row["variant"])


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ablations", action="store_true", help="variants on one scene")
    parser.add_argument("--output", type=Path, help="default: below outputs/benchmarks")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, help="threads each; default: cores / jobs")
    parser.add_argument("--minutes", type=float, default=150, help="start no run after this")
    parser.add_argument("--prompts", type=int, help="only the first N scenes or variants")
    parser.add_argument("--steps", type=int, help="trainer.max_steps, for a trial of the script")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args(argv)
    if arguments.steps is not None:
        arguments.overrides.append(f"trainer.max_steps={arguments.steps}")
    arguments.threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)
    name = report_name(arguments.ablations)
    arguments.output = arguments.output or Path("outputs/benchmarks", name)
    return arguments


def report_name(ablations: bool) -> str:
    """Name of the result files."""
    return "time_view_ablations" if ablations else "time_view"


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments()
    folder, overrides = arguments.output.resolve(), arguments.overrides
    runs = planned_runs(arguments.ablations, arguments.prompts)
    deadline = time.monotonic() + 60 * arguments.minutes

    def done() -> dict[Run, dict[str, Any]]:
        return finished_rows(folder, overrides, weights(), run_of)

    print(f"{sum(run in done() for run in runs)} of {len(runs)} runs are finished in "
          f"{arguments.output}.")  # fmt: skip
    for batch in run_batches(runs):
        missing = [run for run in batch if run not in done()]
        run_all(
            missing, folder, lambda run: measure(run, folder, arguments.threads, overrides),
            arguments.jobs, deadline, told,
        )  # fmt: skip
    finished = done()
    rows = [finished[run] for run in runs if run in finished]
    if not rows:
        raise SystemExit("No run finished.")
    write_report(arguments, folder, rows, runs)


def write_report(
    arguments: argparse.Namespace, folder: Path, rows: list[dict[str, Any]], runs: list[Run]
) -> None:
    """Write report and contact sheet, under results/ if asked to, and print the report."""
    name = report_name(arguments.ablations)
    report = {
        "benchmark": name,
        "circumstances": describe_circumstances(arguments.threads)
        | {"embedded_weights": weights()},
        "jobs": arguments.jobs,
        "planned_runs": len(runs),
        "scored": "unseen cells at least 4 of 16 frames or 45 degrees from their source, "
        f"16 of each protocol and scene, {SIZE_PX} px",
        "feature_space": rows[0]["feature_space"],
        "absent": rows[0]["absent"],
        **({} if arguments.ablations else summarise(rows)),
        "runs": rows,
    }
    text = markdown(report, as_lines(report["circumstances"]))
    print(text)
    targets = {suffix: folder / f"report.{suffix}" for suffix in ("json", "md", "png")}
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        targets = {suffix: result_path(name, suffix) for suffix in targets}
    targets["json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    targets["md"].write_text(text, encoding="utf-8")
    finished = [run_of(row) for row in rows]
    strips = {
        run.variant if arguments.ablations else run.scene: strip_path(folder, run)
        for run in finished
        if strip_path(folder, run).is_file()
    }
    if strips:
        write_contact_sheet(targets["png"], strips, SHEET_ROWS)
    print(f"Written: {', '.join(str(path) for path in targets.values())}")


if __name__ == "__main__":
    main()
