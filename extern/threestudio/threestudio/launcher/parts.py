"""Pairs of a config: the key that names a module, and the key that holds its config."""

from __future__ import annotations

import dataclasses
import re
import typing

from omegaconf import DictConfig

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


def _drop_unknown(
    merged: DictConfig, file_cfg: DictConfig, given: DictConfig, name: str, module: str
) -> list[str]:
    old, part, laid_over = _raw(file_cfg, name), _raw(merged, name), _raw(given, name)
    if not isinstance(old, DictConfig) or not isinstance(part, DictConfig):
        return []
    try:
        schema = config_class(registry.find(module))
    except (KeyError, ImportError, ValueError):
        return []  # The check of the whole experiment reports the name.
    if schema is None:
        return []
    known = {field.name for field in dataclasses.fields(schema)}
    kept = set(laid_over) if isinstance(laid_over, DictConfig) else set()
    dropped = [str(key) for key in old if key not in known and key not in kept and key in part]
    for key in dropped:
        del part[key]
    return dropped


def _raw(cfg: DictConfig, key: object) -> object:
    """Return a value as written: no interpolation is resolved, ``???`` reads as None."""
    node = cfg._get_node(key) if key in cfg else None
    if node is None or node._is_missing():
        return None
    return node if isinstance(node, DictConfig) else node._value()
