"""Nearest valid names for a mistyped one."""

import difflib
import heapq
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
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(name.lower())
    bounds = []
    for item in lowered:
        matcher.set_seq1(item)
        if matcher.real_quick_ratio() >= cutoff and (bound := matcher.quick_ratio()) >= cutoff:
            bounds.append((bound, item))
    # The exact similarity is slow and never above its bound, so few have to be asked for it.
    close: list[tuple[float, str]] = []
    for bound, item in sorted(bounds, reverse=True):
        if len(close) == n and bound < close[0][0]:
            break
        matcher.set_seq1(item)
        if (ratio := matcher.ratio()) >= cutoff:
            heapq.heappush(close, (ratio, item))
            if len(close) > n:
                heapq.heappop(close)
    return [lowered[item] for _, item in sorted(close, reverse=True)]


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` when a candidate is near, else an empty string."""
    close = nearest(name, candidates, n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""
