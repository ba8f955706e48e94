"""Where each key of a configuration was written, for messages: ``file.yaml:12``."""

from __future__ import annotations

from pathlib import Path

import yaml

_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def key_origins(path: Path, root: Path) -> dict[str, str]:
    """Map every dotted key of a YAML file, and of the files it includes, to ``file:line``.

    The file itself wins over what it includes. The file was read before, so it is valid.
    """
    return _origins(Path(path), root, ())


def with_profile(origins: dict[str, str], profile: str) -> dict[str, str]:
    """Return ``origins`` with the keys of one profile's delta laid over the top level's."""
    prefix = f"profiles.{profile}."
    delta = {k.removeprefix(prefix): at for k, at in origins.items() if k.startswith(prefix)}
    return {**origins, **delta}


def with_overrides(origins: dict[str, str], keys: list[str]) -> dict[str, str]:
    """Return ``origins`` with overridden keys, and what lies below them, at the command line."""
    kept = {k: at for k, at in origins.items() if not any(k.startswith(f"{o}.") for o in keys)}
    return {**kept, **dict.fromkeys(keys, "command line")}


def _origins(path: Path, root: Path, chain: tuple[Path, ...]) -> dict[str, str]:
    node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_YamlLoader)
    if not isinstance(node, yaml.MappingNode):
        return {}
    merged: dict[str, str] = {}
    for key, value in node.value:
        if key.value == "include" and path.resolve() not in chain:
            names = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for name in names:
                merged.update(_origins(root / name.value, root, (*chain, path.resolve())))
    merged.update(_lines_below(node, path, "", 0))
    return merged


def _lines_below(node: yaml.MappingNode, path: Path, prefix: str, depth: int) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in node.value:
        full_key = f"{prefix}{key.value}"
        found[full_key] = f"{path}:{key.start_mark.line + 1}"
        # Deeper than any schema goes; also bounds what nested aliases can expand to.
        if isinstance(value, yaml.MappingNode) and depth < 12:
            found.update(_lines_below(value, path, f"{full_key}.", depth + 1))
    return found
