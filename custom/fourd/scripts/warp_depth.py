"""Fetch what a camera sees from the images of other cameras, by depth.

    python -m custom.fourd.scripts.warp_depth data/scene --output warped --keys 1 7 --targets 0
    python -m custom.fourd.scripts.warp_depth data/coffee_martini --downsample 4 --frames 0:1 \\
        --keys 1 9 --targets 4 5 --edited one.png nine.png --depth depth.npy --output warped

SOURCE is a scene that a data module of videos reads. Views are written CAMERA, at --time, or
CAMERA@TIME. Depth is the distance along rays in world units: from --depth, else the lidar of the
source, else the truth of a scene of the world. For each target there are `_warped.png`, `_mask.png`
(white where a key view sees the same surface), `_composite.png` (warped where covered, the target
itself elsewhere) and `_beside.png`: target, warped, mask, composite. Nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.data.open_scene import open_scene
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.ops.depth_warp import DepthCheck, DepthWarp, DepthWarper
from custom.fourd.ops.flow_warp import composite

from .exit_status import run_tool
from .result_folder import claim_output, side_by_side, write_missing
from .warp_sources import content_hash, named_rows, original, read_edited, scene_depth

RECORD = "warp.json"


def make_warper(
    scene: VideoScene, depth: Float[Tensor, "n h w"], rows: Sequence[int], check: DepthCheck
) -> tuple[DepthWarper, Float[Tensor, "m h w 3"]]:
    """Return the geometry of some frames of a scene, and their originals in [0, 1].

    Raises:
        ValueError: no depth is known for one of the frames, or it is not finite.
    """
    rows = list(rows)
    for row in rows:
        if not bool((depth[row] != 0).any()):
            raise ValueError(
                f"{scene.names[row]} has no depth at all; expected some. Choose a view that has "
                "(lidar belongs to training frames), or give --depth FILE.npy."
            )
    warper = DepthWarper(depth[rows], scene.c2w[rows], scene.intrinsics[rows], check)
    return warper, torch.stack([original(scene, row) for row in rows])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="a scene with cameras")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--keys", nargs="+", required=True, help="views that are read")
    parser.add_argument("--targets", nargs="+", required=True, help="views that are made")
    parser.add_argument("--time", type=int, default=None, help="time id of the views; the first")
    parser.add_argument("--edited", type=Path, nargs="+", help="a picture for each key, in order")
    parser.add_argument("--depth", type=Path, help=".npy of distances, (frames, height, width)")
    parser.add_argument("--frames", default=None, help="which times to read, such as 0:1")
    parser.add_argument("--downsample", type=float, default=1.0, help="divide sizes by this")
    parser.add_argument("--relative", type=float, default=DepthCheck.relative,
                        help="depth may disagree by this share")  # fmt: skip
    parser.add_argument("--border", type=int, default=DepthCheck.border_px,
                        help="pixels to stay off silhouettes")  # fmt: skip
    parser.add_argument("--ratio", type=float, default=1.0, help="share of the warp where covered")
    return parser


def _run(args: argparse.Namespace) -> None:
    check = DepthCheck(relative=args.relative, border_px=args.border)
    scene = open_scene(args.source, downsample=args.downsample, frame_list=args.frames)
    keys = named_rows(scene, args.keys, args.time)
    targets = named_rows(scene, args.targets, args.time)
    edited = [read_edited(path, scene) for path in args.edited or ()]
    if edited and len(edited) != len(keys):
        raise ValueError(f"--edited has {len(edited)} pictures for {len(keys)} keys; expected one "
                         "per key, in their order.")  # fmt: skip
    depth = scene_depth(args.source.expanduser(), scene, args.depth, args.frames is not None)
    rows = sorted({*keys, *targets})
    warper, images = make_warper(scene, depth, rows, check)
    originals = images.clone()
    for key, picture in zip(keys, edited):
        images[rows.index(key)] = picture
    record = {
        "tool": "warp_depth", "keys": keys, "targets": targets, "relative": args.relative,
        "border": args.border, "ratio": args.ratio, "images": content_hash(images),
        "originals": content_hash(originals), "depth": content_hash(depth[rows]),
    }  # fmt: skip
    key_views = [rows.index(key) for key in keys]
    # Before the folder is claimed, so that a refusal leaves nothing behind.
    warps = [warper.warp(images, rows.index(target), key_views) for target in targets]
    made = [
        composite(warp.image, originals[rows.index(target)], warp.is_covered, args.ratio)
        for warp, target in zip(warps, targets, strict=True)
    ]
    claim_output(args.output, record, RECORD, "warp")
    for done, (target, warp, image) in enumerate(zip(targets, warps, made, strict=True), 1):
        before = originals[rows.index(target)]
        stem = f"{int(scene.camera_ids[target])}_{int(scene.time_ids[target]):05d}"
        _write(args.output, stem, before, warp, image)
        line = f"warped {done} of {len(targets)} views: {stem}, "
        line += f"{float(warp.is_covered.float().mean()):.0%} covered"
        if not edited and bool(warp.is_covered.any()):
            quality = psnr(warp.image[None], before[None], warp.is_covered[None])
            line += f", {float(quality):.1f} dB there"
        print(line, flush=True)


def _write(folder: Path, stem: str, before: Tensor, warp: DepthWarp, made: Tensor) -> None:
    pictures = {"warped": warp.image, "mask": warp.is_covered, "composite": made}
    pictures["beside"] = side_by_side([before, warp.image, warp.is_covered, made])
    write_missing(folder, {f"{stem}_{name}": part for name, part in pictures.items()})


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 1 after a refusal, whose sentence it prints."""
    args = _parser().parse_args(argv)
    return run_tool("warp_depth", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
