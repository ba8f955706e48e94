"""The interpolation functions that configs may use: ``${name:argument,...}``."""

import os
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from threestudio.utils.schedules import C_max

RESOLVERS: dict[str, Callable[..., Any]] = {
    "calc_exp_lr_decay_rate": lambda factor, n: factor ** (1.0 / n),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "idiv": lambda a, b: a // b,
    "basename": lambda path: os.path.basename(path),
    "rmspace": lambda text, substitute: str(text).replace(" ", substitute),
    "tuple2": lambda value: [float(value), float(value)],
    "gt0": lambda value: value > 0,
    "cmaxgt0": lambda value: C_max(value) > 0,
    "cmaxgt0orcmaxgt0": lambda a, b: C_max(a) > 0 or C_max(b) > 0,
    "not": lambda value: not value,
}


def register_resolvers() -> None:
    """Register the contract's resolvers with OmegaConf, once."""
    for name, function in RESOLVERS.items():
        if not OmegaConf.has_resolver(name):
            OmegaConf.register_resolver(name, function)
