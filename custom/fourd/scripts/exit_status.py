"""How a tool of the command line ends when what it was given cannot be used."""

from __future__ import annotations

import sys
from collections.abc import Callable

from threestudio.utils.pretrained import ModelUnavailableError


def run_tool(name: str, work: Callable[[], None]) -> int:
    """Do a tool's work and return its exit status, 1 after a refusal, whose sentence is printed.

    Args:
        name: what the sentence begins with.
        work: raises ValueError or ModelUnavailableError where it refuses; anything else is a fault
            and is shown as such.
    """
    try:
        work()
    except (ValueError, ModelUnavailableError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0
