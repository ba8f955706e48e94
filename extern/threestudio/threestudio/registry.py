"""The registry of modules: names in a config to classes.

Four kinds of names exist: registered ones, lazily declared ones (the module that registers the
name is imported on first use), aliases, and refused ones, which upstream has and this runtime does
not. Code of this project counts as first-party; an extension of somebody else may replace one of
our names or bring a refused one, two of them may not share one.
"""

import importlib
from collections.abc import Callable

from threestudio.logs import info
from threestudio.suggest import nearest

FIRST_PARTY_PACKAGES = ("threestudio", "custom.fourd")

__modules__: dict[str, type] = {}
_lazy_modules: dict[str, str] = {}
_aliases: dict[str, str] = {}
_refused: dict[str, str] = {}
_failed_extensions: dict[str, BaseException] = {}


class UnknownNameError(KeyError):
    """No module is registered under a name; the message lists the nearest ones."""

    def __str__(self) -> str:
        # KeyError shows its argument quoted, which would escape the line breaks of the message.
        return str(self.args[0])


class NotProvidedError(UnknownNameError):
    """A name is that of an upstream module which this runtime does not have; it says why."""


def register(name: str) -> Callable[[type], type]:
    """Return a class decorator that makes the class known as ``name``.

    Raises:
        ValueError: on decoration, if another module of the same party holds the name.
    """

    def decorate(cls: type) -> type:
        if _may_take(name, cls):
            __modules__[name] = cls
        return cls

    return decorate


def register_lazy(name: str, module: str) -> None:
    """Make ``name`` known; `find` imports ``module``, which must register the name, on first use.

    Raises:
        ValueError: if another module already declared or registered the name.
    """
    declared = _lazy_modules.get(name)
    registered = __modules__.get(name)
    if declared not in (None, module):
        raise ValueError(_collision(name, declared, module))
    if registered is not None and registered.__module__ != module and is_first_party(module):
        if is_first_party(registered.__module__):
            raise ValueError(_collision(name, registered.__module__, module))
    _lazy_modules[name] = module


def register_alias(alias: str, name: str) -> None:
    """Let `find` answer ``alias`` with what is registered as ``name``."""
    if _aliases.get(alias, name) != name:
        raise ValueError(f"alias {alias!r} stands for {_aliases[alias]!r} already, not {name!r}.")
    _aliases[alias] = name


def register_refusal(name: str, reason: str) -> None:
    """Let `find` answer ``name``, while nobody registers it, with a sentence that ends in reason.

    Args:
        name: what upstream calls a module that this runtime does not provide.
        reason: why not, and what to use instead; completes "... does not provide: ".
    """
    _refused[name] = reason


def refused_names() -> list[str]:
    """Return the upstream names that `find` refuses, sorted; not those that somebody brought."""
    return sorted(set(_refused) - set(known_names()))


def find(name: str) -> type:
    """Return the class registered as ``name``.

    ``"main:a,b"`` builds a new class whose bases are (a, b, main), in that order.

    Raises:
        UnknownNameError: (a KeyError) if the name is not known.
        NotProvidedError: (also one) if it is upstream's and not part of this runtime.
        ImportError: if the module that should register the name cannot be imported.
        ValueError: if ``name`` holds more than one colon.
    """
    if ":" in name:
        return _compose(name)
    if name in __modules__:
        return __modules__[name]
    if name in _aliases:
        return find(_aliases[name])
    if name in _lazy_modules:
        return _import_lazy(name, _lazy_modules[name])
    if name in _refused:
        raise NotProvidedError(_refusal_message(name))
    raise UnknownNameError(_unknown_message(name))


def canonical_name(name: str) -> str:
    """Return what ``name`` is an alias of, or ``name`` itself."""
    return name if name in __modules__ else _aliases.get(name, name)


def known_names() -> list[str]:
    """Return every name that `find` answers, sorted, aliases included."""
    return sorted({*__modules__, *_lazy_modules, *_aliases})


def record_failed_extension(extension: str, cause: BaseException) -> None:
    """Remember that an extension could not be imported, for the messages of `find`."""
    _failed_extensions[extension] = cause


def failed_extensions() -> dict[str, BaseException]:
    """Return the extensions whose import failed, with the exception of each."""
    return dict(_failed_extensions)


def describe_failed_extensions() -> str:
    """Return one line per failed extension with its cause, or an empty string."""
    return "".join(
        f"\nExtension {name!r} could not be imported: {type(cause).__name__}: {cause}"
        for name, cause in sorted(_failed_extensions.items())
    )


def _compose(name: str) -> type:
    if name.count(":") != 1:
        raise ValueError(f"{name!r} has more than one colon; expected 'main:mixin' or 'main:a,b'.")
    main_name, mixin_names = name.split(":")
    main = find(main_name)
    mixins = tuple(find(mixin.strip()) for mixin in mixin_names.split(","))
    return type(f"{main_name}.{mixin_names}", (*mixins, main), {"__module__": main.__module__})


def _import_lazy(name: str, module: str) -> type:
    try:
        importlib.import_module(module)
    except ImportError as error:
        message = f"{name!r} is provided by {module}, which cannot be imported: {error}"
        raise ImportError(message, name=error.name, path=error.path) from error
    if name not in __modules__:
        raise ImportError(f"{module} was imported for {name!r} but registers no such name.")
    return __modules__[name]


def _may_take(name: str, cls: type) -> bool:
    """Decide whether ``cls`` becomes the class of ``name``; raise on a collision."""
    newcomer = cls.__module__
    holder_class = __modules__.get(name)
    holder = _lazy_modules.get(name) if holder_class is None else holder_class.__module__
    if holder is None and name in _aliases:
        holder = "threestudio.registry_table"
        if is_first_party(newcomer):
            raise ValueError(f"{name!r} is an alias of {_aliases[name]!r}; register another name.")
    if holder is None or holder == newcomer:
        same = holder_class is None or holder_class.__qualname__ == cls.__qualname__
        if not same:
            raise ValueError(_collision(name, holder, newcomer))
        return True
    if is_first_party(holder) and not is_first_party(newcomer):
        info("%s replaces the built-in module %r.", newcomer, name)
        return True
    if is_first_party(newcomer) and not is_first_party(holder):
        # An extension replaced the name before our own module was first imported.
        return False
    raise ValueError(_collision(name, holder, newcomer))


def is_first_party(module: str) -> bool:
    """Tell whether a module, by its dotted name, belongs to this project."""
    return any(module == root or module.startswith(root + ".") for root in FIRST_PARTY_PACKAGES)


def _collision(name: str, holder: str | None, newcomer: str) -> str:
    return (
        f"the name {name!r} is registered by {holder} and again by {newcomer}; "
        "rename one of them or disable one extension (folder name ending in _disabled)."
    )


def _refusal_message(name: str) -> str:
    message = f"{name!r} is an upstream module that this runtime does not provide: {_refused[name]}"
    # An extension that would have brought the module may be the one that failed.
    return message + describe_failed_extensions()


def _unknown_message(name: str) -> str:
    near = ", ".join(repr(other) for other in nearest(name, known_names()))
    message = f"no module is registered as {name!r}."
    if near:
        message += f" The nearest names are {near}."
    return message + describe_failed_extensions()
