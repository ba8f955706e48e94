"""Pairs of a config: the key that names a module, and the key that holds its config."""

from __future__ import annotations

import dataclasses
import re
import typing

from omegaconf import DictConfig, OmegaConf

from threestudio import registry

# geometry_type -> geometry, guidance_type_multi_view -> guidance_multi_view
_TYPE = re.compile(r"_type(?=_|$)")


def part_name(key: str) -> str | None:
    """Return the key of the config that belongs to a ``..._type...`` key, None for other keys."""
    name, count = _TYPE.subn("", key, count=1)
    return name if count and name else None


def config_class(cls: type) -> type | None:
    """Return the dataclass that configures ``cls``: its ``Config``, or the type of its ``cfg``."""
    config = getattr(cls, "Config", None)
    if dataclasses.is_dataclass(config):
        return config
    try:
        annotation = typing.get_type_hints(cls).get("cfg")
    except Exception:
        # Annotations of foreign classes may name what is not importable; they stay unchecked.
        return None
    return annotation if dataclasses.is_dataclass(annotation) else None


def drop_replaced_keys(
    merged: DictConfig, file_cfg: DictConfig, given: DictConfig, path: str = ""
) -> list[str]:
    """Drop keys of a config file that belong to a module which was replaced, in place.

    Where a profile or the command line names another module for a part, the file's values for the
    old module stay as far as the new one has such keys. The rest is dropped.

    Args:
        merged: the file with everything laid over it.
        file_cfg: the file alone.
        given: what was laid over it; its keys are never dropped.
        path: dotted key of ``merged``, for the lines.

    Returns:
        One line for each part that lost keys.
    """
    lines: list[str] = []
    for key in list(file_cfg):
        value = _raw(merged, key)
        if isinstance(value, DictConfig) and isinstance(_raw(file_cfg, key), DictConfig):
            below = _raw(given, key)
            laid_over = below if isinstance(below, DictConfig) else DictConfig({})
            lines += drop_replaced_keys(value, _raw(file_cfg, key), laid_over, f"{path}{key}.")
        name = part_name(str(key))
        if name is not None and isinstance(value, str) and value != _raw(file_cfg, key):
            dropped = _drop_unknown(merged, file_cfg, given, name, value)
            if dropped:
                lines.append(f"{path}{name} is now {value}; dropped {', '.join(dropped)}.")
    return lines


def drop_unfit_keys(delta: DictConfig, lender: DictConfig, borrower: DictConfig) -> None:
    """Drop keys of a delta that no module of the config that borrows it has, in place.

    A delta is written for the modules of its own config. Where the borrower has another module for
    a part, what the delta says of that part stays as far as the module has such keys.

    Args:
        delta: values to lay over the borrower.
        lender: the config that the delta was written for.
        borrower: a config of the same ``system_type``.
    """
    system = _raw(delta, "system")
    if not isinstance(system, DictConfig):
        return
    theirs, ours = (
        cfg.get("system") or DictConfig({}) for cfg in (OmegaConf.merge(borrower, delta), lender)
    )
    for key in ours:
        name = part_name(str(key))
        part = _raw(system, name) if name is not None else None
        if not isinstance(part, DictConfig):
            continue
        module = _raw(theirs, key) or _default(borrower, key)
        if registry.canonical_name(str(module)) == registry.canonical_name(str(_raw(ours, key))):
            continue
        known = _known_keys(module)
        for unknown in [k for k in part if known is not None and k not in known]:
            del part[unknown]


def _default(cfg: DictConfig, key: object) -> object:
    """The value of a key that a config leaves to its system."""
    schema = _schema(_raw(cfg, "system_type"))
    fields = {} if schema is None else {field.name: field for field in dataclasses.fields(schema)}
    return fields[key].default if key in fields else None


def _drop_unknown(
    merged: DictConfig, file_cfg: DictConfig, given: DictConfig, name: str, module: str
) -> list[str]:
    old, part, laid_over = _raw(file_cfg, name), _raw(merged, name), _raw(given, name)
    if not isinstance(old, DictConfig) or not isinstance(part, DictConfig):
        return []
    known = _known_keys(module)
    if known is None:
        return []
    kept = set(laid_over) if isinstance(laid_over, DictConfig) else set()
    dropped = [str(key) for key in old if key not in known and key not in kept and key in part]
    for key in dropped:
        del part[key]
    return dropped


def _schema(module: object) -> type | None:
    """The config class of a module by its name; None if it has none or there is no such name."""
    try:
        return config_class(registry.find(str(module)))
    except (KeyError, ImportError, ValueError):
        return None  # The check of the whole experiment reports the name.


def _known_keys(module: object) -> set[str] | None:
    schema = _schema(module)
    return None if schema is None else {field.name for field in dataclasses.fields(schema)}


def _raw(cfg: DictConfig, key: object) -> object:
    """Return a value as written: no interpolation is resolved, ``???`` reads as None."""
    node = cfg._get_node(key) if key in cfg else None
    if node is None or node._is_missing():
        return None
    return node if isinstance(node, DictConfig) else node._value()
