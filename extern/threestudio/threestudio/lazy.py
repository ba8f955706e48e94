"""Submodules that are imported when they are first asked for as attributes."""

import importlib
from collections.abc import Callable
from types import ModuleType


def submodule_getattr(package: str) -> Callable[[str], ModuleType]:
    """Return a module ``__getattr__`` that imports ``<package>.<name>`` on first access.

    Extensions reach into the package by attribute (``threestudio.models.geometry.base``) without
    importing the parts; upstream loads everything at once, we load what is asked for.
    """

    def __getattr__(name: str) -> ModuleType:
        full_name = f"{package}.{name}"
        if not name.startswith("_"):
            try:
                return importlib.import_module(full_name)
            except ModuleNotFoundError as error:
                if error.name != full_name:
                    raise
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return __getattr__
