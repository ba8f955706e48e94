"""Render a scene over all its times and cameras, once, for `fourd-pair-datamodule`.

    python -m custom.fourd.scripts.render_grid data/cube --scene "a red cube spinning"
    python -m custom.fourd.scripts.render_grid data/mine --scene outputs/.../ckpts/last.ckpt \
        --latents embedded://multiview

SCENE is what the data module's `scenes` takes: a caption of the world, a checkpoint or an exported
scene, or a video. Stop it at any moment: the same command goes on where it stopped. Without
`--scene`, latents and features are added to a grid that is there.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

from custom.fourd.data.fourd_pair_datamodule import WHITE, FourdPairDataModuleConfig
from custom.fourd.data.frame_encoders import KINDS_OF_FEATURES, LatentEncoder, VisionEncoder
from custom.fourd.data.grid_cache import write_cache
from custom.fourd.data.grid_cells import GridCells, is_grid, read_record, write_grid
from custom.fourd.data.pair_cells import CellSource
from custom.fourd.data.pair_scenes import open_scenes


def describe_origin(source: CellSource) -> dict[str, Any]:
    """Return what a source is rendered from: its kind, and its caption or the hash of its file."""
    origin: dict[str, Any] = {"kind": type(source).__name__}
    path = getattr(source, "path", None)
    if path is None:
        return origin | {"caption": source.caption}
    origin["name"] = path.name
    if path.is_file():
        with path.open("rb") as file:
            origin["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return origin


def render(args: argparse.Namespace) -> GridCells:
    """Make or finish the grid that the arguments describe, and what is cached beside it.

    Raises:
        ValueError: the scene cannot be read, or the folder holds something else.
        FileNotFoundError: a model is not there.
    """
    report = _printer(args.quiet)
    if args.scene is None and not is_grid(args.folder):
        raise ValueError(f"{args.folder} holds no grid; expected --scene to render one.")
    if args.scene is not None:
        (source,) = open_scenes([args.scene], _config(args))
        source.caption = args.caption or source.caption
        source.prepare()
        write_grid(args.folder, source, describe_origin(source), report("rendered"))
    record = read_record(args.folder)
    grid = GridCells(args.folder, record["height"], record["width"])
    for model in args.latents:
        encoder = LatentEncoder(model, args.revision)
        write_cache(grid, encoder, args.background, report(f"latents of {model}"))
    for model in args.features:
        encoder = VisionEncoder(model, args.features_kind, args.revision, args.features_folder)
        write_cache(grid, encoder, args.background, report(f"features of {model}"))
    return grid


def _config(args: argparse.Namespace) -> FourdPairDataModuleConfig:
    return FourdPairDataModuleConfig(
        height=args.size[0],
        width=args.size[-1],
        n_times=args.times,
        include_last_time=args.include_last_time,
        n_azimuths=args.azimuths,
        elevations_deg=args.elevations,
        camera_distance=args.distance,
        fovy_deg=args.fovy,
        fit=args.fit,
    )


def _printer(quiet: bool):
    def of(what: str):
        def report(done: int, total: int) -> None:
            if not quiet:
                print(f"{what}: {done} of {total} times", flush=True)

        return report

    return of


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="new folder, or one of the same grid")
    parser.add_argument("--scene", help="caption of the world, checkpoint, scene file or video")
    parser.add_argument("--caption", help="words for prompts, where the scene has none or others")
    parser.add_argument("--size", type=int, nargs="+", default=[64], help="height [width], pixels")
    parser.add_argument("--times", type=int, default=16)
    parser.add_argument("--include-last-time", action="store_true", help="last time is 1")
    parser.add_argument("--azimuths", type=int, default=16, help="cameras around the scene")
    parser.add_argument("--elevations", type=float, nargs="+", default=[15.0], help="degrees")
    parser.add_argument("--distance", type=float, default=3.0, help="scene units")
    parser.add_argument("--fovy", type=float, default=40.0, help="vertical, degrees")
    parser.add_argument("--fit", default="crop", choices=("crop", "pad"), help="of a video")
    parser.add_argument("--latents", nargs="*", default=[], metavar="MODEL", help="cache latents")
    parser.add_argument("--features", nargs="*", default=[], metavar="MODEL", help="cache features")
    parser.add_argument("--features-kind", default="plus", choices=KINDS_OF_FEATURES)
    parser.add_argument("--features-folder", default="image_encoder", help="in the model")
    parser.add_argument("--revision", help="commit of the models, where they are hub ids")
    parser.add_argument("--background", type=float, nargs=3, default=list(WHITE))
    parser.add_argument("--quiet", action="store_true")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 2 after a refusal, whose sentence it prints."""
    args = parser().parse_args(argv)
    try:
        grid = render(args)
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    shape = f"{len(grid.frame_times)} times x {len(grid.cameras)} cameras"
    print(f"{grid.folder}: {shape} of {grid.width} x {grid.height} pixels, {grid.caption!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
