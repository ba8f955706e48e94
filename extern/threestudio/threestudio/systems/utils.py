"""The optimizer and scheduler grammar of the configs.

``optimizer: {name, args: {...}, params: {<attribute path>: {lr: ...}}}`` and
``scheduler: {name, interval: epoch | step, args: {...}}``, where SequentialLR and ChainedScheduler
take a list of schedulers instead of ``args``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from threestudio.logs import info
from threestudio.suggest import did_you_mean, nearest
from threestudio.systems.optimizers import Adan

_FUSED = (torch.optim.Adam, torch.optim.AdamW)
_FUSED_EXCLUDES = ("fused", "foreach", "capturable", "differentiable")


def getattr_recursive(module: Any, path: str) -> Any:
    """Follow a dotted attribute path, such as ``geometry.encoding``, from ``module``."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def get_parameters(model: Any, name: str) -> list[nn.Parameter]:
    """Return the parameters at the attribute path ``name`` of ``model``.

    A module yields all of its parameters, a parameter itself, anything else an empty list.

    Raises:
        ValueError: if the path does not exist; the nearest valid ones are named.
    """
    try:
        target = getattr_recursive(model, name)
    except AttributeError as error:
        known = _module_paths(model)
        close = ", ".join(nearest(name, known)) if known else "none"
        raise ValueError(
            f"optimizer.params names {name!r}, which the system does not have; "
            f"expected an attribute path such as: {close}."
        ) from error
    if isinstance(target, nn.Module):
        return list(target.parameters())
    if isinstance(target, nn.Parameter):
        return [target]
    return []


def parse_optimizer(config: Mapping, model: nn.Module) -> Optimizer:
    """Build the optimizer that ``config`` describes for the parameters of ``model``.

    Every entry of ``params`` becomes one group, which carries its path under the key ``name``;
    an entry that is null is left out.
    Adam and AdamW use their fused kernel unless the config says otherwise. If ``model`` has a true
    attribute ``strict_optimizer_groups``, each trainable parameter must be in a group and each
    group must have something to train; otherwise frozen groups are dropped and unlisted
    parameters stay untrained, each with one line. Modules with a true ``trains_itself`` are left
    alone.

    Raises:
        ValueError: unknown optimizer, unknown path, overlapping groups, nothing to train, or one
            of the two strict rules broken.
    """
    config = _plain(config)
    optimizer_class = _optimizer_class(config["name"])
    args = {key: tuple(value) if isinstance(value, list) else value
            for key, value in (config.get("args") or {}).items()}
    if optimizer_class is torch.optim.AdamW and config["name"] == "FusedAdam":
        args.setdefault("weight_decay", 0.0)  # apex's default; torch's AdamW decays by 0.01
    if config.get("params"):
        # A profile or the command line removes a group by setting it to null.
        kept = {path: value for path, value in config["params"].items() if value is not None}
        groups = _named_groups(kept, model)
    else:
        apart = _trained_apart(model)
        groups = [{"params": [p for p in model.parameters()
                              if p.requires_grad and id(p) not in apart]}]
    params = [param for group in groups for param in group["params"]]
    if not params:
        raise ValueError(
            "the optimizer has nothing to train; expected at least one parameter that requires a "
            "gradient. Check optimizer.params."
        )
    if optimizer_class in _FUSED and _may_fuse(args, params, model):
        args["fused"] = True
    try:
        return optimizer_class(groups, **args)
    except TypeError as error:
        raise ValueError(
            f"optimizer.args {args} do not fit {config['name']}: {error}. "
            "Remove the argument or choose another optimizer.name."
        ) from error


def parse_scheduler(config: Mapping, optimizer: Optimizer) -> dict[str, Any]:
    """Build the scheduler of ``config`` in the form that Lightning takes.

    Returns:
        ``{"scheduler": ..., "interval": "epoch" | "step"}``. Training datasets are infinite, so an
        ``epoch`` scheduler never advances; configs that want motion say ``step``.

    Raises:
        ValueError: unknown scheduler or interval.
    """
    config = _plain(config)
    interval = config.get("interval", "epoch")
    if interval not in ("epoch", "step"):
        raise ValueError(f"scheduler.interval is {interval!r}; expected 'epoch' or 'step'.")
    return {"scheduler": _scheduler(config, optimizer), "interval": interval}


def parse_scheduler_to_instance(config: Mapping, optimizer: Optimizer):
    """Build a bare scheduler; ``Sequential`` is accepted as a name of SequentialLR."""
    return _scheduler(_plain(config), optimizer)


def _scheduler(config: dict, optimizer: Optimizer):
    name = config["name"]
    if name in ("SequentialLR", "Sequential"):
        parts = [_scheduler(part, optimizer) for part in config["schedulers"]]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=list(config["milestones"]))
    if name == "ChainedScheduler":
        parts = [_scheduler(part, optimizer) for part in config["schedulers"]]
        return lr_scheduler.ChainedScheduler(parts)
    scheduler_class = getattr(lr_scheduler, name, None)
    if not isinstance(scheduler_class, type):
        known = [key for key, value in vars(lr_scheduler).items()
                 if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler)]
        raise ValueError(
            f"scheduler.name is {name!r}; expected a class of torch.optim.lr_scheduler."
            + did_you_mean(name, known)
        )
    return scheduler_class(optimizer, **(config.get("args") or {}))


def _optimizer_class(name: str) -> type[Optimizer]:
    if name == "Adan":
        return Adan
    if name == "FusedAdam":
        try:
            from apex.optimizers import FusedAdam
        except ImportError:
            info("FusedAdam: apex is not installed; using torch's fused AdamW instead.")
            return torch.optim.AdamW
        return FusedAdam
    found = getattr(torch.optim, name, None)
    if isinstance(found, type) and issubclass(found, Optimizer):
        return found
    known = ["Adan", "FusedAdam"] + [
        key for key, value in vars(torch.optim).items() if isinstance(value, type)
    ]
    raise ValueError(
        f"optimizer.name is {name!r}; expected a class of torch.optim, Adan or FusedAdam."
        + did_you_mean(name, known)
    )


def _named_groups(entries: Mapping, model: nn.Module) -> list[dict]:
    strict = bool(getattr(model, "strict_optimizer_groups", False))
    apart = _trained_apart(model)
    groups: list[dict] = []
    owner: dict[int, str] = {}
    for name, options in entries.items():
        params = [param for param in get_parameters(model, name) if id(param) not in apart]
        for param in params:
            if id(param) in owner:
                raise ValueError(
                    f"optimizer.params lists {name!r} and {owner[id(param)]!r}, which share a "
                    "parameter; expected separate groups. Remove one of the two."
                )
            owner[id(param)] = name
        if not any(param.requires_grad for param in params):
            if strict:
                raise ValueError(
                    f"optimizer.params lists {name!r}, which has no parameter that requires a "
                    f"gradient. Remove the entry, or unfreeze the module.{_alias_hint(name, model)}"
                )
            info("optimizer group %s has nothing to train and is dropped.", name)
            continue
        groups.append({"params": params, "name": name, **_group_options(options)})
    unlisted = [name for name, param in _trainable(model).items() if id(param) not in owner]
    if unlisted and strict:
        raise ValueError(
            f"{_enumerate(unlisted)} require a gradient but are in no group of optimizer.params. "
            "List their module there, or freeze it."
        )
    if unlisted:
        info("not in optimizer.params, hence not trained: %s.", _enumerate(unlisted))
    return groups


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, each once: the model's and those of its guidances.

    A guidance that is no submodule hides its parameters from torch, so it is asked for them.
    """
    apart = _trained_apart(model)
    found = {
        name: param
        for name, param in model.named_parameters()
        if param.requires_grad and id(param) not in apart
    }
    known = {id(param) for param in found.values()}
    for guidance, stated in _guidance_parameters(model).items():
        for name, param in stated.items():
            if param.requires_grad and id(param) not in known:
                found[f"{guidance}.{name}"] = param
                known.add(id(param))
    return found


def _trained_apart(model: nn.Module) -> set[int]:
    """Parameters of modules inside the model that have an optimizer of their own."""
    return {
        id(param)
        for module in model.modules()
        if module is not model and getattr(module, "trains_itself", False)
        for param in module.parameters()
    }


def _guidance_parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """What each attribute ``guidance*`` of the model says that its losses train."""
    names = [name for name in (*vars(model), *model._modules) if name.startswith("guidance")]
    stated = {}
    for name in names:
        ask = getattr(getattr(model, name), "trainable_parameters", None)
        if callable(ask) and ask():
            stated[name] = ask()
    return stated


def _alias_hint(name: str, model: nn.Module) -> str:
    """Say which guidance trains where ``name`` reaches a frozen one."""
    if not name.startswith("guidance"):
        return ""
    kind = type(getattr_recursive(model, name)).__name__
    trained = list(_guidance_parameters(model))
    other = f"the guidance that trains is {trained[0]!r}" if trained else "no guidance trains here"
    return f" {name!r} is a {kind}; {other}."


def _group_options(options: Mapping | None) -> dict:
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in (options or {}).items()}


def _may_fuse(args: dict, params: list[nn.Parameter], model: nn.Module) -> bool:
    if any(key in args for key in _FUSED_EXCLUDES):
        return False
    if not all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in params):
        return False
    # A fused step unscales by itself, which Lightning refuses to combine with clipping.
    trainer = getattr(model, "_trainer", None)
    scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
    return not (scaler is not None and getattr(trainer, "gradient_clip_val", None))


def _module_paths(model: Any) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    return [name for name, _ in model.named_modules() if name]


def _enumerate(names: list[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _plain(config: Any) -> dict:
    if OmegaConf.is_config(config):
        return OmegaConf.to_container(config, resolve=True)
    return dict(config)
