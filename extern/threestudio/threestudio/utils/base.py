"""Base classes of everything that a config can name.

`Updateable` carries the step number into nested parts, `BaseObject` is configured from a dataclass
and is no module, `BaseModule` is the same with parameters.
"""

import functools
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from threestudio.utils.config import parse_structured
from threestudio.utils.misc import get_device, load_module_weights

_FRAMEWORKS = ("torch", "pytorch_lightning", "lightning", "lightning_fabric")
_METHODS = (FunctionType, classmethod, staticmethod)


class Updateable:
    """Mixin of whatever depends on the step.

    `do_update_step` visits every public attribute that is itself updateable, children first and
    the object last. Attributes whose name starts with an underscore, and objects inside lists,
    dicts and plain modules, are not visited. A child that has several names is visited once for
    each, so `update_step` must give the same state when it is called again for the same step.
    """

    def do_update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Update all updateable attributes, then this object."""
        for child in self._updateable_children():
            child.do_update_step(epoch, global_step, on_load_weights=on_load_weights)
        self.update_step(epoch, global_step, on_load_weights=on_load_weights)

    def do_update_step_end(self, epoch: int, global_step: int) -> None:
        """Call `update_step_end` of all updateable attributes, then of this object."""
        for child in self._updateable_children():
            child.do_update_step_end(epoch, global_step)
        self.update_step_end(epoch, global_step)

    def update_step(self, epoch: int, global_step: int, on_load_weights: bool = False) -> None:
        """Set the state for the step that begins; to override.

        Args:
            epoch: current epoch.
            global_step: current step.
            on_load_weights: weights were just loaded. Devices may differ, so models must not be
                evaluated.
        """

    def update_step_end(self, epoch: int, global_step: int) -> None:
        """Finish the step that ended; to override."""

    def _updateable_children(self) -> "list[Updateable]":
        children = []
        for name in _visited_names(self):
            try:
                child = getattr(self, name)
            except Exception:
                # Properties may rest on attributes that a subclass never sets; such a part is
                # absent rather than broken, and the contract passes it over.
                continue
            if isinstance(child, Updateable):
                children.append(child)
        return children


def _visited_names(obj: Any) -> list[str]:
    """Public names of ``__dir__()`` that may hold an updateable object.

    The walk runs every step, and a Lightning module has hundreds of names that cannot: methods,
    and properties of the frameworks' own classes, some of them slow. They are left out.
    """
    cls = type(obj)
    if cls.__dir__ not in (object.__dir__, nn.Module.__dir__):
        return [name for name in obj.__dir__() if not name.startswith("_")]
    names = dict.fromkeys(name for name in obj.__dict__ if not name.startswith("_"))
    if isinstance(obj, nn.Module):
        names.update(dict.fromkeys(name for name in obj._modules if not name.startswith("_")))
        names.update(dict.fromkeys(_class_names(cls)))
        return sorted(names)
    names.update(dict.fromkeys(_class_names(cls)))
    return list(names)


@functools.cache
def _class_names(cls: type) -> tuple[str, ...]:
    """Public attributes of a class, without methods and what torch and Lightning define."""
    names: dict[str, bool] = {}
    for base in cls.__mro__:
        framework = base.__module__.partition(".")[0] in _FRAMEWORKS
        for name, value in vars(base).items():
            if name not in names:
                names[name] = not (
                    framework or name.startswith("_") or isinstance(value, _METHODS)
                )
    return tuple(sorted(name for name, visited in names.items() if visited))


def update_if_possible(module: Any, epoch: int, global_step: int) -> None:
    """Run `Updateable.do_update_step` of ``module`` if it is updateable."""
    if isinstance(module, Updateable):
        module.do_update_step(epoch, global_step)


def update_end_if_possible(module: Any, epoch: int, global_step: int) -> None:
    """Run `Updateable.do_update_step_end` of ``module`` if it is updateable."""
    if isinstance(module, Updateable):
        module.do_update_step_end(epoch, global_step)


class Configurable:
    """An object with a `Config` dataclass; kept for extensions, new code takes `BaseObject`."""

    @dataclass
    class Config:
        """No fields."""

    def __init__(self, cfg: dict | None = None) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)


class BaseObject(Updateable):
    """A configured object that is no module: its tensors enter no checkpoint.

    Args:
        cfg: values of `Config`; None takes the defaults.
        *args, **kwargs: handed to `configure`.
    """

    @dataclass
    class Config:
        """No fields."""

    cfg: Config

    def __init__(self, cfg: dict | DictConfig | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Build the object; to override. `cfg` and `device` are set."""


class BaseModule(nn.Module, Updateable):
    """A configured module.

    Args:
        cfg: values of `Config`; None takes the defaults.
        *args, **kwargs: handed to `configure`.
    """

    @dataclass
    class Config:
        """Fields that every module has."""

        weights: str | None = None
        """``path:module_name``; that module of the checkpoint is loaded after `configure`."""

    cfg: Config

    def __init__(self, cfg: dict | DictConfig | None = None, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.cfg = parse_structured(self.Config, {} if cfg is None else cfg)
        self.device = get_device()
        self.configure(*args, **kwargs)
        if self.cfg.weights is not None:
            self._load_configured_weights(self.cfg.weights)
        # Lets a module without parameters tell which device it was moved to.
        self.register_buffer("_dummy", torch.empty(0), persistent=False)

    def configure(self, *args: Any, **kwargs: Any) -> None:
        """Build the module; to override. `cfg` and `device` are set."""

    def _load_configured_weights(self, weights: str) -> None:
        path, separator, module_name = weights.rpartition(":")
        if not separator or not path or not module_name:
            raise ValueError(
                f"weights is {weights!r}; expected 'path:module_name', "
                "for example outputs/run/ckpts/last.ckpt:geometry."
            )
        state_dict, epoch, global_step = load_module_weights(
            path, module_name=module_name, map_location="cpu"
        )
        self.load_state_dict(state_dict)
        self.do_update_step(epoch, global_step, on_load_weights=True)
