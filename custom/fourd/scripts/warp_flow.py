"""Carry one frame of a camera over to its other frames, along the optical flow of the originals.

    python -m custom.fourd.scripts.warp_flow clip.mp4 --output warped
    python -m custom.fourd.scripts.warp_flow data/coffee_martini --downsample 4 --frames 0:20 \\
        --camera 3 --reference 0 --edited painted.png --output warped

SOURCE is a video, a folder of pictures, or a scene that a data module of videos reads. For each
frame there are `_warped.png`, `_mask.png` (white where both flows agree and nothing is
extrapolated), `_composite.png` (warped where valid, the frame itself elsewhere) and `_beside.png`:
reference, frame, warped, mask, composite. Nothing is ever overwritten.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from custom.fourd.data.flow_cache import CachedFlow
from custom.fourd.data.open_scene import open_scene
from custom.fourd.data.video_scene import VideoScene
from custom.fourd.metrics.image_quality import psnr
from custom.fourd.ops.flow_warp import CHECKS, MODES, FlowCheck, FlowWarp, warp_by_flow
from custom.fourd.ops.optical_flow import KINDS, FlowEstimator, estimate_both, make_flow_estimator

from .exit_status import run_tool
from .result_folder import claim_output, side_by_side, write_missing
from .warp_sources import content_hash, original, picked_times, read_edited

RECORD = "warp.json"


def warp_frames(
    scene: VideoScene,
    camera_id: int,
    reference_time: int,
    times: list[int],
    estimator: FlowEstimator,
    look: Float[Tensor, "h w 3"] | None = None,
    check: FlowCheck | None = None,
    mode: str = "bicubic",
) -> Iterator[tuple[int, FlowWarp]]:
    """Warp a camera's frame to others of the same camera.

    Args:
        scene: the originals, for which flow is estimated.
        camera_id: the camera.
        reference_time: time_id of the frame that is carried over.
        times: time_ids of the targets.
        estimator: of flow.
        look: what is carried over instead of the reference's original, in [0, 1].
        check: when both flows agree; None is the usual squared test.
        mode: see `flow_warp.sample_at`.

    Yields:
        a target's time_id and its warp, a batch of one.
    """
    reference = original(scene, scene.index(camera_id, reference_time))
    look = reference if look is None else look
    for time in times:
        target = original(scene, scene.index(camera_id, time))
        towards, back = estimate_both(estimator, target, reference)
        yield (
            time,
            warp_by_flow(look[None], target[None], towards[None], back[None], check, mode),
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="video, folder of pictures, or scene")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--camera", type=int, default=None, help="camera id; the first")
    parser.add_argument("--reference", type=int, default=None, help="time id carried; the first")
    parser.add_argument("--targets", type=int, nargs="+", help="time ids to warp to; all others")
    parser.add_argument("--edited", type=Path, help="picture to carry in the reference's place")
    parser.add_argument("--frames", default=None, help="which frames to read, such as 0:20")
    parser.add_argument("--downsample", type=float, default=1.0, help="divide sizes by this")
    parser.add_argument("--flow", choices=KINDS, default="auto", help="auto: raft, else dis")
    parser.add_argument("--check", choices=CHECKS, default="strict", help="when flows agree")
    parser.add_argument("--mode", choices=MODES, default="bicubic", help="interpolation")
    parser.add_argument("--cache", type=Path, help="folder that keeps flows from run to run")
    return parser


def _run(args: argparse.Namespace) -> None:
    scene = open_scene(args.source, downsample=args.downsample, frame_list=args.frames)
    camera, reference, times = picked_times(scene, args.camera, args.reference, args.targets)
    look = None if args.edited is None else read_edited(args.edited, scene)
    estimator = make_flow_estimator(args.flow)
    rows = [scene.index(camera, time) for time in [reference, *times]]
    record = {
        "tool": "warp_flow", "flow": estimator.identity, "check": args.check, "mode": args.mode,
        "camera": camera, "reference": reference, "targets": times,
        "frames": content_hash(scene.frames[rows]),
        "edited": None if look is None else content_hash(look),
    }  # fmt: skip
    claim_output(args.output, record, RECORD, "warp")
    if args.cache is not None:
        estimator = CachedFlow(estimator, args.cache)
    shown = original(scene, rows[0]) if look is None else look
    warps = warp_frames(
        scene, camera, reference, times, estimator, look, CHECKS[args.check], args.mode
    )
    for done, (time, warp) in enumerate(warps, 1):
        target = original(scene, scene.index(camera, time))
        warped, mask, made = warp.warped[0], warp.is_valid[0], warp.composite[0]
        stem = f"{camera}_{time:05d}"
        pictures = {"warped": warped, "mask": mask, "composite": made}
        pictures["beside"] = side_by_side([shown, target, warped, mask, made])
        write_missing(args.output, {f"{stem}_{name}": part for name, part in pictures.items()})
        share = float(mask.float().mean())
        line = f"warped {done} of {len(times)} frames: {stem}, {share:.0%} valid"
        if look is None and share:
            line += f", {float(psnr(warped[None], target[None], warp.is_valid)):.1f} dB there"
        print(line, flush=True)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Run from the command line; returns 1 after a refusal, whose sentence it prints."""
    args = _parser().parse_args(argv)
    return run_tool("warp_flow", lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())
