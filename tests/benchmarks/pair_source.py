"""Pairs per second of `fourd-pair-datamodule`, by where they come from, and the memory they take.

    python tests/benchmarks/pair_source.py [--steps 30] [--size 64] [--write]

A scene of the world (of two objects), a trained scene (`--checkpoint`; without one, a scene of the
embedded profile's shape with random weights), a grid on disk with cached latents, and a video.
*Live* renders every frame (`cache_mib` 0), *remembered* is the same once every cell was rendered,
which for a trained scene then costs what it does for the world. A row ends early after a minute.
Each row runs in a process of its own, whose memory is what it added to that of an idle one. CPU
time is what a pair costs however busy the machine is.
`--write` stores the report under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import RESULTS, as_lines, describe_circumstances, result_path  # noqa: E402

CAPTION = "a blue sphere orbiting next to a green cone"
CONFIG = "custom/configs/fourdfy_stage_3.yaml"
LONGEST_ROW_SECONDS = 60.0
LATENTS = "embedded://multiview"
ROWS = {
    "world, live": {"cache_mib": 0.0},
    "world, remembered": {},
    "trained scene, live": {"cache_mib": 0.0},
    "grid": {},
    "grid with cached latents": {"latents": LATENTS},
    "grid, latents encoded": {},
    "video": {},
    "video, in a temporary file": {"cache_mib": 0.0},
}


def write_random_scene(path: Path) -> None:
    """Write a scene of the embedded profile's shape, whose weights are random and not small."""
    import threestudio
    import torch
    from threestudio.launcher.arguments import parse_arguments
    from threestudio.launcher.extensions import load_extensions
    from threestudio.launcher.stages import plan_stages
    from threestudio.utils.checkpoint import save_checkpoint

    from custom.fourd.renderers.scene import Scene
    from custom.fourd.renderers.scene_file import recipe_of

    load_extensions(ROOT / "custom")
    weights = path.with_suffix(".ckpt")
    save_checkpoint(weights, {"state_dict": {}, "global_step": 0})
    argv = ["--config", str(ROOT / CONFIG), "--export", "profile=embedded",
            f"exp_root_dir={path.parent}", f"system.weights={weights}"]  # fmt: skip
    from omegaconf import OmegaConf

    system = OmegaConf.to_container(plan_stages(parse_arguments(argv), ROOT)[0].cfg.system)
    built = {
        name: threestudio.find(system[f"{name}_type"])(system[name])
        for name in ("geometry", "material", "background")
    }
    renderer = threestudio.find(system["renderer_type"])(system["renderer"], **built)
    stream = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built["geometry"].parameters():
            parameter.add_(0.3 * (torch.rand(parameter.shape, generator=stream) - 0.5))
    Scene(renderer=renderer, recipe=recipe_of(system, 300), **built).save(path)


def make_sources(folder: Path, size: int, checkpoint: str | None) -> dict[str, str]:
    """Write what the rows read; return the entry of `scenes` for each kind."""
    from custom.fourd.scripts.render_grid import main as render_grid
    from custom.fourd.world.capture import path_capture
    from custom.fourd.world.grammar import parse_caption
    from custom.fourd.world.writers import write_video

    if checkpoint is None:
        checkpoint = str(folder / "scene.safetensors")
        write_random_scene(Path(checkpoint))
    arguments = ["--scene", CAPTION, "--size", str(size), "--latents", LATENTS, "--quiet"]
    if render_grid([str(folder / "grid"), *arguments]):
        raise SystemExit("the grid could not be rendered")
    capture = path_capture(parse_caption(CAPTION), 64, size, swing_deg=0.0)
    write_video(folder / "clip.mp4", capture, cameras=False)
    return {"world": CAPTION, "trained scene": checkpoint, "grid": str(folder / "grid"),
            "video": str(folder / "clip.mp4")}  # fmt: skip


def measure(name: str, scene: str, size: int, steps: int) -> dict[str, float]:
    """Draw batches of one row; return its rate and memory. Meant for a process of its own."""
    import threestudio
    import torch

    import custom.fourd  # noqa: F401 - registers the names

    make = threestudio.find("fourd-pair-datamodule")
    keys = {"scenes": [scene], "height": size, "width": size, "colour_jitter": 0.0, **ROWS[name]}
    encoder = None
    if name == "grid, latents encoded":
        from custom.fourd.data.frame_encoders import LatentEncoder

        encoder = LatentEncoder(LATENTS)
    if "latents" in keys:
        import diffusers  # noqa: F401 - a training has it in memory anyway
    idle = peak_mib()
    began = time.perf_counter()
    module = make(keys)
    module.setup("fit")
    dataset = module.train_dataset
    prepared = time.perf_counter() - began
    if name.endswith("remembered"):
        for time_id in range(len(module.sources[0].frame_times)):
            for camera_id in range(len(module.sources[0].cameras)):
                dataset.memory.read(module.sources[0], time_id, camera_id)
    batch = dataset.collate({"step": 0})
    began, worked = time.perf_counter(), time.process_time()
    for step in range(1, steps + 1):
        if time.perf_counter() - began > LONGEST_ROW_SECONDS:
            steps = step - 1
            break
        batch = dataset.collate({"step": step})
        if encoder is not None:
            encoder.encode(batch["target_rgb"])
    seconds, worked = time.perf_counter() - began, time.process_time() - worked
    pairs = steps * len(batch["scene_id"])
    return {
        "pairs_per_second": round(pairs / seconds, 1),
        "milliseconds_per_pair": round(1e3 * seconds / pairs, 3),
        "added_mib": round(peak_mib() - idle, 1),
        "remembered_mib": round(dataset.memory.nbytes / 2**20, 1),
        "prepare_seconds": round(prepared, 2),
        "cpu_milliseconds_per_pair": round(1e3 * worked / pairs, 3),
        "batches": steps,
        "threads": torch.get_num_threads(),
    }


def peak_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB.

    `getrusage` would count what the process that started this one had, too.
    """
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not tell how much memory a process has had")


def measure_apart(name: str, scene: str, size: int, steps: int) -> dict[str, float]:
    """Run `measure` in a fresh process."""
    job = json.dumps({"name": name, "scene": scene, "size": size, "steps": steps})
    run = subprocess.run(
        [sys.executable, str(Path(__file__)), "--job", job],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if run.returncode != 0:
        raise SystemExit(f"{name} failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def lines_of(rows: dict[str, dict[str, float]]) -> list[str]:
    """Return the table as Markdown."""
    columns = {
        "pairs/s": "pairs_per_second",
        "ms a pair": "milliseconds_per_pair",
        "CPU ms a pair": "cpu_milliseconds_per_pair",
        "batches": "batches",
        "memory added, MiB": "added_mib",
        "remembered, MiB": "remembered_mib",
        "prepare, s": "prepare_seconds",
    }
    lines = ["| source | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(
            f"| {name} | " + " | ".join(f"{row[key]:g}" for key in columns.values()) + " |"
        )
    return lines


def report_of(rows: dict[str, Any], arguments: argparse.Namespace) -> tuple[dict, str]:
    """Return the report as JSON has it, and as Markdown."""
    circumstances = describe_circumstances(next(iter(rows.values()))["threads"])
    scene = "a trained scene" if arguments.checkpoint else "random weights, embedded profile"
    report = {
        "benchmark": "pair_source",
        "circumstances": circumstances,
        "steps": arguments.steps,
        "size_px": arguments.size,
        "trained_scene": scene,
        "rows": rows,
    }
    text = "\n".join([
        f"# Pairs of fourd-pair-datamodule, {circumstances['date']}",
        "",
        *as_lines(circumstances),
        f"- up to {arguments.steps} batches of 8 pairs, images of {arguments.size} pixels squared",
        f"- the trained scene: {scene}",
        "",
        *lines_of(rows),
        "",
    ])  # fmt: skip
    return report, text


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30, help="batches of 8 pairs per row")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--checkpoint", help="a trained scene; default: one of random weights")
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if arguments.job:
        print(json.dumps(measure(**json.loads(arguments.job))))
        return
    with tempfile.TemporaryDirectory() as folder:
        scenes = make_sources(Path(folder), arguments.size, arguments.checkpoint)
        rows = {}
        for name in ROWS:
            kind = next(kind for kind in scenes if name.startswith(kind))
            rows[name] = measure_apart(name, scenes[kind], arguments.size, arguments.steps)
            print(f"{name}: {rows[name]['pairs_per_second']:g} pairs/s", flush=True)
    report, text = report_of(rows, arguments)
    print(text)
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        for suffix, content in (("md", text), ("json", json.dumps(report, indent=1) + "\n")):
            result_path("pair_source", suffix).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
