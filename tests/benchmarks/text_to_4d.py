"""How right are moving scenes made from words, by stages 1 and 3 in a row, on twelve prompts?

    python tests/benchmarks/text_to_4d.py [--jobs 2] [--minutes 120] [--write] [key=value ...]

Each prompt trains in a process of its own by `launch.py --config stage_1 stage_3 --train
profile=embedded`. Its last checkpoint is filmed by eight cameras that neither validation nor the
final test uses, at sixteen times, over white, and compared with the world's exact clips: PSNR
beside that of the best picture that does not move and of the scene that stage 1 left, and how the
motion follows the truth's, in shape (correlation) and size (amplitude ratio). As text_to_3d.py
otherwise: finished runs in `runs.jsonl` are skipped, overrides reach every training and are
recorded (`2:key=value` reaches stage 3 alone), and `--write` stores report and contact sheet.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
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
from text_to_3d import Run, finished_rows, launch, parse_arguments, run_all  # noqa: E402
from text_to_3d_report import write_contact_sheet  # noqa: E402
from text_to_4d_report import markdown, summarise  # noqa: E402

from custom.fourd.world.grammar import parse_caption  # noqa: E402

STAGES = ("fourdfy_stage_1", "fourdfy_stage_3")
# Two of every motion, seen and held out in turn: an appearance, or a shape in that motion.
PROMPTS = (
    "a red cube bouncing",
    "a yellow sphere bouncing",
    "a cyan cube spinning",
    "a purple torus spinning",
    "a purple sphere orbiting",
    "a cyan pyramid orbiting",
    "a large striped green cylinder shrinking",
    "a yellow cone shrinking",
    "a blue sphere sliding",
    "a large blue sphere sliding next to a large red pyramid sliding",
    "a large purple cone growing next to a large blue sphere growing",
    "a pink cube growing",
)

N_AZIMUTHS, N_TIMES, SIZE_PX = 8, 16, 128
# Which of the cameras and times a picture shows: the front's neighbour, and a side.
SHEET_VIEWS, SHEET_TIMES = (0, 2), tuple(range(0, N_TIMES, 2))
SHEET_ROWS = 2 * len(SHEET_VIEWS)


def planned_runs(prompts: Sequence[str] = PROMPTS) -> list[Run]:
    """Return all runs."""
    return [Run(prompt, 0) for prompt in prompts]


def priors() -> list[str | None]:
    """Return the hashes of both embedded priors, which a figure depends on."""
    return [embedded_weights(model=model) for model in ("multiview", "video")]


def evaluate(checkpoint: Path, first_stage: Path, prompt: str, strip: Path) -> dict[str, Any]:
    """Compare a moving scene with the truth of its prompt.

    Args:
        checkpoint: the last one of stage 3.
        first_stage: that of stage 1, whose scene is at rest.
        strip: PNG to write: for each of two cameras a row of renders above one of truth.
    """
    import custom.fourd  # noqa: F401
    from custom.fourd.metrics.image_quality import alpha_iou, psnr, ssim
    from custom.fourd.metrics.motion import clip_psnr
    from custom.fourd.renderers.scene import load_scene
    from custom.fourd.systems.motion_evaluation import ViewTimeGrid, film, motion_metrics

    world, grid = parse_caption(prompt), ViewTimeGrid.around(N_AZIMUTHS, N_TIMES, SIZE_PX)
    truth = film(world, grid)
    clips = film(load_scene(checkpoint), grid)
    at_rest = film(load_scene(first_stage), ViewTimeGrid(grid.azimuths_deg, 1, SIZE_PX))
    _write_strip(strip, clips.rgb, truth.rgb)
    found = motion_metrics(world, clips, truth)
    images, true = clips.rgb.flatten(0, 1), truth.rgb.flatten(0, 1)
    return {
        "psnr": found["psnr_grid"],
        "psnr_best_static": found["psnr_best_static"],
        "psnr_stage_1": float(clip_psnr(at_rest.rgb.expand_as(truth.rgb), truth.rgb).mean()),
        "psnr_white": float(psnr(torch.ones_like(true), true).mean()),
        "psnr_first_frame": float(clip_psnr(clips.rgb[:, :1], truth.rgb[:, :1]).mean()),
        "psnr_min": float(psnr(images, true).min()),
        "ssim": float(ssim(images, true).mean()),
        "alpha_iou": float(
            alpha_iou(clips.alpha.flatten(0, 1), truth.alpha.flatten(0, 1)).mean()
        ),
        "correlation": found["motion_correlation"],
        "amplitude_ratio": found["motion_amplitude_ratio"],
        "motion": found["motion"],
    }


def train(
    run: Run, folder: Path, threads: int, overrides: Sequence[str]
) -> tuple[list[Path], float]:
    """Run the chained stages for a prompt; return their trials' folders and the wall seconds.

    Raises:
        RuntimeError: the command failed; the end of its log is quoted.
    """
    trials = [folder / "runs" / stage / run.tag for stage in STAGES]
    for trial in trials:
        shutil.rmtree(trial, ignore_errors=True)  # of a benchmark that was cut off
    arguments = [
        "--config", *(f"custom/configs/{stage}.yaml" for stage in STAGES), "--train",
        "profile=embedded", f"system.prompt_processor.prompt={run.prompt}", f"seed={run.seed}",
        f"exp_root_dir={folder / 'runs'}", f"tag={run.tag}", "use_timestamp=false", *overrides,
    ]  # fmt: skip
    return trials, launch(arguments, folder / "logs" / f"{run.tag}.log", threads)


def measure(run: Run, folder: Path, threads: int, overrides: Sequence[str]) -> dict[str, Any]:
    """Train and evaluate one run; return its line of `runs.jsonl`."""
    trials, wall_seconds = train(run, folder, threads, overrides)
    own = [
        json.loads((trial / "save" / "metrics.json").read_text(encoding="utf-8"))
        for trial in trials
    ]
    first, last = (trial / "ckpts" / "last.ckpt" for trial in trials)
    world = parse_caption(run.prompt)
    values = evaluate(last, first, run.prompt, strip_path(folder, run))
    return {
        "prompt": run.prompt,
        "seed": run.seed,
        "objects": len(world.objects),
        "held_out": world.is_held_out or world.has_held_out_motion,
        "held_out_appearance": world.is_held_out,
        "held_out_motion": world.has_held_out_motion,
        "overrides": list(overrides),
        "embedded_weights": priors(),
        "threads": threads,
        "steps": [stage["steps"] for stage in own],
        "seconds_stage_1": own[0]["seconds"],
        "seconds_stage_3": own[1]["seconds"],
        "seconds": round(own[0]["seconds"] + own[1]["seconds"], 2),
        "wall_seconds": round(wall_seconds, 1),
        "peak_memory_gb": max(stage["peak_memory_gb"] for stage in own),
        **{n: round(v, 4) if isinstance(v, float) else v for n, v in values.items()},
    }


def strip_path(folder: Path, run: Run) -> Path:
    """Return where the picture of a run lies."""
    return folder / "strips" / f"{run.tag}.png"


def _write_strip(path: Path, renders: torch.Tensor, truths: torch.Tensor) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        torch.cat([source[view, index] for index in SHEET_TIMES], dim=1)
        for view in SHEET_VIEWS
        for source in (renders, truths)
    ]
    picture = torch.cat(rows, dim=0).clamp(0, 1).flip(-1) * 255
    cv2.imwrite(str(path), picture.round().byte().numpy())


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments(
        name="text_to_4d", n_prompts=len(PROMPTS), description=__doc__.splitlines()[0]
    )
    folder, overrides = arguments.output.resolve(), arguments.overrides
    runs = planned_runs(PROMPTS[: arguments.prompts])
    done = finished_rows(folder, overrides, priors())
    missing = [run for run in runs if run not in done]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are finished in {arguments.output}.")
    torch.set_num_threads(arguments.threads)  # the evaluation shares the cores with trainings
    run_all(
        missing,
        folder,
        lambda run: measure(run, folder, arguments.threads, overrides),
        arguments.jobs,
        time.monotonic() + 60 * arguments.minutes,
    )
    done = finished_rows(folder, overrides, priors())
    rows = [done[run] for run in runs if run in done]
    if not rows:
        raise SystemExit("No run finished.")
    report = {
        "benchmark": "text_to_4d",
        "circumstances": describe_circumstances(arguments.threads)
        | {"embedded_weights": dict(zip(("multiview", "video"), priors(), strict=True))},
        "jobs": arguments.jobs,
        "planned_runs": len(runs),
        "views": f"{N_AZIMUTHS} azimuths from 11.25 degrees, elevation 15 degrees, "
        f"{N_TIMES} times from 0 to 1, {SIZE_PX} px",
        **summarise(rows),
        "runs": rows,
    }
    text = markdown(report, as_lines(report["circumstances"]))
    print(text)
    targets = {suffix: folder / f"report.{suffix}" for suffix in ("json", "md", "png")}
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        targets = {suffix: result_path("text_to_4d", suffix) for suffix in targets}
    targets["json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    targets["md"].write_text(text, encoding="utf-8")
    strips = {run.prompt: strip_path(folder, run) for run in runs if run in done}
    write_contact_sheet(targets["png"], strips, SHEET_ROWS)
    print(f"Written: {', '.join(str(path) for path in targets.values())}")


if __name__ == "__main__":
    main()
