"""Render the cached clips that the video model trains on.

    python -m custom.fourd.scripts.render_clips --work outputs/assets --single 3000 --pair 2000
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from .world_clips import render_clips, save_clips


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("outputs/assets"))
    parser.add_argument("--single", type=int, default=3000, help="clips of one object")
    parser.add_argument("--pair", type=int, default=2000, help="clips of two objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=0, help="number of this part of the data")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for num_objects, count in ((1, args.single), (2, args.pair)):
        path = args.work / f"clips_{num_objects}_{args.shard}.pt"
        if path.exists():
            print(f"{path} exists; kept", flush=True)
            continue
        seed = (args.seed * 1000 + args.shard) * 10 + num_objects + 5
        generator = torch.Generator().manual_seed(seed)
        clips = render_clips(
            count, num_objects, generator, report=lambda line: print(line, flush=True)
        )
        part = path.with_suffix(".part")
        save_clips(clips, part)
        part.rename(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
