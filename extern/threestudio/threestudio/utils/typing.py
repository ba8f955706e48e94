"""The names that extensions take with ``from threestudio.utils.typing import *``.

This star export exists for extensions written against upstream; code of this project imports what
it needs from `typing`, `jaxtyping` and `torch`.
"""

from collections.abc import Callable, Iterable, Sized
from typing import (
    Any,
    Dict,
    List,
    Literal,
    NamedTuple,
    NewType,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
)

from jaxtyping import Bool, Complex, Float, Inexact, Int, Integer, Num, Shaped, UInt
from omegaconf import DictConfig
from torch import Tensor
from typeguard import typechecked as typechecker

__all__ = [
    "Any",
    "Bool",
    "Callable",
    "Complex",
    "Dict",
    "DictConfig",
    "Float",
    "Inexact",
    "Int",
    "Integer",
    "Iterable",
    "List",
    "Literal",
    "NamedTuple",
    "NewType",
    "Num",
    "Optional",
    "Shaped",
    "Sized",
    "Tensor",
    "Tuple",
    "Type",
    "TypeVar",
    "UInt",
    "Union",
    "typechecker",
]
