"""Train, validate, test or export: ``python launch.py --config FILE --train [key=value ...]``."""

import sys
from pathlib import Path

from threestudio.launcher import main

if __name__ == "__main__":
    sys.exit(main(root=Path(__file__).resolve().parent))
