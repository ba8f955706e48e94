"""Answers `import tinycudann`, `nerfacc` and `nvdiffrast` where these are not installed.

Extensions import these packages at the top of their files, and none of them can be installed or
used without CUDA. With `install_stand_ins` such an extension loads: what a stand-in has works, and
what only the real package has says so in one sentence when it is used, not when it is imported.

An installed package always wins: our finder is asked last.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from threestudio.logs import info

# Package to the module that holds its stand-in. That module lists in ``__all__`` what works, and in
# ``ABSENT`` the names that only the real package has.
STAND_INS = {
    "tinycudann": "threestudio.kernels.tinycudann",
    "nerfacc": "threestudio.stand_ins.nerfacc",
    "nvdiffrast": "threestudio.stand_ins.nvdiffrast",
}


class NeedsPackageError(ImportError):
    """Something was used that only a real package on a GPU offers."""


def install_stand_ins() -> None:
    """Let stand-ins answer imports of packages that are not installed; idle the second time."""
    if not any(isinstance(finder, StandInFinder) for finder in sys.meta_path):
        sys.meta_path.append(StandInFinder())


def is_installed(package: str) -> bool:
    """Tell whether the real package is installed; a stand-in does not count."""
    spec = importlib.machinery.PathFinder.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder of that name has none


class StandInFinder:
    """The last entry of ``sys.meta_path``, so that whatever is installed is found before."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package = name.partition(".")[0]
        if package not in STAND_INS or (path is not None and not _is_ours(package)):
            return None
        # Submodules are looked for here too: all of them hold what the package does.
        return importlib.machinery.ModuleSpec(
            name, _StandInLoader(), origin=f"stand-in of {package}", is_package=True
        )


class _StandInLoader:
    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        source = importlib.import_module(STAND_INS[package])
        offered = {name: getattr(source, name) for name in source.__all__}
        module.__dict__.update(offered, __doc__=source.__doc__, __all__=list(source.__all__))
        module.__version__ = getattr(source, "__version__", "0+stand-in")
        module.__getattr__ = _absent_names(module.__name__, source)
        if module.__name__ == package:
            works = ", ".join(source.__all__) or "nothing"
            info(
                "%s is not installed; a stand-in answers its import. What works: %s.",
                package, works,
            )  # fmt: skip


def _is_ours(package: str) -> bool:
    module = sys.modules.get(package)
    return isinstance(getattr(module, "__loader__", None), _StandInLoader)


def _absent_names(module: str, source: ModuleType) -> Any:
    """The ``__getattr__`` of a stand-in: a class that cannot be used for each absent name."""

    def __getattr__(name: str) -> type:
        if name in source.ABSENT:
            return _absent(module, name)
        raise AttributeError(f"module {module!r} (a stand-in) has no attribute {name!r}")

    return __getattr__


def _absent(module: str, name: str) -> type:
    """A class, so that an extension may derive from it; building or asking it raises."""
    package = module.partition(".")[0]
    sentence = (
        f"{module}.{name} needs a CUDA GPU and the real package {package}; install it there, or "
        "leave out the part of the extension that uses it."
    )

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NeedsPackageError(sentence, name=package)

    class Refusing(type):
        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            refuse()

    return Refusing(name, (), {"__new__": refuse, "__doc__": sentence})
