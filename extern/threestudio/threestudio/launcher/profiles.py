"""Which set of deltas a run takes: ``profile=embedded | low_vram | paper | test | auto``.

A config file states the published method; a profile changes it for a machine. ``auto`` decides by
what a run continues from, by the machine, and by the models on its disk, and says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from threestudio import registry
from threestudio.launcher.parts import drop_unfit_keys
from threestudio.suggest import did_you_mean
from threestudio.utils.config_errors import ConfigValueError
from threestudio.utils.config_sources import load_with_includes

AUTO = "auto"
AS_WRITTEN = "as-written"
EMBEDDED = "embedded"
# Least free GPU memory, in GiB, of the profiles that `auto` takes by memory, largest first.
MEMORY_FLOORS_GIB = (("paper", 70.0), ("low_vram", 22.0))
BUILTIN_PROFILES = Path("configs") / "profiles.yaml"


@dataclass(frozen=True)
class Machine:
    """What `choose_profile` asks of a machine.

    Attributes:
        free_gpu_gib: free memory of the first visible GPU in GiB; None without CUDA.
        has_models: tells whether all models of a profile are on this disk.
        covers_prompt: tells whether a profile's text encoder knows every word of the prompt.
    """

    free_gpu_gib: float | None
    has_models: Callable[[str], bool]
    covers_prompt: Callable[[str], bool]


@dataclass(frozen=True)
class ProfileChoice:
    """The chosen profile, and the reason in words."""

    name: str
    reason: str


def deltas_of(
    cfg: DictConfig, root: Path, composed: DictConfig | None = None
) -> dict[str, DictConfig] | None:
    """Return the deltas that a config offers, by profile; None if it has none.

    Without a ``profiles`` section these are the built-in ones of its ``system_type``, which
    ``configs/profiles.yaml`` holds: those of our config that is most like it, and what its own
    choices need besides. An empty section offers nothing: the written-out config of a run has its
    profile applied already.

    Args:
        cfg: a config file, merged with what it includes.
        root: project root.
        composed: the file with overrides laid over it, which decide what it is like; None takes
            the file alone.

    Raises:
        ConfigValueError: if the built-in table is not written as it says.
    """
    if "profiles" in cfg:
        return _as_deltas(cfg.get("profiles") or {})
    path = root / BUILTIN_PROFILES
    composed = cfg if composed is None else composed
    system_type = composed.get("system_type")
    if not path.is_file() or not isinstance(system_type, str):
        return None
    table = OmegaConf.load(path).get(registry.canonical_name(system_type))
    if table is None:
        return None
    if not isinstance(table, DictConfig) or not set(table) <= {"like", "also"}:
        raise ConfigValueError(
            f"{path} describes {system_type} by {table!r}; expected a mapping with the keys like "
            "and also."
        )
    sections = [rule.profiles for rule in table.get("also") or [] if _fits(rule, composed)]
    like = next((rule for rule in table.get("like") or [] if _fits(rule, composed)), None)
    if like is not None:
        lender = load_with_includes(root / str(like.config), root)
        lent = lender.pop("profiles", None) or OmegaConf.create({})
        for delta in lent.values():
            if delta is not None:
                drop_unfit_keys(delta, lender, composed)
        sections.insert(0, lent)
    return _as_deltas(OmegaConf.merge({}, *sections))


def _fits(rule: DictConfig, cfg: DictConfig) -> bool:
    """Tell whether a config has every value of a rule's ``where``."""
    where = rule.get("where") or {}
    return all(_named_value(cfg, key) == _canonical(value) for key, value in where.items())


def _named_value(cfg: DictConfig, key: str) -> object:
    try:
        return _canonical(OmegaConf.select(cfg, key))
    except OmegaConfBaseException:
        return None  # It stands for a value that is not there.


def _canonical(value: object) -> object:
    return registry.canonical_name(value) if isinstance(value, str) else value


def choose_profile(
    requested: str,
    recorded: str | None,
    offered: list[str] | None,
    has_section: bool,
    machine: Machine,
) -> ProfileChoice:
    """Decide which profile a run takes.

    Args:
        requested: the config's ``profile``.
        recorded: profile of the checkpoint that the run starts from, or None.
        offered: names of the deltas at hand; None without any.
        has_section: the config itself has a ``profiles`` section, even an empty one.
        machine: asked only where the decision needs it.

    Raises:
        ConfigValueError: if the requested profile does not exist, or no profile fits the machine.
    """
    if requested == AS_WRITTEN:
        return ProfileChoice(AS_WRITTEN, "as asked for")
    if requested != AUTO:
        return _named(requested, offered, has_section)
    if not has_section:
        return ProfileChoice(AS_WRITTEN, "the config has no profiles")
    if not offered:
        return ProfileChoice(AS_WRITTEN, "the config's profiles are empty")
    if recorded in (*offered, AS_WRITTEN):
        return ProfileChoice(recorded, "recorded in the weights that the run starts from")
    return _by_machine(offered, machine)


def _as_deltas(section: DictConfig | dict) -> dict[str, DictConfig]:
    return {str(name): section[name] or OmegaConf.create({}) for name in section}


def _named(requested: str, offered: list[str] | None, has_section: bool) -> ProfileChoice:
    if offered and requested in offered:
        return ProfileChoice(requested, "as asked for")
    if has_section and not offered:
        return ProfileChoice(requested, "applied before this config was written")
    if offered is None:
        raise ConfigValueError(
            f"profile is {requested!r}, but the config has no profiles section and no built-in "
            "profiles exist for its system_type; leave profile out to run it as written."
        )
    hint = did_you_mean(requested, [*offered, AUTO, AS_WRITTEN])
    raise ConfigValueError(
        f"profile is {requested!r}; expected one of {', '.join(offered)}, {AUTO} or {AS_WRITTEN}."
        f"{hint}"
    )


def _by_machine(offered: list[str], machine: Machine) -> ProfileChoice:
    if machine.free_gpu_gib is None:
        if EMBEDDED in offered:
            return ProfileChoice(EMBEDDED, "there is no CUDA device")
        return ProfileChoice(AS_WRITTEN, "there is no CUDA device and no embedded profile")
    free = machine.free_gpu_gib
    sized = [(name, floor) for name, floor in MEMORY_FLOORS_GIB if name in offered]
    fitting = [name for name, floor in sized if free >= floor]
    memory = f"{free:.0f} GiB of GPU memory are free"
    for name in fitting:
        if machine.has_models(name):
            return ProfileChoice(name, f"{memory} and its models are on this disk")
    if EMBEDDED in offered and machine.covers_prompt(EMBEDDED):
        return ProfileChoice(EMBEDDED, "its vocabulary covers the prompt")
    if fitting:
        return ProfileChoice(fitting[0], f"{memory}; its models will be downloaded")
    if not sized:
        return ProfileChoice(AS_WRITTEN, "the config has no profile for a GPU")
    name, floor = sized[-1]
    raise ConfigValueError(
        f"no profile fits: {memory}, the smallest, {name}, needs {floor:.0f}, and the embedded "
        f"model does not know every word of the prompt. Free memory, use words that it knows, or "
        f"name a profile, as in profile={name}."
    )
