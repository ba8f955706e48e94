"""Configurations: the experiment's fields, structured parsing, loading and dumping."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threestudio.logs import warn
from threestudio.suggest import did_you_mean
from threestudio.utils.config_errors import MissingValueError, UnknownKeyError, WrongTypeError
from threestudio.utils.config_text import escape_interpolations
from threestudio.utils.resolvers import register_resolvers
from threestudio.utils.schedules import C_max
from threestudio.utils.slug import safe_folder_name, safe_relative_path

__all__ = [
    "C_max",
    "ExperimentConfig",
    "config_to_primitive",
    "dump_config",
    "load_config",
    "parse_structured",
]

register_resolvers()


@dataclass
class ExperimentConfig:
    """The top level of a config file. `exp_dir`, `trial_name` and `trial_dir` are computed."""

    name: str = "default"
    """Name of the experiment, the folder below `exp_root_dir`."""
    description: str = ""
    """For the reader; not used."""
    tag: str = ""
    """Start of the trial's folder name."""
    seed: int = 0
    """Every random draw of the run derives from it."""
    use_timestamp: bool = True
    """Append the time of the start to the trial's folder name."""
    timestamp: str | None = None
    """The appended text; set it to name an existing trial."""
    exp_root_dir: str = "outputs"
    """Folder of all experiments."""
    exp_dir: str = "outputs/default"
    """Computed: ``exp_root_dir/name``."""
    trial_name: str = "exp"
    """Computed: ``tag + timestamp``."""
    trial_dir: str = "outputs/default/exp"
    """Computed: ``exp_dir/trial_name``."""
    n_gpus: int = 1
    """Number of GPUs, set from ``--gpu``; with torchrun at least that of its processes."""
    resume: str | None = None
    """Checkpoint to continue from, or "auto" for the newest of this experiment and tag."""
    data_type: str = ""
    """Registered name of the data module."""
    data: dict = field(default_factory=dict)
    """Config of the data module."""
    system_type: str = ""
    """Registered name of the system."""
    system: dict = field(default_factory=dict)
    """Config of the system."""
    trainer: dict = field(default_factory=dict)
    """Arguments of `pytorch_lightning.Trainer`."""
    checkpoint: dict = field(default_factory=dict)
    """Arguments of the checkpoint callback."""
    profile: str = "auto"
    """Which of `profiles` was applied."""
    profile_is_builtin: bool = False
    """Computed: the profile is of configs/profiles.yaml, the config has none of its own."""
    profiles: dict = field(default_factory=dict)
    """Profile name to the values that it changes."""
    include: list = field(default_factory=list)
    """Files merged before this one, relative to the project's root."""

    def __post_init__(self) -> None:
        if not self.tag and not self.use_timestamp and not self.timestamp:
            raise MissingValueError(
                "tag is empty and use_timestamp is false; set one of them, so that the trial's "
                "folder has a name."
            )
        if self.n_gpus > 1 and self.use_timestamp and not self.timestamp:
            warn("Timestamps are disabled with several ranks, where each would take its own.")
            self.use_timestamp = False
            if not self.tag:
                raise MissingValueError("tag is empty; several ranks need one, set tag=NAME.")
        if self.use_timestamp and not self.timestamp:
            self.timestamp = datetime.now().strftime("@%Y%m%d-%H%M%S")
        self.set_trial(self.timestamp)

    def set_trial(self, timestamp: str | None) -> None:
        """Compute the trial's name and folders for a time stamp (None: the tag alone)."""
        self.timestamp = timestamp
        suffix = timestamp or ""
        self.trial_name = safe_folder_name(self.tag, suffix)
        self.exp_dir = os.path.join(self.exp_root_dir, safe_relative_path(self.name))
        self.trial_dir = os.path.join(self.exp_dir, self.trial_name)


def parse_structured(fields: type, cfg: Any = None) -> Any:
    """Return ``cfg`` checked against, and completed from, the dataclass ``fields``.

    The result is an OmegaConf object in struct mode. Only scalars are type-checked and converted;
    a list or dict is stored as it is, whatever the declared type, which is how a float field
    accepts a schedule.

    Args:
        fields: a dataclass.
        cfg: a mapping, plain or OmegaConf.

    Raises:
        UnknownKeyError: (a TypeError) if a key is no field; names the nearest one.
        WrongTypeError: (a ValidationError) if a scalar does not fit its field.
        TypeError: if ``cfg`` is None or no mapping.
        omegaconf.MissingMandatoryValue: if a value is ``???``.
    """
    if not isinstance(cfg, (dict, DictConfig)):
        raise TypeError(f"config of {fields.__qualname__} is {cfg!r}; expected a mapping.")
    path = _full_key(cfg)
    names = [f.name for f in dataclasses.fields(fields) if f.init]
    for key in cfg:
        if key not in names:
            raise UnknownKeyError(unknown_key_message(fields, str(key), names, path))
    values = {str(key): _as_field_value(cfg, key) for key in cfg}
    try:
        with _type_checks_off():
            instance = fields(**values)
        _make_text_literal(instance)
        return OmegaConf.structured(instance)
    except OmegaConfBaseException as error:
        raise WrongTypeError(_wrong_type_message(fields, error, path)) from error


def unknown_key_message(fields: type, key: str, names: list[str], path: str = "") -> str:
    """Return the sentence about a key that ``fields`` does not have."""
    full_key = f"{path}.{key}" if path else key
    near = did_you_mean(key, names)
    known = "" if near else f" It has {', '.join(sorted(names))}."
    return f"unknown key {full_key!r}: {fields.__qualname__} has no field {key!r}.{near}{known}"


def load_config(
    *yamls: str | Path,
    cli_args: list[str] | None = None,
    from_string: bool = False,
    make_trial_dir: bool = True,
    **kwargs: Any,
) -> DictConfig:
    """Merge YAML files, command-line overrides and keyword values, and return the experiment.

    Later sources win. Files may ``include`` others; a profile is applied only if it is named.

    Args:
        *yamls: paths of YAML files, or their text if ``from_string``.
        cli_args: overrides of the form ``key=value``.
        from_string: the positional arguments are YAML text.
        make_trial_dir: create the trial's folder, as upstream does.
        **kwargs: fields that win over everything else.

    Returns:
        The resolved `ExperimentConfig`, as an OmegaConf object.
    """
    from threestudio.utils.config_sources import merge_sources, resolve_config

    merged = merge_sources(yamls, cli_args or [], from_string=from_string)
    cfg = parse_structured(ExperimentConfig, resolve_config(OmegaConf.merge(merged, kwargs)))
    if make_trial_dir:
        os.makedirs(cfg.trial_dir, exist_ok=True)
    return cfg


def config_to_primitive(config: Any, resolve: bool = True) -> Any:
    """Return plain dicts and lists.

    Raises:
        ValueError: if ``config`` is no OmegaConf object.
    """
    return OmegaConf.to_container(config, resolve=resolve)


def dump_config(path: str | Path, config: Any) -> None:
    """Write ``config`` to ``path`` as YAML that `load_config` reads back to the same values."""
    with open(path, "w", encoding="utf-8") as file:
        OmegaConf.save(config=config, f=file)


def _full_key(cfg: Any) -> str:
    return cfg._get_full_key(None) if isinstance(cfg, DictConfig) else ""


def _as_field_value(cfg: Any, key: Any) -> Any:
    """Return a value for the dataclass: lists and dicts as OmegaConf nodes."""
    value = cfg[key]
    if isinstance(value, (list, tuple, dict)) and not isinstance(value, (ListConfig, DictConfig)):
        plain = list(value) if isinstance(value, tuple) else value
        return OmegaConf.create(plain, flags={"allow_objects": True})
    return value


@contextlib.contextmanager
def _type_checks_off() -> Iterator[None]:
    """Suspend ``--typecheck``: by contract, a list or dict may stand in a field of any type."""
    jaxtyping = sys.modules.get("jaxtyping")
    if jaxtyping is None:
        yield
        return
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


def _make_text_literal(instance: Any) -> None:
    """Escape ``${`` in given text; reading resolved it once, it must not be resolved again."""
    for item in dataclasses.fields(instance):
        value = getattr(instance, item.name)
        if isinstance(value, str) and "${" in value and value != item.default:
            setattr(instance, item.name, escape_interpolations(value))


def _wrong_type_message(fields: type, error: OmegaConfBaseException, path: str) -> str:
    key = error.full_key or ""
    full_key = ".".join(part for part in (path, key) if part)
    reason = str(error.msg or error).splitlines()[0].rstrip(".")
    return f"wrong type for {full_key!r} of {fields.__qualname__}: {reason}."
