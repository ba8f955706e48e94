"""What upstream's checkpoints name besides tensors, and the inert things that stand for it.

An optimizer built from a config keeps ``betas`` as an OmegaConf list. Pickled, the list brings its
parents along: the whole config of the system, with the dataclass that each part was made from
(``getattr(Fourdfy, "Config")``) and the types of its fields. Nothing of that is a value, so none of
it is imported or called: a class of upstream's is answered by `_ConfigClass`, which cannot be
instantiated, an attribute of it by itself, a type with parameters by ``typing.Any``.
"""

import collections
import pickle
import warnings
from typing import Any, BinaryIO

import torch
from omegaconf import DictConfig, ListConfig

# Upstream's own modules, and extensions, which are named after their folders: "threestudio-4dfy".
_UPSTREAM = "threestudio"
_TYPES = ("Any", "Dict", "List", "Optional", "Tuple", "Union")


class _ConfigClass:
    """Stands for the dataclass behind a part of a config; there is no instance of it."""

    def __new__(cls, *_: Any) -> "_ConfigClass":
        raise pickle.UnpicklingError("GLOBAL threestudio is an object, expected a class")


def _attribute(owner: Any, name: str) -> Any:
    """Stand for `getattr`: a class inside a stand-in is the stand-in; no other is looked up."""
    if owner is not _ConfigClass:
        raise pickle.UnpicklingError(f"GLOBAL getattr of {type(owner).__name__} {name}")
    return _ConfigClass


def _parametrised(alias: Any, parameters: Any) -> Any:
    """Stand for `operator.getitem` of a type, such as ``Optional[str]``."""
    if alias is not Any:
        raise pickle.UnpicklingError("GLOBAL operator.getitem of a value")
    return Any


def allowed_globals() -> list:
    """OmegaConf's data classes, which hold values and run nothing when rebuilt, and stand-ins."""
    import omegaconf
    from omegaconf import base, nodes

    names = ("AnyNode", "StringNode", "IntegerNode", "FloatNode", "BooleanNode", "EnumNode",
             "BytesNode", "PathNode")  # fmt: skip
    allowed = [getattr(nodes, name) for name in names if hasattr(nodes, name)]
    allowed += [base.ContainerMetadata, base.Metadata, base.UnionNode, DictConfig, ListConfig]
    allowed += [omegaconf.TupleConfig] if hasattr(omegaconf, "TupleConfig") else []
    allowed += [(Any, f"typing.{name}") for name in _TYPES]
    allowed += [(_attribute, "builtins.getattr"), (_parametrised, "_operator.getitem")]
    return allowed + [type(None), dict, list, tuple, set, int, float, str, bool,
                      collections.defaultdict, collections.OrderedDict]  # fmt: skip


def upstream_classes(file: BinaryIO) -> list[tuple[type, str]]:
    """The stand-in under the name of each class of upstream's that a checkpoint refers to.

    Args:
        file: the checkpoint; it is read without being unpickled.
    """
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:
        # Damage, or the format before zip archives: the caller's own reading says which.
        names = []
    finally:
        file.seek(0)
    return [(_ConfigClass, name) for name in names if name.startswith(_UPSTREAM)]
