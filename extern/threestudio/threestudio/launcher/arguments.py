"""The flags of ``launch.py`` and its ``key=value`` overrides."""

from __future__ import annotations

import argparse
import re
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from threestudio.suggest import did_you_mean

MODES = ("train", "validate", "test", "export")
DEFAULT_GPU = "0"

_DESCRIPTION = "Train, validate, test or export an experiment that a YAML file describes."
_EPILOG = """\
Everything else is an override: key=value for every stage that has the key, 2:key=value for the
second config only. Prompts are text and need no second pair of quotes. For example:

  python launch.py --config custom/configs/fourdfy_stage_1.yaml --train \\
      system.prompt_processor.prompt="a large red cube" trainer.max_steps=500
"""
_GPU_LIST = re.compile(r"(-1)?|\d+(,\d+)*|((GPU|MIG)-[\w-]+,?)+")


class ArgumentError(ValueError):
    """The command line cannot be used; the message is one complete sentence for the user."""


@dataclass(frozen=True)
class Arguments:
    """A command line, taken apart. Overrides keep their order and are not read yet."""

    configs: tuple[Path, ...]
    mode: str
    overrides: tuple[str, ...]
    gpu: str = DEFAULT_GPU
    verbose: bool = False
    typecheck: bool = False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all flags."""
    parser = argparse.ArgumentParser(
        prog="launch.py",
        usage="launch.py --config FILE [FILE ...] (--train | --validate | --test | --export) "
        "[options] [key=value ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        nargs="+",
        action="extend",
        help="YAML file; several are trained one after another, each from the last one's weights",
    )
    parser.add_argument(
        "--gpu",
        default=DEFAULT_GPU,
        metavar="IDS",
        help="GPU ids, such as 0 or 0,1; ignored if CUDA_VISIBLE_DEVICES is set (default: 0)",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--train", action="store_true", help="train, then test")
    modes.add_argument("--validate", action="store_true", help="render the validation views")
    modes.add_argument("--test", action="store_true", help="render and measure the test views")
    modes.add_argument("--export", action="store_true", help="write the scene for other programs")
    parser.add_argument("--gradio", action="store_true", help="not provided; says what to use")
    parser.add_argument("--verbose", action="store_true", help="log more, with full tracebacks")
    parser.add_argument("--typecheck", action="store_true", help="check tensor shapes and types")
    parser.add_argument(
        "--print-completion",
        choices=("bash", "zsh", "tcsh"),
        metavar="SHELL",
        help="print a completion script for bash, zsh or tcsh and exit",
    )
    return parser


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Read the command line.

    Raises:
        ArgumentError: naming what is wrong, what was expected and the nearest flag.
        SystemExit: after ``--help`` or ``--print-completion``, and on malformed flags.
    """
    parser = build_parser()
    known, extras = parser.parse_known_args(list(argv))
    if known.print_completion:
        print_completion(parser, known.print_completion)
        raise SystemExit(0)
    _refuse_unknown_flags(parser, extras)
    if known.gradio:
        raise ArgumentError(
            "--gradio is not provided: no web page is part of this runtime. Leave it out; the "
            "run's folder shows images and videos while it trains."
        )
    configs, overrides = _split_configs(known.config or [], extras)
    mode = _chosen_mode(known)
    if len(configs) > 1 and mode != "train":
        raise ArgumentError(
            f"--{mode} takes one --config, not {len(configs)}; only --train chains several."
        )
    if not _GPU_LIST.fullmatch(known.gpu):
        raise ArgumentError(f"--gpu is {known.gpu!r}; expected ids separated by commas, as in 0,1.")
    return Arguments(configs, mode, overrides, known.gpu, known.verbose, known.typecheck)


def select_gpus(gpu: str, environment: MutableMapping[str, str]) -> int:
    """Make the chosen GPUs visible and return their number; call before CUDA is initialised.

    A non-empty CUDA_VISIBLE_DEVICES wins over ``gpu``. Where torchrun started several processes,
    the default means one GPU for each, and the number is at least that of the processes.
    """
    environment["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    n_local = int(environment.get("LOCAL_WORLD_SIZE", 1))
    if gpu == DEFAULT_GPU and n_local > 1:
        gpu = ",".join(str(index) for index in range(n_local))
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    if not visible:
        visible = environment["CUDA_VISIBLE_DEVICES"] = gpu
    n_ranks = int(environment.get("WORLD_SIZE", 1))
    return max(1, n_ranks, len([part for part in visible.split(",") if part.strip()]))


def print_completion(parser: argparse.ArgumentParser, shell: str) -> None:
    """Print a completion script for ``launch.py``.

    Raises:
        ArgumentError: if the package that writes it is not installed.
    """
    try:
        import shtab
    except ImportError as error:
        raise ArgumentError(
            "--print-completion needs the package shtab; pip install shtab."
        ) from error
    for action in parser._actions:
        if action.dest == "config":
            action.complete = shtab.FILE
    print(shtab.complete(parser, shell=shell))


def _refuse_unknown_flags(parser: argparse.ArgumentParser, extras: Sequence[str]) -> None:
    flags = list(parser._option_string_actions)
    for extra in extras:
        if not extra.startswith("-"):
            continue
        name, separator, _ = extra.partition("=")
        if separator and name not in flags and "." in name:
            raise ArgumentError(
                f"unknown flag {name!r}; overrides have no dashes, write {extra.lstrip('-')}."
            )
        hint = did_you_mean(name, flags) or " Run launch.py --help for the list."
        raise ArgumentError(f"unknown flag {name!r}.{hint}")


def _split_configs(
    given: Sequence[str], extras: Sequence[str]
) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Separate files from the overrides that stand behind ``--config`` without a flag between."""
    files = [item for item in given if "=" not in item or Path(item).is_file()]
    overrides = [item for item in given if item not in files] + list(extras)
    for item in overrides:
        if "=" not in item:
            raise ArgumentError(
                f"argument {item!r} is neither a flag nor key=value; if a prompt has spaces, quote "
                'it: system.prompt_processor.prompt="a red cube".'
            )
    if not files:
        raise ArgumentError("--config is missing; name a YAML file, as in --config FILE --train.")
    return tuple(Path(item) for item in files), tuple(overrides)


def _chosen_mode(known: argparse.Namespace) -> str:
    chosen = [mode for mode in MODES if getattr(known, mode)]
    if not chosen:
        raise ArgumentError("no mode given; add one of --train, --validate, --test, --export.")
    return chosen[0]
