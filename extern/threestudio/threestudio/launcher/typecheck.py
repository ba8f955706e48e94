"""``--typecheck``: shapes and types of every function of the runtime, checked as it is called."""

from __future__ import annotations

from typing import Any


def install_type_checks() -> None:
    """Check every function of the runtime that is imported from now on."""
    from jaxtyping import install_import_hook

    install_import_hook("threestudio", f"{__name__}.checked")


def checked(function: Any) -> Any:
    """Decorate a function to check its arguments and result; an int may stand for a float.

    The checker is beartype: typeguard 4 takes jaxtyping's dimension strings for forward
    references, and stops at the first function that has one.
    """
    from beartype import BeartypeConf, beartype

    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
