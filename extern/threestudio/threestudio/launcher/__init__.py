"""The command line: flags, extensions, profiles, chained stages; then the trainer.

Importing this package loads neither torch nor lightning, so that ``--help`` answers at once.
"""

from threestudio.launcher.main import main

__all__ = ["main"]
