"""Write videos of a scene of the world, as DyNeRF's folders are, to try `instruct4d_train` on.

python -m custom.fourd.scripts.write_world_videos data/world \
    --caption "a red cube next to a blue sphere bouncing"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from custom.fourd.world.grammar import CaptionError, parse_caption
from custom.fourd.world.writers import write_dynerf


def main(argv: list[str] | None = None) -> int:
    """Write the folder; return 0, or 2 after a sentence about what is wrong."""
    parser = argparse.ArgumentParser(
        description="Write videos of a scene of the world, as DyNeRF's folders are."
    )
    parser.add_argument("folder", type=Path, help="new folder for camNN.mp4 and poses_bounds.npy")
    parser.add_argument("--caption", default="a red cube next to a blue sphere bouncing")
    parser.add_argument("--cameras", type=int, default=8, help="on an arc of 60 degrees")
    parser.add_argument("--times", type=int, default=16, help="frames per camera")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    args = parser.parse_args(argv)
    try:
        for name in ("cameras", "times", "size"):
            if getattr(args, name) < 2:
                raise ValueError(f"--{name} is {getattr(args, name)}; expected at least 2.")
        scene = parse_caption(args.caption)
        write_dynerf(args.folder, scene, args.cameras, args.times, args.size)
    except (CaptionError, FileExistsError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.folder}: {args.cameras} videos of {args.times} frames of {scene.caption!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
