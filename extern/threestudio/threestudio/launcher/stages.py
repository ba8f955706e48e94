"""The stages of a launch: composed and checked together, then run one after another.

Several ``--config`` files make a chain. Every stage is read, checked and its inputs found before
the first one starts; each next stage starts from the weights of the last, unless it names its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threestudio import registry
from threestudio.launcher.arguments import Arguments
from threestudio.launcher.machine import check_prompt_words, probe_machine
from threestudio.launcher.parts import drop_replaced_keys
from threestudio.launcher.profiles import ProfileChoice, choose_profile, deltas_of
from threestudio.launcher.starting_point import (
    RESUME_AUTO,
    find_trial_to_resume,
    has_weights,
    locate_checkpoint,
    nothing_to_resume,
    read_recorded_profile,
)
from threestudio.launcher.trial import (
    check_output_folder,
    claim_trial_folder,
    refuse_occupied,
    set_trial,
)
from threestudio.launcher.validate import (
    accepts_key,
    check_experiment,
    known_keys,
    required_models,
)
from threestudio.logs import info
from threestudio.suggest import did_you_mean, nearest
from threestudio.utils.config import ExperimentConfig, parse_structured
from threestudio.utils.config_errors import (
    ConfigValueError,
    MissingValueError,
    UnknownKeyError,
)
from threestudio.utils.config_origins import key_origins, with_overrides, with_profile
from threestudio.utils.config_sources import (
    Override,
    apply_override,
    load_with_includes,
    missing_keys,
    parse_override,
    resolve_config,
)
from threestudio.utils.config_text import escape_interpolations


@dataclass(frozen=True)
class Source:
    """One config file, merged with what it includes, and the overrides that reach it."""

    path: Path
    file_cfg: DictConfig
    overrides: tuple[Override, ...] = ()

    def merged(self, delta: DictConfig | None = None, announce: bool = False) -> DictConfig:
        """Return file, delta and overrides merged, nothing resolved, the file's profiles left out.

        Keys of a module that was replaced by another one are dropped; ``announce`` says so.
        """
        delta = OmegaConf.create({}) if delta is None else delta
        # Profiles are most of a file, and every merge copies all that it is given.
        keys = [key for key in self.file_cfg if key != "profiles"]
        cfg = OmegaConf.masked_copy(self.file_cfg, keys)
        cfg.merge_with(delta)
        dropped = drop_replaced_keys(cfg, self.file_cfg, delta)
        profiled, given = cfg.copy(), OmegaConf.create({})
        for override in self.overrides:
            apply_override(given, override)
            apply_override(cfg, override)
        _fill_supplied_values(cfg)
        # A profile's values for a module that the command line replaces go with the module.
        dropped += drop_replaced_keys(cfg, profiled, given)
        if announce:
            for line in dropped:
                info(line)
        return cfg


@dataclass(frozen=True)
class Stage:
    """One checked stage: its file, its experiment and why it took its profile."""

    path: Path
    cfg: DictConfig
    choice: ProfileChoice
    fresh_timestamp: bool
    chained: bool = False
    """Takes ``system.weights`` from the stage before it."""


def plan_stages(arguments: Arguments, root: Path, n_gpus: int = 1) -> list[Stage]:
    """Compose and check all stages of a command line; nothing is built, nothing is written.

    Args:
        arguments: the command line.
        root: project root, for ``include`` and the built-in profiles.
        n_gpus: number of visible GPUs that ``--gpu`` chose.

    Raises:
        ConfigError: naming the file or key, what was expected, and the remedy.
    """
    sources = read_sources(arguments, root)
    first, resumed_trial = _where_to_resume(sources)
    stages: list[Stage] = []
    for index, source in enumerate(sources[first:], start=first):
        previous = stages[-1] if stages else None
        if resumed_trial is not None and index == first:
            source = _resuming(source, str(resumed_trial.checkpoint))
        elif source.merged().get("resume") == RESUME_AUTO:
            source = _resuming(source, None)  # Nothing of this stage exists yet.
        stage = _plan_stage(source, root, arguments.mode, n_gpus, previous)
        if resumed_trial is not None and index == first:
            set_trial(stage.cfg, resumed_trial.timestamp or None)
            stage = replace(stage, fresh_timestamp=False)
        elif arguments.mode == "train" and not stage.fresh_timestamp and stage.cfg.resume is None:
            refuse_occupied(stage.cfg)
        stages.append(stage)
    return stages


def run_stages(stages: Sequence[Stage], arguments: Arguments, argv: Sequence[str]) -> list[Path]:
    """Run checked stages in order and return the folder of each.

    Raises:
        ConfigValueError: if a stage left no checkpoint for the next one.
    """
    from threestudio.launcher.trainer import run_stage

    folders: list[Path] = []
    weights: Path | None = None
    for index, stage in enumerate(stages):
        if stage.chained:
            if weights is None:
                raise ConfigValueError(
                    f"{stages[index - 1].path} left no checkpoint, so {stage.path} cannot start."
                )
            stage.cfg.system["weights"] = str(weights)
        folder = claim_trial_folder(stage.cfg, arguments.mode, stage.fresh_timestamp)
        info("Profile %s: %s.", stage.choice.name, stage.choice.reason)
        info("Output folder: %s", folder)
        result = run_stage(
            stage.cfg, arguments.mode, list(argv), arguments.verbose, config_path=stage.path
        )
        weights = result.last_checkpoint
        folders.append(Path(result.trial_dir))
    return folders


def read_sources(arguments: Arguments, root: Path) -> list[Source]:
    """Read every config file and hand each override to the stages that it reaches.

    Raises:
        ConfigError: if a file cannot be read or an override reaches no stage.
    """
    sources = [Source(path, load_with_includes(path, root)) for path in arguments.configs]
    overrides = [parse_override(argument) for argument in arguments.overrides]
    if len(sources) == 1:
        for override in overrides:
            _check_stage_number(override, 1)
        return [replace(sources[0], overrides=tuple(overrides))]
    reached = [_reached_stages(override, sources) for override in overrides]
    return [
        replace(
            source,
            overrides=tuple(o for o, stages in zip(overrides, reached) if index in stages),
        )
        for index, source in enumerate(sources)
    ]


def _plan_stage(
    source: Source, root: Path, mode: str, n_gpus: int, previous: Stage | None
) -> Stage:
    plain = source.merged()
    start = _starting_values(plain)
    chained = previous is not None and not start
    recorded = previous.choice.name if chained else _recorded_profile(start)
    choice, delta = _choose(source, plain, root, recorded)
    cfg = source.merged(delta, announce=True)
    builtin = delta is not None and "profiles" not in source.file_cfg
    _require_values(cfg)
    fresh = cfg.get("timestamp") is None and cfg.get("use_timestamp", True) and n_gpus == 1
    cfg = resolve_config(cfg)
    cfg["profiles"], cfg["profile"], cfg["n_gpus"] = {}, choice.name, n_gpus
    if builtin:
        cfg["profile_is_builtin"] = True
    for key, path in start.items():
        OmegaConf.update(cfg, key, str(path))
    origins = with_profile(key_origins(source.path, root), choice.name)
    check_experiment(cfg, with_overrides(origins, [o.key for o in source.overrides]))
    _require_module_names(cfg, source.path)
    _require_weights(cfg, mode)
    _require_valid_data(cfg)
    experiment = parse_structured(ExperimentConfig, cfg)
    check_output_folder(experiment)
    if mode == "train":
        _require_models(experiment)
    return Stage(source.path, experiment, choice, fresh, chained)


def _choose(
    source: Source, plain: DictConfig, root: Path, recorded: str | None
) -> tuple[ProfileChoice, DictConfig | None]:
    deltas = deltas_of(source.file_cfg, root, plain)
    requested = str(plain.get("profile", "auto"))
    has_section = "profiles" in source.file_cfg
    written = source.file_cfg.get("profile", "auto")
    if has_section and not deltas and requested not in ("auto", written):
        raise ConfigValueError(
            f"profile is {requested!r}, but {source.path} has profile {written!r} applied already; "
            "start from the raw.yaml beside it."
        )
    machine = probe_machine(lambda name: _candidate(source, deltas[name]))
    offered = None if deltas is None else list(deltas)
    choice = choose_profile(requested, recorded, offered, has_section, machine)
    return choice, (deltas or {}).get(choice.name)


def _candidate(source: Source, delta: DictConfig) -> DictConfig:
    return resolve_config(source.merged(delta))


def _starting_values(cfg: DictConfig) -> dict[str, Path]:
    """Return the located checkpoints of ``resume`` and ``system.weights``, by key."""
    located = {}
    for key in ("resume", "system.weights"):
        try:
            value = OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            continue
        if value is not None and value != "":
            located[key] = locate_checkpoint(key, str(value))
    return located


def _recorded_profile(start: dict[str, Path]) -> str | None:
    recorded = [read_recorded_profile(key, path) for key, path in start.items()]
    return next((name for name in recorded if name), None)


def _where_to_resume(sources: Sequence[Source]):
    """Find the stage to start with, and its trial if ``resume=auto`` asks for one."""
    wanting = [i for i, s in enumerate(sources) if s.merged().get("resume") == RESUME_AUTO]
    if not wanting:
        return 0, None
    for index in reversed(wanting):
        place = _trial_place(sources[index])
        trial = find_trial_to_resume(*place)
        if trial is not None:
            info("Resuming %s.", trial.checkpoint)
            for skipped in sources[:index]:
                info("Skipping %s: a later stage has begun.", skipped.path)
            return index, trial
    raise nothing_to_resume(*_trial_place(sources[wanting[0]]))


def _trial_place(source: Source) -> tuple[str, str, str]:
    """Return (exp_root_dir, name, tag) of a stage, before its profile is known."""
    cfg = source.merged()
    _require_values(cfg)
    keys = {"exp_root_dir": "outputs", "name": "default", "tag": ""}
    cfg = resolve_config(cfg)
    return tuple(str(cfg.get(key, default)) for key, default in keys.items())


def _resuming(source: Source, checkpoint: str | None) -> Source:
    """Replace ``resume=auto`` by the file that it found, or by nothing."""
    kept = [override for override in source.overrides if override.key != "resume"]
    value = "null" if checkpoint is None else json.dumps(escape_interpolations(checkpoint))
    return replace(source, overrides=(*kept, Override("resume", value)))


def _fill_supplied_values(cfg: DictConfig) -> None:
    """Fill keys that are ``???`` and that the system takes from elsewhere, in place.

    A system names them, relative to its config, in its attribute ``supplied_values``.
    """
    try:
        system = registry.find(str(cfg.get("system_type", "")))
    except (KeyError, ImportError, ValueError, OmegaConfBaseException):
        return  # The check of the whole experiment reports the name.
    for key, value in getattr(system, "supplied_values", {}).items():
        part, _, name = f"system.{key}".rpartition(".")
        node = OmegaConf.select(cfg, part, throw_on_resolution_failure=False)
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, name):
            node[name] = value


def _require_values(cfg: DictConfig) -> None:
    missing = missing_keys(cfg)
    if missing:
        listed = ", ".join(missing)
        example = " ".join(f'{key}="..."' for key in missing)
        raise MissingValueError(f"no value for {listed}; give it on the command line: {example}")


def _require_module_names(cfg: DictConfig, path: Path) -> None:
    for key in ("data_type", "system_type"):
        if not cfg.get(key):
            raise MissingValueError(f"{path} sets no {key}; name a registered module.")


def _require_weights(cfg: DictConfig, mode: str) -> None:
    if mode == "train" or cfg.get("resume") or has_weights(cfg):
        return
    raise MissingValueError(
        f"--{mode} needs weights, or it would show an untrained scene; add "
        "resume=PATH/ckpts/last.ckpt, system.weights=PATH/ckpts/last.ckpt or resume=auto."
    )


def _require_valid_data(cfg: DictConfig) -> None:
    """Check the values of a data module that can: a chain must not fail after its first stage."""
    import threestudio

    data_module = threestudio.find(cfg.data_type)
    if hasattr(data_module, "validate_config"):
        # Its constructor checks and builds nothing.
        data_module(cfg.get("data") or {})


def _require_models(cfg: DictConfig) -> None:
    names = required_models(cfg)
    if names:
        from threestudio.utils.pretrained import require_models

        require_models(names)
    check_prompt_words(cfg)


def _reached_stages(override: Override, sources: Sequence[Source]) -> list[int]:
    _check_stage_number(override, len(sources))
    if override.stage is not None:
        return [override.stage - 1]
    if override.key == "resume" and override.value != RESUME_AUTO:
        return [0]
    reached = [i for i, source in enumerate(sources) if accepts_key(source.file_cfg, override.key)]
    if not reached:
        known = sorted({key for source in sources for key in known_keys(source.file_cfg)})
        hint = did_you_mean(override.key, known) or f" Nearest: {nearest(override.key, known)}."
        raise UnknownKeyError(f"no config has the key {override.key!r}.{hint}")
    return reached


def _check_stage_number(override: Override, count: int) -> None:
    if override.stage is not None and not 1 <= override.stage <= count:
        raise ConfigValueError(
            f"override {override.stage}:{override.key} names stage {override.stage}; "
            f"there {'is 1 config' if count == 1 else f'are {count} configs'}."
        )
