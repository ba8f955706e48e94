"""Log helpers of the contract: one logger, written to by rank 0 only.

Extensions expect ``threestudio.info`` and friends to write to the logger named
"pytorch_lightning". Taking it from the standard library by name keeps Lightning itself unloaded.
"""

import logging
import os

logger = logging.getLogger("pytorch_lightning")

_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")


def get_rank() -> int:
    """Return the global rank of this process, read as launchers set it; else 0."""
    for name in _RANK_VARIABLES:
        value = os.environ.get(name)
        if value is not None:
            return int(value)
    return 0


def debug(message: str, *args: object) -> None:
    """Log ``message % args`` at DEBUG on rank 0."""
    _log(logging.DEBUG, message, *args)


def info(message: str, *args: object) -> None:
    """Log ``message % args`` at INFO on rank 0."""
    _log(logging.INFO, message, *args)


def warn(message: str, *args: object) -> None:
    """Log ``message % args`` at WARNING on rank 0."""
    _log(logging.WARNING, message, *args)


def _log(level: int, message: str, *args: object) -> None:
    if get_rank() == 0:
        # stacklevel 3: past this function and its wrapper, to the line that spoke.
        logger.log(level, message, *args, stacklevel=3)
