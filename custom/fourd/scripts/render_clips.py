"""Render the cached clips that the video model trains on.

    python -m custom.fourd.scripts.render_clips --work outputs/assets --single 3000 --pair 2000
"""

from __future__ import annotations

import sys

from .render_views import render_parts
from .world_clips import render_clips, save_clips


def main(argv: list[str] | None = None) -> int:
    return render_parts(argv, __doc__, "clips", (3000, 2000), render_clips, save_clips, 5)


if __name__ == "__main__":
    sys.exit(main())
