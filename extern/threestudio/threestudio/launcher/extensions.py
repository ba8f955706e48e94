"""Loading of the extensions in ``custom/``.

Ours, ``custom/fourd``, comes first and is imported as ``custom.fourd``. Every other folder or file
is imported under its own name, hyphens and all, as upstream does, in alphabetical order.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from threestudio import registry
from threestudio.logs import debug, info, warn
from threestudio.stand_ins.finder import install_stand_ins

OWN_EXTENSION = "fourd"
DISABLED_SUFFIX = "_disabled"


def load_extensions(folder: Path) -> list[str]:
    """Import every extension in ``folder`` and return the names of those that loaded.

    A failing extension is reported once, with its traceback, and remembered: `find` names it and
    its cause when a name is not known. What it registered before it failed is taken back. Imports
    of packages that need CUDA are answered by stand-ins where those are not installed.

    Args:
        folder: the project's ``custom`` folder; a missing one holds no extension.
    """
    install_stand_ins()
    loaded = []
    for name, path in _extensions_in(folder):
        before = dict(registry.__modules__)
        try:
            _import_extension(name, path)
        except (Exception, SystemExit) as error:
            _take_back(name, before)
            _report_failure(name, path, error)
            continue
        debug("Loaded extension %s from %s.", name, path)
        loaded.append(name)
    return loaded


def _extensions_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (name, file to import), ours first, then the others sorted by name."""
    if not folder.is_dir():
        info("There is no folder %s; only built-in modules are available.", folder)
        return
    entries = sorted(folder.iterdir(), key=lambda path: (path.name != OWN_EXTENSION, path.name))
    for path in entries:
        name = path.stem if path.is_file() else path.name
        if name.startswith((".", "__")) or name.endswith(DISABLED_SUFFIX):
            continue
        if path.is_file() and path.suffix == ".py":
            yield name, path
        elif path.is_dir() and (path / "__init__.py").is_file():
            yield name, path / "__init__.py"
        elif path.is_dir() and any(path.glob("*.py")):
            warn("%s has no __init__.py, so it is not loaded as an extension.", path)


def _import_extension(name: str, path: Path) -> None:
    if name == OWN_EXTENSION and path.name == "__init__.py":
        project = str(path.parent.parent.parent)
        if project not in sys.path:
            sys.path.insert(0, project)
        importlib.import_module(f"{path.parent.parent.name}.{name}")
        return
    present = sys.modules.get(name)
    if present is not None:
        if _file_of(present) == path.resolve():
            return
        raise ImportError(
            f"the name {name!r} is taken by the module {present!r}; rename the extension's folder."
        )
    locations = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=locations)
    module = importlib.util.module_from_spec(spec)
    # Before execution, so that relative imports inside the extension find their package.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        for loaded in [key for key in sys.modules if key == name or key.startswith(name + ".")]:
            del sys.modules[loaded]
        raise


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if file else None


def _take_back(name: str, before: dict[str, type]) -> None:
    """Undo the registrations of a failed extension; what it merely imported stays."""
    owner = f"custom.{name}" if name == OWN_EXTENSION else name
    for registered, cls in list(registry.__modules__.items()):
        if cls.__module__ == owner or cls.__module__.startswith(owner + "."):
            del registry.__modules__[registered]
            if registered in before and before[registered] is not cls:
                registry.__modules__[registered] = before[registered]


def _report_failure(name: str, path: Path, error: BaseException) -> None:
    registry.record_failed_extension(name, error)
    traceback.print_exception(error)
    warn("Extension %r in %s could not be imported and is left out.", name, path)
