"""Checks of a whole experiment before anything is built: every key, type and module name.

The experiment is walked along its schema: the top level, the data module's config, the system's
config, and in each config every pair ``<part>_type`` / ``<part>``, whose module `find` knows. What
has no schema (a ``loss`` table, a foreign module's free dict) stays open.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threestudio import registry
from threestudio.launcher.parts import config_class, part_name
from threestudio.suggest import did_you_mean
from threestudio.utils.config import ExperimentConfig, unknown_key_message
from threestudio.utils.config_errors import UnknownKeyError, WrongTypeError

# Argument names, copied so that a check needs no lightning; a test compares them with its classes.
TRAINER_KEYS = frozenset(
    """
    accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs
    min_epochs max_steps min_steps max_time limit_train_batches limit_val_batches
    limit_test_batches limit_predict_batches overfit_batches val_check_interval
    check_val_every_n_epoch num_sanity_val_steps log_every_n_steps enable_checkpointing
    enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val
    gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler profiler
    detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs
    default_root_dir enable_autolog_hparams model_registry
    """.split()
)
# Arguments of our own that the launcher takes out before lightning sees the rest.
OWN_TRAINER_KEYS = frozenset({"non_finite_policy"})
# Of lightning's arguments, those that a config sets to a whole number or to a number.
WHOLE_NUMBERS = frozenset(
    """
    max_steps min_steps max_epochs min_epochs log_every_n_steps num_sanity_val_steps num_nodes
    check_val_every_n_epoch accumulate_grad_batches every_n_train_steps save_top_k every_n_epochs
    """.split()
)
NUMBERS = frozenset({"val_check_interval", "gradient_clip_val"})
CHECKPOINT_KEYS = frozenset(
    """
    dirpath filename monitor verbose save_last save_top_k save_on_exception save_weights_only mode
    auto_insert_metric_name every_n_train_steps train_time_interval every_n_epochs
    save_on_train_epoch_end enable_version_counter
    """.split()
)


@dataclass(frozen=True)
class Issue:
    """One thing wrong with an experiment; ``kind`` is "unknown", "type" or "module"."""

    kind: str
    key: str
    message: str


@dataclass(frozen=True)
class Part:
    """One module of an experiment: the key of its config, its class and its config."""

    key: str
    cls: type
    cfg: DictConfig


def check_experiment(cfg: DictConfig, origins: dict[str, str] | None = None) -> None:
    """Raise one error that lists everything wrong with an experiment, if anything is.

    Args:
        cfg: a resolved experiment, plain or structured.
        origins: dotted key to the place that it was written, shown before each message.

    Raises:
        UnknownKeyError: if all that is wrong are unknown keys or modules.
        WrongTypeError: if a value has the wrong type.
    """
    issues = list(find_issues(cfg))
    if not issues:
        return
    lines = [_located(issue, origins or {}) for issue in issues]
    error = WrongTypeError if any(i.kind == "type" for i in issues) else UnknownKeyError
    raise error("\n".join(lines))


def find_issues(cfg: DictConfig) -> Iterator[Issue]:
    """Yield everything wrong with the keys, types and module names of an experiment."""
    yield from _schema_issues(ExperimentConfig, cfg, "")
    yield from _table_issues(
        cfg, "trainer", TRAINER_KEYS | OWN_TRAINER_KEYS, "pytorch_lightning.Trainer"
    )
    yield from _table_issues(cfg, "checkpoint", CHECKPOINT_KEYS, "ModelCheckpoint")
    for name in ("data", "system"):
        yield from _part_issues(cfg, name, "", cfg.get(f"{name}_type"))


def iterate_parts(cfg: DictConfig) -> Iterator[Part]:
    """Yield the data module, the system and every module below them that the config names.

    Parts whose name is unknown, and what lies below them, are left out.
    """
    for name in ("data", "system"):
        yield from _parts_below(cfg, name, "", cfg.get(f"{name}_type"))


def used_parts(cfg: DictConfig) -> Iterator[Part]:
    """Yield the parts of `iterate_parts`, less those that no step of a training would use.

    Of those a system knows: its class method ``unused_parts`` lists them.
    """
    unused: set[str] = set()
    for part in iterate_parts(cfg):
        idle = getattr(part.cls, "unused_parts", None)
        if callable(idle):
            unused |= {f"{part.key}.{name}" for name in idle(part.cfg)}
        if part.key not in unused:
            yield part


def required_models(cfg: DictConfig) -> list[str]:
    """List the pretrained models that training this experiment loads, each once."""
    names: list[str] = []
    for part in used_parts(cfg):
        lister = getattr(part.cls, "required_models", None)
        if callable(lister):
            names.extend(lister(part.cfg))
    return list(dict.fromkeys(names))


def accepts_key(cfg: DictConfig, key: str) -> bool:
    """Tell whether an experiment has ``key``: in its file, or in the schema of one of its parts."""
    node: Any = cfg
    parts = key.split(".")
    for part in parts:
        if not isinstance(node, DictConfig) or part not in node:
            break
        node = node._get_node(part)
    else:
        return True
    probe = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{key}=null"]))
    return not any(
        issue.kind == "unknown" and (key == issue.key or key.startswith(issue.key + "."))
        for issue in find_issues(probe)
    )


def known_keys(cfg: DictConfig) -> list[str]:
    """List dotted keys of an experiment: those of its schema and those written in its file."""
    keys = {field.name for field in dataclasses.fields(ExperimentConfig)}
    keys |= {f"trainer.{name}" for name in TRAINER_KEYS | OWN_TRAINER_KEYS}
    keys |= {f"checkpoint.{name}" for name in CHECKPOINT_KEYS}
    for part in iterate_parts(cfg):
        schema = config_class(part.cls)
        names = [f.name for f in dataclasses.fields(schema)] if schema else list(part.cfg)
        keys |= {f"{part.key}.{name}" for name in names}
    return sorted(keys | set(_written_keys(cfg)))


def _parts_below(cfg: DictConfig, name: str, path: str, type_name: Any) -> Iterator[Part]:
    value = _plain_get(cfg, name)
    if not type_name or not isinstance(type_name, str):
        return
    try:
        cls = registry.find(type_name)
    except (KeyError, ImportError, ValueError):
        return
    sub_cfg = value if isinstance(value, DictConfig) else OmegaConf.create({})
    key = f"{path}.{name}" if path else name
    yield Part(key, cls, sub_cfg)
    schema = config_class(cls)
    if schema is not None:
        for part_name, part_type in _typed_parts(schema, sub_cfg):
            yield from _parts_below(sub_cfg, part_name, key, part_type)


def _part_issues(cfg: DictConfig, name: str, path: str, type_name: Any) -> Iterator[Issue]:
    type_key = _type_key(cfg, name, path)
    key = f"{path}.{name}" if path else name
    if not type_name or not isinstance(type_name, str):
        return
    try:
        cls = registry.find(type_name)
    except (KeyError, ImportError, ValueError) as error:
        yield Issue("module", type_key, f"{type_key}: {error}")
        return
    schema = config_class(cls)
    sub_cfg = _plain_get(cfg, name)
    if sub_cfg is None:
        return
    if not isinstance(sub_cfg, DictConfig):
        yield _not_a_mapping(key, sub_cfg)
    elif schema is not None:
        yield from _schema_issues(schema, sub_cfg, key)
        for part_name, part_type in _typed_parts(schema, sub_cfg):
            yield from _part_issues(sub_cfg, part_name, key, part_type)


def _schema_issues(schema: type, cfg: DictConfig, path: str) -> Iterator[Issue]:
    """Yield what is wrong with the keys and scalars of ``cfg`` by the dataclass ``schema``."""
    fields = {f.name: f for f in dataclasses.fields(schema) if f.init}
    own = registry.is_first_party(schema.__module__)
    for key in cfg:
        name = str(key)
        full_key = f"{path}.{name}" if path else name
        if name not in fields:
            yield Issue("unknown", full_key, unknown_key_message(schema, name, list(fields), path))
            continue
        value = _plain_get(cfg, key)
        if value is None:
            continue
        if not isinstance(value, (DictConfig, ListConfig)):
            yield from _scalar_issues(schema, fields[name], value, full_key)
        elif own:
            yield from _container_issues(fields[name], value, full_key)


def _scalar_issues(
    schema: type, field: dataclasses.Field, value: Any, full_key: str
) -> Iterator[Issue]:
    annotation = _field_type(schema, field)
    holder = dataclasses.make_dataclass("Field", [("value", annotation)])
    try:
        OmegaConf.structured(holder(value))
    except OmegaConfBaseException:
        message = (
            f"wrong type for {full_key!r}: {value!r} is {_kind(value)}, "
            f"expected {_readable(annotation)}."
        )
        yield Issue("type", full_key, message)
    except (TypeError, ValueError):
        # OmegaConf cannot express the annotation, so it cannot check it either.
        return


def _container_issues(
    field: dataclasses.Field, value: DictConfig | ListConfig, full_key: str
) -> Iterator[Issue]:
    """Check a list or dict: only plain text and flags refuse both, numbers may be schedules."""
    default_type = field.type if isinstance(field.type, type) else None
    nested = field.default_factory
    if dataclasses.is_dataclass(nested) and isinstance(value, DictConfig):
        yield from _schema_issues(nested, value, full_key)
        return
    refuses = (str, bool) if isinstance(value, ListConfig) else (str, bool, int, float)
    accepted = {t for t in refuses if default_type is t or str(field.type) == t.__name__}
    if accepted:
        expected = accepted.pop().__name__
        message = f"wrong type for {full_key!r}: {_kind(value)}, expected {expected}."
        if expected == "str":
            message += " Quote text that holds ': ' or begins with a bracket."
        yield Issue("type", full_key, message)


def _table_issues(cfg: DictConfig, name: str, valid: frozenset[str], owner: str) -> Iterator[Issue]:
    table = _plain_get(cfg, name)
    if table is None:
        return
    if not isinstance(table, DictConfig):
        yield _not_a_mapping(name, table)
        return
    for key in table:
        if key not in valid:
            hint = did_you_mean(str(key), valid)
            message = f"unknown key '{name}.{key}': {owner} has no argument {key!r}.{hint}"
            yield Issue("unknown", f"{name}.{key}", message)
        yield from _number_issues(str(key), _plain_get(table, key), f"{name}.{key}")


def _number_issues(key: str, value: Any, full_key: str) -> Iterator[Issue]:
    """Check the arguments of lightning that are numbers; null leaves lightning's default."""
    kinds = (int,) if key in WHOLE_NUMBERS else (int, float) if key in NUMBERS else None
    if kinds is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, kinds):
        expected = "a whole number" if kinds == (int,) else "a number"
        message = f"wrong type for {full_key!r}: {value!r} is {_kind(value)}, expected {expected}."
        yield Issue("type", full_key, message)


def _typed_parts(schema: type, cfg: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield (part, module name) for the parts of a config that are written in it."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for name, field in fields.items():
        part = part_name(name)
        if part is None or part not in fields or (name not in cfg and part not in cfg):
            continue
        default = field.default if field.default is not dataclasses.MISSING else ""
        yield part, _plain_get(cfg, name) if name in cfg else default


def _type_key(cfg: DictConfig, part: str, path: str) -> str:
    """Return the dotted key that names the module of a part."""
    names = [str(key) for key in cfg if part_name(str(key)) == part]
    name = names[0] if names else f"{part}_type"
    return f"{path}.{name}" if path else name


def _written_keys(cfg: DictConfig, path: str = "") -> Iterator[str]:
    for key in cfg:
        full_key = f"{path}.{key}" if path else str(key)
        yield full_key
        value = _plain_get(cfg, key)
        if isinstance(value, DictConfig):
            yield from _written_keys(value, full_key)


def _plain_get(cfg: DictConfig, key: Any) -> Any:
    """Return a value, or None where it is absent, missing or cannot be resolved yet."""
    try:
        return None if OmegaConf.is_missing(cfg, key) else cfg.get(key)
    except OmegaConfBaseException:
        return None


def _field_type(schema: type, field: dataclasses.Field) -> Any:
    try:
        return typing.get_type_hints(schema).get(field.name, Any)
    except Exception:
        # A foreign annotation that cannot be evaluated is not checked.
        return Any


def _not_a_mapping(key: str, value: Any) -> Issue:
    message = f"wrong type for {key!r}: {value!r} is {_kind(value)}, expected a mapping."
    return Issue("type", key, message)


def _kind(value: Any) -> str:
    if isinstance(value, DictConfig):
        return f"a mapping {OmegaConf.to_container(value)!r}"
    if isinstance(value, ListConfig):
        return f"a list {OmegaConf.to_container(value)!r}"
    return {str: "text", bool: "true or false", int: "an integer", float: "a number"}.get(
        type(value), type(value).__name__
    )


def _readable(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def _located(issue: Issue, origins: dict[str, str]) -> str:
    key = issue.key
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f"{origins[key]}: {issue.message}" if key else issue.message
