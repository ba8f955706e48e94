"""Which entries of an older state dict fit a system, and which of them must be refused.

The rule between stages: a module wholly absent from the file starts fresh, a partly matching one
is refused with its keys listed. Two absences are no fresh start but a mismatch: an element of a
numbered container (``layers.4`` of a network that is deeper than the saved one), and a child that
appears beside another one's disappearance within the same parent (a renamed module).
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from threestudio.systems.upstream_names import with_our_names

_LISTED = 8


@dataclass
class StateMatch:
    """Outcome of `match_state`.

    Attributes:
        loadable: entries to copy into the system.
        fresh: modules of the system that the file does not have; they keep their new values.
        dropped: modules of the file that the system does not have; they are ignored.
        problems: one line per key that makes the file unfit; empty if it fits.
    """

    loadable: dict[str, Tensor] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_state(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor], trained: Collection[str] | None = None
) -> StateMatch:
    """Sort the entries of ``found`` into those that fit ``own`` and those that do not.

    Args:
        own: state dict of the system.
        found: state dict of the file, under our names or upstream's.
        trained: keys of ``own`` that are parameters, all if None. The others are bookkeeping
            (an occupancy grid): where the file lacks them they start fresh like a module.
    """
    match = StateMatch()
    found = with_our_names(own, found)
    missing = [key for key in own if key not in found]
    if trained is not None:
        match.fresh = [key for key in missing if key not in trained]
        missing = [key for key in missing if key in trained]
    unexpected = [key for key in found if key not in own]
    for key in own:
        if key not in found:
            continue
        if _shape(own[key]) == _shape(found[key]):
            match.loadable[key] = found[key]
        else:
            match.problems.append(
                f"{key}: shape {_shape(found[key])} in the file, {_shape(own[key])} here"
            )
    fresh, torn = _absent_modules(missing, found)
    gone, extra = _absent_modules(unexpected, own)
    renamed = {_parent(name) for name in fresh} & {_parent(name) for name in gone} - {""}
    for name in fresh:
        if _parent(name) in renamed:
            match.problems.append(f"{name}: here, but not in the file")
        else:
            match.fresh.append(name)
    for name in gone:
        if _parent(name) in renamed:
            match.problems.append(f"{name}: in the file, but not here")
        else:
            match.dropped.append(name)
    match.problems += [f"{key}: here, but not in the file" for key in torn]
    match.problems += [f"{key}: in the file, but not here" for key in extra]
    return match


def describe_problems(problems: list[str]) -> str:
    """Join the first problems into one readable clause."""
    shown = "; ".join(problems[:_LISTED])
    rest = len(problems) - _LISTED
    return shown + (f"; and {rest} more" if rest > 0 else "")


def _absent_modules(keys: Iterable[str], other: Mapping) -> tuple[list[str], list[str]]:
    """Split ``keys`` into the largest named modules of which ``other`` has nothing, and the rest.

    Returns:
        modules: their names, each once, in order of appearance.
        rest: keys whose own module is partly in ``other``, or which sit in a numbered container
            that is partly in ``other``.
    """
    prefixes = {""}
    for key in other:
        parts = key.split(".")
        prefixes.update(".".join(parts[:depth]) for depth in range(1, len(parts)))
    modules: dict[str, None] = {}
    rest = []
    for key in keys:
        parts = key.split(".")
        for depth in range(1, len(parts)):
            name = ".".join(parts[:depth])
            if name not in prefixes:
                break
        else:
            rest.append(key)
            continue
        if parts[depth - 1].isdigit():
            rest.append(key)
        else:
            modules[name] = None
    return list(modules), rest


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _shape(value) -> tuple:
    return tuple(getattr(value, "shape", ()))
