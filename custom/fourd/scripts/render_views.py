"""Render the cached view groups that the multi-view model trains on.

    python -m custom.fourd.scripts.render_views --work outputs/assets --single 7000 --pair 7000
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .world_views import render_groups, save_groups


def render_parts(
    argv: list[str] | None,
    description: str,
    kind: str,
    counts: tuple[int, int],
    render: Callable[..., Any],
    save: Callable[[Any, Path], None],
    seed_offset: int = 0,
) -> int:
    """Write `kind`_1_S.pt and `kind`_2_S.pt, scenes of one and of two objects; S is the shard.

    Files that exist are kept; a file appears under its name only when it is whole.

    Args:
        counts: how many of each kind are rendered by default.
        render: (count, number of objects, generator, report) -> data. save: writes it.
        seed_offset: keeps the draws of two kinds apart.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work", type=Path, default=Path("outputs/assets"))
    parser.add_argument("--single", type=int, default=counts[0], help=f"{kind} of one object")
    parser.add_argument("--pair", type=int, default=counts[1], help=f"{kind} of two objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", type=int, default=0, help="number of this part of the data")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    for num_objects, count in ((1, args.single), (2, args.pair)):
        path = args.work / f"{kind}_{num_objects}_{args.shard}.pt"
        if path.exists():
            print(f"{path} exists; kept", flush=True)
            continue
        seed = (args.seed * 1000 + args.shard) * 10 + num_objects + seed_offset
        generator = torch.Generator().manual_seed(seed)
        data = render(count, num_objects, generator, report=lambda line: print(line, flush=True))
        part = path.with_suffix(".part")
        save(data, part)
        part.rename(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    return render_parts(argv, __doc__, "views", (7000, 7000), render_groups, save_groups)


if __name__ == "__main__":
    sys.exit(main())
