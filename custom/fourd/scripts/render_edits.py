"""Render the cached pairs, before and after an edit, that the edit model trains on.

python -m custom.fourd.scripts.render_edits --work outputs/assets --single 6000 --pair 3000
"""

from __future__ import annotations

import sys

from .render_views import render_parts
from .world_edits import render_edit_groups, save_edit_groups


def main(argv: list[str] | None = None) -> int:
    return render_parts(
        argv, __doc__, "edits", (6000, 3000), render_edit_groups, save_edit_groups, 7
    )


if __name__ == "__main__":
    sys.exit(main())
