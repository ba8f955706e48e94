"""Render the cached groups of cells that the image model trains on.

python -m custom.fourd.scripts.render_pairs --work outputs/assets --single 2500 --pair 1250
"""

from __future__ import annotations

import sys

from .render_views import render_parts
from .world_pairs import render_pair_groups, save_pair_groups


def main(argv: list[str] | None = None) -> int:
    counts = (2500, 1250)
    return render_parts(argv, __doc__, "pairs", counts, render_pair_groups, save_pair_groups, 7)


if __name__ == "__main__":
    sys.exit(main())
