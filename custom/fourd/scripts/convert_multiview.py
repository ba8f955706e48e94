"""Convert MVDream's original checkpoint: `convert_checkpoint --kind mvdream` by its first name.

python -m custom.fourd.scripts.convert_multiview sd-v2.1-base-4view.pt folder
"""

import sys
from collections.abc import Sequence

from . import convert_checkpoint


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    convert_checkpoint.main(["--kind", "mvdream", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    main()
