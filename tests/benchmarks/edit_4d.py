"""How right are edits of moving scenes by a sentence, and what does each part of the method give?

    python tests/benchmarks/edit_4d.py [--jobs 2] [--minutes 90] [--write] [key=value ...]

Two scenes of the world are written as DyNeRF's folders are (8 cameras on an arc of 60 degrees, the
held-out one inside, 16 frames, 64 px) and fitted by `launch.py --config instruct4d_train --train
profile=embedded`. Each of six instructions then runs four times from the fit by `--config
instruct4d_edit`: whole, without flow, without depth, and frame by frame without an anchor. The
edited field is compared on the held-out camera at all times with the true edited world; how well
renders agree along the true motion and between cameras is what the run itself measured. As
text_to_3d.py otherwise: finished runs in `runs.jsonl` are skipped, overrides reach every edit (not
the fits) and are recorded, `--prompts N` takes the first N instructions, and `--write` stores
report and contact sheet.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
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
from edit_4d_report import (  # noqa: E402
    FRAME_BY_FRAME,
    FULL,
    LOOKS,
    SEVERAL,
    SHAPES,
    VARIANTS,
    markdown,
    summarise,
)
from text_to_3d import finished_rows, launch, parse_arguments, run_all  # noqa: E402
from text_to_3d_report import write_contact_sheet  # noqa: E402

from custom.fourd.metrics.image_quality import psnr  # noqa: E402
from custom.fourd.metrics.warp_consistency import mean_of, warped_difference  # noqa: E402
from custom.fourd.world.capture import WorldCapture, read_truth  # noqa: E402
from custom.fourd.world.edits import EditedScene, is_held_out_edit, parse_instruction  # noqa: E402
from custom.fourd.world.grammar import parse_caption  # noqa: E402
from custom.fourd.world.render import flow  # noqa: E402
from custom.fourd.world.writers import write_dynerf  # noqa: E402

CUBE, PAIR = "a large red cube spinning", "a green cube sliding next to a large purple sphere"
# The first two already hold a colour and a style; two are held out, one has several answers.
EDITS = (
    (CUBE, "make it green"),
    (CUBE, "make it look like a van gogh painting"),
    (PAIR, "turn the sphere into a cone"),
    (CUBE, "give it a random palette"),
    (PAIR, "make it yellow"),
    (CUBE, "turn it into a cylinder"),
)
KEYS = {
    "full": (),
    "no flow": ("system.edit.use_flow=false",),
    "no depth": ("system.edit.use_depth=false",),
    "frame by frame": (
        "system.edit.order=frame_wise",
        # What is published for it, whatever the profile.
        "system.edit.refine_num_steps=1000",
        "system.edit.refine_diffusion_steps=20",
        "system.guidance.timestep_spacing=leading",
        "system.guidance.shared_noise=0.0",
    ),
}
N_CAMERAS, N_TIMES, SIZE_PX = 8, 16, 64
NO_WEIGHTS: list[str] = []
"""What a fit depends on: no diffusion model."""
SHEET_TIMES = tuple(range(0, N_TIMES, 2))
SHEET_ROWS = 3


@dataclass(frozen=True)
class Fit:
    """A field that is fitted to the videos of a scene."""

    caption: str

    @property
    def tag(self) -> str:
        """Name of its output folder."""
        return self.caption.replace(" ", "_")

    @property
    def label(self) -> str:
        """What a line about it calls it."""
        return self.caption


@dataclass(frozen=True)
class Edit:
    """One edit of a fitted scene, by the whole method or a part of it."""

    caption: str
    instruction: str
    variant: str = FULL

    @property
    def tag(self) -> str:
        """Name of its output folder."""
        words = f"{self.instruction}-{self.variant}".replace(" ", "_")
        return f"{Fit(self.caption).tag}-{words}"

    @property
    def label(self) -> str:
        """What a line about it calls it."""
        return f"{self.instruction} ({self.variant})  <-  {self.caption}"


def planned_edits(edits: Sequence[tuple[str, str]] = EDITS) -> list[Edit]:
    """Return all edits: the whole method's first, then the baseline's, then parts left out."""
    order = sorted(VARIANTS, key=lambda variant: (variant != FULL, variant != FRAME_BY_FRAME))
    return [Edit(*edit, variant) for variant in order for edit in edits]


def answers_of(edit: Edit) -> tuple[EditedScene, ...]:
    """Return every scene that the instruction may make."""
    return parse_instruction(edit.instruction).answers(parse_caption(edit.caption))


def is_held_out(edit: Edit) -> bool:
    """Return whether the edit model was trained on none of the answers."""
    before = parse_caption(edit.caption)
    return all(is_held_out_edit(before, answer) for answer in answers_of(edit))


def group_of(edit: Edit) -> str:
    """Return which requirement the instruction belongs to."""
    instruction = parse_instruction(edit.instruction)
    if instruction.random is not None:
        return SEVERAL
    return SHAPES if instruction.shape is not None else LOOKS


# The truth


def camera_rows(capture: WorldCapture, camera: int) -> torch.Tensor:
    """Return the rows of one camera, by time; camera 0 is the held-out one."""
    rows = torch.nonzero(capture.camera_ids == camera).flatten()
    return rows[capture.time_ids[rows].argsort()]


def true_frames(capture: WorldCapture, rows: torch.Tensor, answer: EditedScene) -> torch.Tensor:
    """Return the true edited frames of some rows, [r h w 3]."""
    fovy = torch.full((len(rows),), capture.fovy_rad)
    times, background = capture.frame_times[rows], torch.tensor(capture.background)
    size = capture.size_px
    return answer.render(capture.c2w[rows], fovy, size, size, times, background).rgb


def nearest_answer(
    capture: WorldCapture, rows: torch.Tensor, images: torch.Tensor, edit: Edit
) -> EditedScene:
    """Return the answer that images of some rows are nearest to."""
    answers = answers_of(edit)
    scores = [float(psnr(images, true_frames(capture, rows, a)).mean()) for a in answers]
    return answers[max(range(len(answers)), key=scores.__getitem__)]


def error_along_time(
    capture: WorldCapture, rows: torch.Tensor, images: torch.Tensor, answer: EditedScene
) -> float | None:
    """Return how much consecutive images of one camera differ along the true edited motion."""
    here, there = rows[:-1], rows[1:]
    fovy = torch.full((len(here),), capture.fovy_rad)
    cameras = [(capture.c2w[r], fovy, capture.frame_times[r]) for r in (here, there)]
    found = flow(answer.scene, *cameras[0], *cameras[1], capture.size_px, capture.size_px)
    optical = found.optical.movedim(-1, 1)
    return mean_of(warped_difference(images[:-1], images[1:], optical, found.is_visible).tolist())


# One run


def edited_frames(folder: Path, capture: WorldCapture) -> dict[int, torch.Tensor]:
    """Return the newest edit of every frame by its row, from a run's folder of edits.

    Rows are those of the capture: the writer and the reader both go camera by camera.
    """
    found: dict[int, torch.Tensor] = {}
    lines = (folder / "journal.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, lines[1:]):
        images = np.load(folder / "items" / f"{line['item'].replace('/', '-')}.npy")
        for row, image in zip(line["rows"], torch.from_numpy(images).float(), strict=True):
            found[row] = image
    assert all(0 <= row < len(capture) for row in found)
    return found


def consistency_of_edits(folder: Path, capture: WorldCapture, edit: Edit) -> dict[str, Any]:
    """Compare the edited frames of each training camera along time with the truth's frames."""
    frames = edited_frames(folder, capture)
    ours, theirs, fits = [], [], []
    for camera in sorted(set(capture.camera_ids.tolist()) - {0}):
        rows = camera_rows(capture, camera)
        images = torch.stack([frames[row] for row in rows.tolist()])
        answer = nearest_answer(capture, rows, images, edit)
        truth = true_frames(capture, rows, answer)
        ours.append(error_along_time(capture, rows, images, answer))
        theirs.append(error_along_time(capture, rows, truth, answer))
        fits.append(float(psnr(images, truth).mean()))
    error, true = mean_of(ours), mean_of(theirs)
    return {
        "edits_psnr": sum(fits) / len(fits),
        "edits_temporal_error": error,
        "edits_temporal_error_truth": true,
        "edits_temporal_ratio": error / true,
    }


def evaluate_fit(checkpoint: Path, capture: WorldCapture) -> dict[str, Any]:
    """Compare a fitted field with the truth: PSNR and relative depth on the held-out camera."""
    rows = camera_rows(capture, 0)
    images = film(checkpoint, capture, rows)
    truth = true_frames(capture, rows, EditedScene(capture.scene))
    depth = capture.render()[1][rows].unsqueeze(-1)
    known = (depth > 0) & (images.alpha > 0.5)
    return {
        "psnr": float(psnr(images.rgb, truth).mean()),
        "depth_error": float((images.depth / depth - 1)[known].abs().mean()),
    }


def evaluate_edit(
    checkpoint: Path, capture: WorldCapture, edit: Edit, strip: Path
) -> dict[str, Any]:
    """Compare an edited field on the held-out camera with the true edited world.

    Args:
        strip: PNG to write: rows of the original, of renders and of truth.
    """
    rows = camera_rows(capture, 0)
    images = film(checkpoint, capture, rows).rgb
    original = true_frames(capture, rows, EditedScene(capture.scene))
    answer = nearest_answer(capture, rows, images, edit)
    truth = true_frames(capture, rows, answer)
    _write_strip(strip, original, images, truth)
    return {
        "psnr": float(psnr(images, truth).mean()),
        "psnr_min": float(psnr(images, truth).min()),
        "psnr_unedited": float(psnr(original, truth).mean()),
        "answer": answer.style or answer.scene.caption,
    }


def film(checkpoint: Path, capture: WorldCapture, rows: torch.Tensor):
    """Return a trained scene's images of some rows of a capture."""
    import custom.fourd  # noqa: F401
    from custom.fourd.renderers.scene import SceneImages, load_scene

    scene, fovy = load_scene(checkpoint), torch.full((1,), capture.fovy_rad)
    size, times = capture.size_px, capture.frame_times
    parts = [
        scene.render(capture.c2w[row : row + 1], fovy, size, size, times[row : row + 1])
        for row in rows.tolist()
    ]
    names = ("rgb", "alpha", "depth")
    return SceneImages(*(torch.cat([getattr(part, n) for part in parts]) for n in names))


def data_folder(folder: Path, caption: str) -> Path:
    """Return the folder of a scene's videos, written where it is missing."""
    path = folder / "data" / Fit(caption).tag
    if not (path / "world.json").is_file():
        shutil.rmtree(path, ignore_errors=True)  # of a benchmark that was cut off
        write_dynerf(path, parse_caption(caption), N_CAMERAS, N_TIMES, SIZE_PX)
    return path


def trial_of(folder: Path, config: str, tag: str) -> Path:
    """Return where a run writes."""
    return folder / "runs" / config / tag


def train(
    config: str, run: Fit | Edit, folder: Path, threads: int, keys: Sequence[str]
) -> tuple[Path, float]:
    """Run one config on a scene's videos; return its trial's folder and the wall seconds.

    Raises:
        RuntimeError: the command failed; the end of its log is quoted.
    """
    trial = trial_of(folder, config, run.tag)
    shutil.rmtree(trial, ignore_errors=True)  # of a benchmark that was cut off
    arguments = [
        "--config", f"custom/configs/{config}.yaml", "--train", "profile=embedded",
        f"data.dataroot={data_folder(folder, run.caption)}", f"exp_root_dir={folder / 'runs'}",
        f"tag={run.tag}", "use_timestamp=false", *keys,
    ]  # fmt: skip
    return trial, launch(arguments, folder / "logs" / f"{run.tag}.log", threads)


def measure_fit(run: Fit, folder: Path, threads: int) -> dict[str, Any]:
    """Fit one scene; return its line of `fits.jsonl`."""
    trial, wall_seconds = train("instruct4d_train", run, folder, threads, ())
    own = _metrics(trial)
    capture = read_truth(data_folder(folder, run.caption))
    return {
        "caption": run.caption,
        "held_out": capture.scene.is_held_out or capture.scene.has_held_out_motion,
        "overrides": [],
        "embedded_weights": NO_WEIGHTS,
        "threads": threads,
        "wall_seconds": round(wall_seconds, 1),
        **{name: own[name] for name in ("psnr_best_static", "ssim", "steps", "seconds",
                                        "peak_memory_gb")},
        **_rounded(evaluate_fit(trial / "ckpts" / "last.ckpt", capture)),
    }  # fmt: skip


def measure_edit(
    run: Edit, folder: Path, threads: int, overrides: Sequence[str], fits: dict[str, Any]
) -> dict[str, Any]:
    """Edit one fitted scene; return its line of `edits/runs.jsonl`."""
    fit = trial_of(folder, "instruct4d_train", Fit(run.caption).tag) / "ckpts" / "last.ckpt"
    keys = (
        f"system.weights={fit}", f"system.prompt_processor.instruction={run.instruction}",
        f"system.edit.flow_cache_dir={folder / 'flow'}", *KEYS[run.variant], *overrides,
    )  # fmt: skip
    trial, wall_seconds = train("instruct4d_edit", run, folder, threads, keys)
    own = _metrics(trial)
    capture = read_truth(data_folder(folder, run.caption))
    strip = strip_path(folder, run)
    values = evaluate_edit(trial / "ckpts" / "last.ckpt", capture, run, strip)
    values |= consistency_of_edits(trial / "edits", capture, run)
    kept = (
        "temporal_error", "temporal_error_truth", "temporal_error_ratio", "view_error",
        "view_error_truth", "view_error_ratio", "psnr_to_edits", "edits", "steps", "seconds",
        "edit_seconds", "peak_memory_gb",
    )  # fmt: skip
    return {
        "caption": run.caption,
        "instruction": run.instruction,
        "variant": run.variant,
        "group": group_of(run),
        "held_out": is_held_out(run),
        "overrides": list(overrides),
        "embedded_weights": embedded_weights(model="edit"),
        "threads": threads,
        "wall_seconds": round(wall_seconds, 1),
        "fit_wall_seconds": fits[run.caption]["wall_seconds"],
        "psnr_own": own["psnr"],
        **_rounded({name: own[name] for name in kept}),
        **_rounded(values),
    }


def _metrics(trial: Path) -> dict[str, Any]:
    return json.loads((trial / "save" / "metrics.json").read_text(encoding="utf-8"))


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {n: round(v, 5) if isinstance(v, float) else v for n, v in values.items()}


def strip_path(folder: Path, run: Edit) -> Path:
    """Return where the picture of an edit lies."""
    return folder / "strips" / f"{run.tag}.png"


def _write_strip(path: Path, *rows: torch.Tensor) -> None:
    import cv2

    path.parent.mkdir(parents=True, exist_ok=True)
    joined = [torch.cat([images[time] for time in SHEET_TIMES], dim=1) for images in rows]
    picture = torch.cat(joined).clamp(0, 1).flip(-1) * 255
    cv2.imwrite(str(path), picture.round().byte().numpy())


# All runs


def fit_scenes(
    captions: Sequence[str], folder: Path, threads: int, jobs: int, deadline: float
) -> dict[str, Any]:
    """Fit what is not fitted yet; return the rows by caption."""

    def done() -> dict[Fit, dict[str, Any]]:
        rows = finished_rows(folder / "fits", [], NO_WEIGHTS, lambda row: Fit(row["caption"]))
        return {run: row for run, row in rows.items() if _checkpoint(run).is_file()}

    def _checkpoint(run: Fit) -> Path:
        return trial_of(folder, "instruct4d_train", run.tag) / "ckpts" / "last.ckpt"

    missing = [run for run in map(Fit, dict.fromkeys(captions)) if run not in done()]
    run_all(
        missing, folder / "fits", lambda run: measure_fit(run, folder, threads), jobs, deadline,
        lambda row: f"{row['psnr']:6.2f} dB, depth {row['depth_error']:.1%}",
    )  # fmt: skip
    return {run.caption: row for run, row in done().items()}


def main() -> None:
    """Run from the command line."""
    arguments = parse_arguments(
        name="edit_4d", n_prompts=len(EDITS), description=__doc__.splitlines()[0]
    )
    folder, overrides = arguments.output.resolve(), arguments.overrides
    weights = embedded_weights(model="edit")
    if weights is None:
        raise SystemExit("custom/fourd/assets/edit is absent; see custom/fourd/scripts to make it.")
    torch.set_num_threads(arguments.threads)  # the evaluation shares the cores with trainings
    deadline = time.monotonic() + 60 * arguments.minutes
    chosen = EDITS[: arguments.prompts]
    fits = fit_scenes(
        [caption for caption, _ in chosen], folder, arguments.threads, arguments.jobs, deadline
    )

    def done() -> dict[Edit, dict[str, Any]]:
        names = ("caption", "instruction", "variant")
        return finished_rows(
            folder / "edits", overrides, weights, lambda row: Edit(*(row[n] for n in names))
        )

    runs = planned_edits(chosen)
    missing = [run for run in runs if run not in done() and run.caption in fits]
    print(f"{len(runs) - len(missing)} of {len(runs)} edits are finished in {arguments.output}.")
    run_all(
        missing,
        folder / "edits",
        lambda run: measure_edit(run, folder, arguments.threads, overrides, fits),
        arguments.jobs,
        deadline,
        lambda row: f"{row['psnr']:6.2f} dB (unedited {row['psnr_unedited']:5.2f})",
    )
    finished = done()
    rows = [finished[run] for run in runs if run in finished]
    if not rows:
        raise SystemExit("No edit finished.")
    write_report(arguments, folder, fits, rows, runs)


def write_report(
    arguments: Any, folder: Path, fits: dict[str, Any], rows: list[dict[str, Any]], runs: list[Edit]
) -> None:
    """Write report and contact sheet, under results/ if asked to, and print the report."""
    circumstances = describe_circumstances(arguments.threads)
    report = {
        "benchmark": "edit_4d",
        "circumstances": circumstances | {"embedded_weights": embedded_weights(model="edit")},
        "jobs": arguments.jobs,
        "planned_edits": len(runs),
        "views": f"the held-out one of {N_CAMERAS} cameras on an arc of 60 degrees, {N_TIMES} "
        f"times, {SIZE_PX} px",
        **summarise(list(fits.values()), rows),
        "fits": list(fits.values()),
        "edits": rows,
    }
    text = markdown(report, as_lines(report["circumstances"]))
    print(text)
    targets = {suffix: folder / f"report.{suffix}" for suffix in ("json", "md", "png")}
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        targets = {suffix: result_path("edit_4d", suffix) for suffix in targets}
    targets["json"].write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    targets["md"].write_text(text, encoding="utf-8")
    found = {(row["caption"], row["instruction"], row["variant"]) for row in rows}
    shown = [r for r in runs if (r.caption, r.instruction, r.variant) in found]
    shown = [run for run in shown if run.variant in (VARIANTS[0], VARIANTS[-1])]
    strips = {f"{run.instruction} ({run.variant})": strip_path(folder, run) for run in shown}
    if strips:
        write_contact_sheet(targets["png"], strips, SHEET_ROWS)
    print(f"Written: {', '.join(str(path) for path in targets.values())}")


if __name__ == "__main__":
    main()
