"""The order of a launch, and the form in which its errors reach the user."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from threestudio.launcher.arguments import (
    ArgumentError,
    Arguments,
    parse_arguments,
    select_gpus,
)
from threestudio.logs import get_rank, logger
from threestudio.utils.redaction import RedactingFormatter, redact

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None, root: str | Path | None = None) -> int:
    """Run a command line and return the exit status: 0, 1 (a run failed) or 2 (bad input).

    Args:
        argv: the arguments without the program's name; None takes those of the process.
        root: folder that holds ``custom/`` and that ``include`` paths are relative to; None takes
            the working directory.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    root = Path.cwd() if root is None else Path(root)
    try:
        arguments = parse_arguments(argv)
    except ArgumentError as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    n_gpus = select_gpus(arguments.gpu, os.environ)
    _set_up_logging(arguments.verbose)
    if arguments.typecheck:
        from threestudio.launcher.typecheck import install_type_checks

        install_type_checks()
    return _run(arguments, argv, root, n_gpus)


def _run(arguments: Arguments, argv: list[str], root: Path, n_gpus: int) -> int:
    from threestudio.launcher.extensions import load_extensions
    from threestudio.launcher.stages import plan_stages, run_stages
    from threestudio.utils.config_errors import ConfigError

    try:
        load_extensions(root / "custom")
        stages = plan_stages(arguments, root, n_gpus)
        run_stages(stages, arguments, argv)
    except ConfigError as error:
        return _report(error, arguments.verbose, USAGE_ERROR)
    except (ValueError, OSError, ImportError, KeyError) as error:
        # What the parts of a run raise about their input: files, models, prompts.
        return _report(error, arguments.verbose, 1)
    return 0


def _report(error: BaseException, verbose: bool, status: int) -> int:
    """Print an error as a sentence; the traceback only on request."""
    if verbose:
        logger.error("The run stopped.", exc_info=error)
    print(f"launch.py: error: {redact(str(error))}", file=sys.stderr)
    return status


def _set_up_logging(verbose: bool) -> None:
    """Write log lines to stderr, on rank 0, without credentials.

    The handler sits on the root logger: where that has one, lightning adds none of its own, and
    no line appears twice.
    """
    if get_rank() == 0 and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter("[%(levelname)s] %(message)s"))
        logging.basicConfig(handlers=[handler])
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
