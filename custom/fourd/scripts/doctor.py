"""Tells, per profile, what a machine has and lacks for 4D-fy, and fetches missing models.

    python -m custom.fourd.scripts.doctor
    python -m custom.fourd.scripts.doctor --profile low_vram --fetch

Nothing is built, trained or written. Without `--fetch` no connection is opened. The report can be
pasted into an issue: it holds versions and sizes, no credentials, and no path beyond the ones that
matter. The exit status is 0 where at least one of the shown profiles is ready.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .doctor_machine import Folder, Machine
    from .doctor_models import ModelRow

PROFILES = ("embedded", "low_vram", "paper", "test")
_CONFIGS = Path(__file__).resolve().parents[3] / "custom" / "configs"
# The stages that a profile runs one after another; stage 2 is for VSD, which two leave out.
CHAINS = {"embedded": (1, 3), "low_vram": (1, 3), "paper": (1, 2, 3), "test": (1, 2, 3)}
# GiB. Of RAM: the embedded profile's peak is measured, the published models pass through it once.
_RAM_GIB = {"embedded": 2.0, "test": 2.0, "low_vram": 16.0, "paper": 16.0}
# GiB. Of disk: two checkpoints with the optimizer's moments, pictures and videos.
_DISK_GIB = {"embedded": 0.2, "test": 0.2, "low_vram": 2.0, "paper": 2.0}


@dataclass(frozen=True)
class Checkup:
    """One profile: its stages, models, needs in GiB, time in words, and the verdict."""

    profile: str
    stages: tuple[str, ...]
    models: tuple[ModelRow, ...]
    gpu_needed_gib: float | None
    ram_needed_gib: float
    memory_remark: str
    output: Folder
    time: str
    verdict: str

    @property
    def is_ready(self) -> bool:
        return self.verdict.startswith("ready")


def examine(
    profile: str, configs: Sequence[Path], machine: Machine, overrides: Sequence[str] = ()
) -> Checkup | None:
    """Look into one profile of one or several chained configs; None if none of them offers it.

    Raises:
        ConfigError: if a config cannot be read or merged.
    """
    from .doctor_machine import describe_folder
    from .doctor_models import composed, models_of
    from .doctor_timing import estimate

    merged = [composed(path, profile, overrides) for path in configs]
    experiments = [cfg for cfg in merged if cfg is not None]
    if not experiments:
        return None
    names = tuple(str(cfg.get("name", "default")) for cfg in experiments)
    steps = [int(cfg.trainer.get("max_steps", 0)) for cfg in experiments]
    output = describe_folder(str(experiments[0].get("exp_root_dir", "outputs")))
    models = tuple(models_of(experiments))
    gpu_gib, remark = _memory(profile)
    checkup = Checkup(
        profile=profile,
        stages=names,
        models=models,
        gpu_needed_gib=gpu_gib,
        ram_needed_gib=_RAM_GIB.get(profile, 2.0),
        memory_remark=remark,
        output=output,
        time=estimate(profile, list(zip(names, steps))),
        verdict="",
    )
    return dataclasses.replace(checkup, verdict=judge(checkup, machine))


def judge(checkup: Checkup, machine: Machine) -> str:
    """One sentence: "ready", or what to do."""
    profile, output = checkup.profile, checkup.output
    if output.problem:
        return (
            f"cannot write to {output.path} ({output.problem}): choose another output folder with "
            "exp_root_dir=PATH."
        )
    needed = _DISK_GIB.get(profile, 2.0)
    if output.free_gib < needed:
        return (
            f"{output.path} has {output.free_gib:.1f} GiB free and a run needs {needed:g}: make "
            "room, or choose another folder with exp_root_dir=PATH."
        )
    lacks = [text for text in (_gpu_lack(checkup, machine), _model_lack(checkup)) if text]
    if lacks:
        return "; and ".join(lacks) + "."
    if machine.ram_free_gib is not None and machine.ram_free_gib < checkup.ram_needed_gib:
        return (
            f"about {checkup.ram_needed_gib:g} GiB of memory are needed and "
            f"{machine.ram_free_gib:.1f} are free: end other programs first."
        )
    if machine.grid_backend == "torch":
        return f"ready, but its hash grid is slow here: {machine.grid_remark}"
    return "ready"


def _gpu_lack(checkup: Checkup, machine: Machine) -> str:
    needed = checkup.gpu_needed_gib
    if needed is None:
        return ""
    if not machine.has_gpu:
        return (
            f"run it on a machine with a CUDA GPU that has {needed:g} GiB free (there is none "
            "here), or use profile=embedded"
        )
    if (machine.gpu_free_gib or 0.0) < needed:
        return (
            f"it needs {needed:g} GiB of GPU memory and {machine.gpu_free_gib:.1f} are free: free "
            "some, or take a smaller profile"
        )
    return ""


def _model_lack(checkup: Checkup) -> str:
    from .doctor_models import COMMAND

    missing = [row for row in checkup.models if not row.is_here]
    if not missing:
        return ""
    sizes = [row.download_gb for row in missing]
    total = f"{sum(size or 0.0 for size in sizes):.1f} GB"
    about = f"at least {total}" if None in sizes else f"about {total}"
    return (
        f"fetch {len(missing)} model{'s' if len(missing) > 1 else ''} ({about}) where there is a "
        f"network: `{COMMAND} --profile {checkup.profile} --fetch`"
    )


def _memory(profile: str) -> tuple[float | None, str]:
    """(GiB of GPU memory that a profile needs, None without; where the figure comes from)."""
    from threestudio.launcher.profiles import MEMORY_FLOORS_GIB

    from .doctor_timing import memory_seen_gb

    floor = dict(MEMORY_FLOORS_GIB).get(profile)
    if floor is None:
        seen = memory_seen_gb()
        return None, "" if seen is None else f"measured peak {seen[0]:.1f} GB ({seen[1]})"
    if profile == "low_vram":
        return floor, "computed: `python -m custom.fourd.scripts.memory_account` itemises it"
    return floor, "the published configs ask for 80 GB"


def format_report(machine: Machine, checkups: Sequence[Checkup]) -> str:
    """The report as Markdown."""
    lines = ["## threestudio-4d doctor", "", *_machine_lines(machine)]
    for checkup in checkups:
        lines += ["", f"### {checkup.profile}: {' -> '.join(checkup.stages)}", ""]
        lines += _model_lines(checkup) + _need_lines(checkup, machine)
        lines += ["", f"**{checkup.profile}: {checkup.verdict}**"]
    return "\n".join(lines)


def _machine_lines(machine: Machine) -> list[str]:
    from threestudio.utils.hub import hub_cache_folder, is_offline

    from .doctor_models import free_bytes, tidy

    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    cache = hub_cache_folder()
    offline = "; the environment says to stay offline" if is_offline() else ""
    gpu = machine.gpu
    if machine.has_gpu:
        gpu += f", {machine.gpu_free_gib:.1f} of {machine.gpu_gib:.1f} GiB free"
    ram = "unknown"
    if machine.ram_gib is not None:
        ram = f"{machine.ram_free_gib:.1f} of {machine.ram_gib:.1f} GiB free"
    grid = machine.grid_backend + (f" ({machine.grid_remark})" if machine.grid_remark else "")
    return [
        "| | |",
        "|---|---|",
        f"| platform | {machine.platform}; {machine.processor}; {machine.cores} cores |",
        f"| versions | {versions} |",
        *(f"| {name} | {state} |" for name, state in machine.packages.items()),
        f"| memory | {ram} |",
        f"| GPU | {gpu} |",
        f"| hash grid, `auto` | {grid} |",
        f"| model cache | {tidy(cache)}, {free_bytes(cache) / 1e9:.1f} GB free{offline} |",
    ]


def _model_lines(checkup: Checkup) -> list[str]:
    from .doctor_models import tidy

    lines = [
        "| model | parts | here | on disk, GB | to download, GB | licence |",
        "|---|---|---|---|---|---|",
    ]
    remarks = []
    for row in checkup.models:
        name = f"{row.name} (withdrawn; {row.served_by})" if row.served_by else row.name
        here = row.where + (f": {tidy(row.folder)}" if row.where in ("folder", "cache") else "")
        if row.missing_parts and len(row.missing_parts) < len(row.parts):
            here += f": {', '.join(row.missing_parts)}"
        download = "?" if row.download_gb is None else f"{row.download_gb:.1f}"
        lines.append(f"| {name} | {', '.join(row.parts) or 'all'} | {here} | {row.disk_gb:.2f} "
                     f"| {download} | {row.licence} |")  # fmt: skip
        remarks += ["", f"{row.name}: {row.remark}"] if row.remark else []
    return lines + remarks


def _need_lines(checkup: Checkup, machine: Machine) -> list[str]:
    from .doctor_models import tidy

    gpu = "no GPU"
    if checkup.gpu_needed_gib is not None:
        gpu = f"GPU with {checkup.gpu_needed_gib:g} GiB free"
    remark = f"; {checkup.memory_remark}" if checkup.memory_remark else ""
    state = checkup.output.problem or "writable"
    return [
        "",
        f"- memory: {gpu}, {checkup.ram_needed_gib:g} GiB of RAM{remark}",
        f"- output: {tidy(checkup.output.path)}, {checkup.output.free_gib:.1f} GiB free, {state}",
        f"- time: {checkup.time}",
    ]


def configs_of(profile: str, given: Sequence[Path]) -> list[Path]:
    """The config files to look into: those given, else the stages that the profile chains."""
    stages = CHAINS.get(profile, (1, 2, 3))
    return list(given) or [_CONFIGS / f"fourdfy_stage_{stage}.yaml" for stage in stages]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; words with "=" that are no files are overrides."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], prog="python -m custom.fourd.scripts.doctor"
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="FILE",
                        help="configs of a chain, then key=value; default: our stages")  # fmt: skip
    parser.add_argument("--profile", metavar="NAME", help=f"one of {', '.join(PROFILES)}, or one "
                        "that the configs define; default: all")  # fmt: skip
    parser.add_argument("--fetch", action="store_true", help="download what is missing")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    words = arguments.config
    arguments.overrides = [word for word in words if "=" in word and not Path(word).is_file()]
    arguments.config = [Path(word) for word in words if word not in arguments.overrides]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, after fetching if that was asked for; return the exit status."""
    arguments = parse(argv)
    from threestudio.utils.config_errors import ConfigError
    from threestudio.utils.redaction import redact

    def say(line: str) -> None:
        print(redact(line), file=sys.stderr, flush=True)

    try:
        return _run(arguments, say)
    except ConfigError as error:
        say(f"doctor: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("Interrupted; what was fetched is kept, and the rest is taken up next time.")
        return 130


def _run(arguments: argparse.Namespace, say) -> int:
    import threestudio  # noqa: F401 - and ours, which registers models and modules
    from threestudio.utils.redaction import redact, redact_tree

    import custom.fourd  # noqa: F401

    from .doctor_machine import describe_machine
    from .doctor_models import fetch

    machine = describe_machine()
    checkups = _examine_all(arguments, machine)
    if not checkups:
        say(f"doctor: error: no config offers the profile {arguments.profile!r}; expected one of "
            f"{', '.join(PROFILES)}.")  # fmt: skip
        return 2
    status = 0
    if arguments.fetch:
        rows = {(row.name, row.parts): row for item in checkups for row in item.models}
        status = 0 if fetch(list(rows.values()), say) else 1
        checkups = _examine_all(arguments, machine)
    if arguments.json:
        print(json.dumps(redact_tree(_as_plain(machine, checkups)), indent=2))
    else:
        print(redact(format_report(machine, checkups)))
    if arguments.fetch:
        return status
    return 0 if any(item.is_ready for item in checkups) else 1


def _as_plain(machine: Machine, checkups: Sequence[Checkup]) -> dict:
    from .doctor_models import tidy

    profiles = [dataclasses.asdict(item) for item in checkups]
    for model in (model for profile in profiles for model in profile["models"]):
        model["folder"] = tidy(model["folder"])
    return {"machine": dataclasses.asdict(machine), "profiles": profiles}


def _examine_all(arguments: argparse.Namespace, machine: Machine) -> list[Checkup]:
    profiles = (arguments.profile,) if arguments.profile else PROFILES
    found = [
        examine(name, configs_of(name, arguments.config), machine, arguments.overrides)
        for name in profiles
    ]
    return [checkup for checkup in found if checkup is not None]


if __name__ == "__main__":
    sys.exit(main())
