"""Where values come from: YAML files with their includes, and ``key=value`` overrides."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    OmegaConfBaseException,
)
from omegaconf.resolvers import oc

from threestudio.utils.config_errors import (
    ConfigFileError,
    ConfigValueError,
    MissingValueError,
)
from threestudio.utils.config_text import (
    TEXT_KEYS,
    escape_interpolations,
    escaped_config,
    is_text_key,
    unquote,
)

_MAX_YAML_BYTES = 4 * 2**20
_NUMBER_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp"))
_YamlLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Override:
    """One ``key=value`` of the command line; ``stage`` is 1-based, None means every stage."""

    key: str
    value: str
    stage: int | None = None

    def as_config(self) -> DictConfig:
        """Return the nested config that the override stands for.

        Text keys take the value as typed, with one pair of outer quotes removed; every other value
        is YAML.

        Raises:
            ConfigValueError: if the value is not valid YAML or the key is malformed.
        """
        try:
            # No YAML value can begin with @ or `, which time stamps do.
            if is_text_key(self.key) or self.value[:1] in ("@", "`"):
                config = OmegaConf.create({})
                text = escape_interpolations(unquote(self.value))
                OmegaConf.update(config, self.key, text, force_add=True)
                return config
            return OmegaConf.from_dotlist([f"{self.key}={self.value}"])
        except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigValueError(
                f"override {self.key}={self.value} cannot be read as YAML ({reason}); "
                "quote the value, for example key='\"text\"'."
            ) from error


def parse_override(argument: str) -> Override:
    """Read ``key=value`` or ``2:key=value`` (second stage only).

    Raises:
        ConfigValueError: if the argument has no ``=`` or no key.
    """
    key, separator, value = argument.partition("=")
    if not separator or not key.strip():
        raise ConfigValueError(
            f"argument {argument!r} is no override; expected key=value, for example seed=1."
        )
    stage_text, colon, rest = key.partition(":")
    if colon and stage_text.isdigit():
        return Override(rest.strip(), value, stage=int(stage_text))
    return Override(key.strip(), value)


def load_yaml(path: str | Path) -> DictConfig:
    """Read one YAML file. Numbers under text keys stay text, as typed.

    Raises:
        ConfigFileError: if the file is missing or unreadable.
        ConfigValueError: if it is no YAML mapping; names the line.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_YAML_BYTES:
            raise ConfigValueError(f"{path} is larger than {_MAX_YAML_BYTES} bytes; not a config.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigFileError(
            f"config file {str(path)!r} cannot be read: {reason}. Check the path after --config "
            "or include."
        ) from error
    return parse_yaml(text, str(path))


def parse_yaml(text: str, source: str = "<string>") -> DictConfig:
    """Read YAML text; see `load_yaml`."""
    try:
        config = OmegaConf.load(io.StringIO(_quote_typed_text(text)))
    except (yaml.YAMLError, OmegaConfBaseException, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigValueError(f"{source} is not a valid config: {reason}") from error
    if not isinstance(config, DictConfig):
        raise ConfigValueError(f"{source} holds a list; expected a mapping of keys to values.")
    return config


def load_with_includes(path: str | Path, root: Path) -> DictConfig:
    """Read a YAML file merged over the files of its ``include`` list, themselves likewise.

    Included paths are relative to ``root``. Top-level blocks that only an included file brings and
    that are no field of the experiment serve interpolation and are dropped by `resolve_config`.
    """
    return _with_includes(load_yaml(path), str(path), root, (Path(path).resolve(),))


def merge_sources(
    yamls: Sequence[str | Path],
    overrides: Sequence[str | Override],
    from_string: bool = False,
    root: Path | None = None,
) -> DictConfig:
    """Merge YAML sources in order, then overrides; nothing is resolved yet."""
    root = Path.cwd() if root is None else root
    if from_string:
        loaded = [_with_includes(parse_yaml(str(y)), "<string>", root, ()) for y in yamls]
    else:
        loaded = [load_with_includes(path, root) for path in yamls]
    merged = OmegaConf.unsafe_merge(OmegaConf.create({}), *loaded)
    for override in overrides:
        parsed = parse_override(override) if isinstance(override, str) else override
        apply_override(merged, parsed)
    return merged


def apply_override(config: DictConfig, override: Override) -> None:
    """Merge one override into ``config``, in place.

    Raises:
        ConfigValueError: if the key runs through something that is no mapping.
    """
    try:
        config.merge_with(override.as_config())
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigValueError(
            f"override {override.key}={override.value} does not fit the config: "
            f"{str(error).splitlines()[0]}"
        ) from error


def resolve_config(config: DictConfig) -> DictConfig:
    """Return ``config`` with every interpolation replaced by its value, and text made literal.

    Environment variables are refused: their values would be written into the run's folder.

    Raises:
        MissingValueError: if an interpolation leads to a value that is ``???``.
        ConfigValueError: if an interpolation cannot be resolved.
    """
    unresolved = config.copy()
    profiles = unresolved.pop("profiles", None)
    included = unresolved.pop("_definitions", None) or []
    with _refused_environment():
        try:
            values = OmegaConf.to_container(unresolved, resolve=True)
        except InterpolationToMissingValueError as error:
            raise MissingValueError(_missing_value_message(error)) from error
        except OmegaConfBaseException as error:
            reason = str(error.msg or error).splitlines()[0]
            raise ConfigValueError(f"cannot resolve {error.full_key!r}: {reason}") from error
    for name in included:
        values.pop(name, None)
    resolved = escaped_config(values)
    if profiles is not None:
        resolved["profiles"] = profiles
    return resolved


def missing_keys(config: DictConfig) -> list[str]:
    """Return the dotted keys whose value is ``???``, profiles left out, sorted."""
    values = OmegaConf.to_container(config, resolve=False)
    values.pop("profiles", None)
    return sorted(_missing_below(values, ""))


def _missing_below(value: Any, path: str) -> Iterator[str]:
    if value == "???":
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _missing_below(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _missing_below(item, f"{path}[{index}]")


def _missing_value_message(error: OmegaConfBaseException) -> str:
    return f"{error.full_key!r} needs a value that is not set (???)."


def _with_includes(
    config: DictConfig, source: str, root: Path, chain: tuple[Path, ...]
) -> DictConfig:
    includes = config.pop("include", None) or []
    if isinstance(includes, str):
        includes = [includes]
    merged = OmegaConf.create({})
    for name in includes:
        path = root / str(name)
        if path.resolve() in chain:
            raise ConfigValueError(f"{source} includes {name!r}, which includes it in turn.")
        if not path.is_file():
            raise ConfigFileError(
                f"{source} includes {name!r}, but {path} is no file; included paths are relative "
                "to the project's root."
            )
        part = _with_includes(load_yaml(path), str(path), root, (*chain, path.resolve()))
        # Nobody else holds either part, and copying them is most of what a merge costs.
        merged = OmegaConf.unsafe_merge(merged, part)
    experiment_keys = _experiment_keys()
    definitions = [key for key in merged if key not in experiment_keys and key not in config]
    merged = OmegaConf.unsafe_merge(merged, config)
    merged["_definitions"] = sorted({*definitions} - {"_definitions"})
    return merged


def _experiment_keys() -> set[str]:
    from threestudio.utils.config import ExperimentConfig

    return {f.name for f in fields(ExperimentConfig)}


def _quote_typed_text(text: str) -> str:
    """Quote the numbers and booleans under text keys, so that ``prompt: 007`` stays ``007``."""
    spans: list[tuple[int, int]] = []
    root = yaml.compose(text, Loader=_YamlLoader)
    if isinstance(root, yaml.ScalarNode) and root.value:
        raise yaml.YAMLError(f"it holds only the text {root.value[:60]!r}")
    pending = [root]
    seen: set[int] = set()
    while pending:
        node = pending.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
            continue
        for key, value in node.value:
            if key.value in TEXT_KEYS and value.tag in _NUMBER_TAGS and not value.style:
                spans.append((value.start_mark.index, value.end_mark.index))
            pending.append(value)
    for start, end in sorted(set(spans), reverse=True):
        text = f'{text[:start]}"{text[start:end]}"{text[end:]}'
    return text


@contextlib.contextmanager
def _refused_environment() -> Iterator[None]:
    """Replace OmegaConf's access to the environment by a refusal while a config is resolved."""
    OmegaConf.register_resolver("oc.env", _refuse_environment, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_resolver("oc.env", oc.env, replace=True)


def _refuse_environment(*names: Any) -> None:
    raise ConfigValueError(
        f"${{oc.env:{','.join(map(str, names))}}} is refused: values of the environment would be "
        "written into the run's folder. Write the value itself on the command line."
    )
