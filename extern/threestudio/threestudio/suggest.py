"""Nearest valid names for a mistyped one."""

import difflib
from collections.abc import Iterable


def nearest(name: str, candidates: Iterable[str], n: int = 3, cutoff: float = 0.0) -> list[str]:
    """Return up to ``n`` of ``candidates``, the most similar to ``name`` first.

    Args:
        name: what the user wrote.
        candidates: the valid names.
        n: how many to return at most.
        cutoff: least similarity, 0 (anything goes) to 1 (equal).
    """
    lowered = {}
    for candidate in sorted(candidates):
        lowered.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(name.lower(), list(lowered), n=n, cutoff=cutoff)
    return [lowered[item] for item in close]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` when a candidate is near, else an empty string."""
    close = nearest(name, candidates, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
