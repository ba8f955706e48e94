"""What a system takes out of checkpoints and puts into them."""

from collections.abc import Iterable
from typing import Any

import torch

import threestudio
from threestudio.systems.weights import StateMatch, describe_problems, match_state
from threestudio.utils.checkpoint import load_checkpoint
from threestudio.utils.misc import find_last_path


class CheckpointContents:
    """Mixin of `BaseSystem`, before Lightning's module: weights of other runs, and one's own.

    Attributes:
        late_modules: names of modules that are built after `load_weights`, such as a guidance
            that only training needs; `load_late_weights` takes theirs.
    """

    late_modules: tuple[str, ...] = ()

    def load_weights(self, weights: str, ignore_modules: list[str] | None = None) -> None:
        """Take model weights from a checkpoint, and let parts adapt to its step.

        A module wholly absent from the file keeps its fresh values, one of the file that this
        system does not have is ignored, each with one line. Step-dependent state is set for the
        step of the file (devices may differ then, hence ``on_load_weights``); when training
        starts, the first batch sets it for step 0 again.

        Raises:
            ValueError: the file is unfit; every key that differs is listed.
            FileNotFoundError: there is no such file.
        """
        path = find_last_path(str(weights))
        checkpoint = load_checkpoint(path)
        left_out = (*(ignore_modules or []), *self.late_modules)
        found = _without(checkpoint.get("state_dict", {}), left_out)
        own = _without(self._stored_state(), left_out)
        match = self._match_weights(own, found, path)
        if not match.loadable:
            raise ValueError(
                f"system.weights {path} has nothing in common with this system; expected a "
                f"checkpoint with modules such as {', '.join(sorted(_roots(own)))}."
            )
        _report_match(match.fresh, match.dropped, path)
        super().load_state_dict(match.loadable, strict=False)
        self._weights_status = (int(checkpoint.get("epoch", 0)),
                                int(checkpoint.get("global_step", 0)))
        self.do_update_step(*self._weights_status, on_load_weights=True)
        self.on_weights_loaded(checkpoint)

    def load_late_weights(self) -> None:
        """Take the weights of ``late_modules`` from `system.weights`, once they are built.

        Call it where such a module is made, after construction and before a run is restored.
        Without `system.weights` nothing happens. The rules are those of `load_weights`; the state
        of no step is set, since training sets it before its first step.

        Raises:
            ValueError: the file is unfit; every key that differs is listed.
            FileNotFoundError: there is no such file.
        """
        ignored = self.cfg.weights_ignore_modules or []
        own = _without(self._stored_state(), ignored)
        own = {key: value for key, value in own.items() if _root(key) in self.late_modules}
        if self.cfg.weights is None or not own:
            return
        path = find_last_path(str(self.cfg.weights))
        stored = _without(load_checkpoint(path).get("state_dict", {}), ignored)
        present = _roots(own)
        found = {key: value for key, value in stored.items() if _root(key) in present}
        match = self._match_weights(own, found, path)
        _report_match(match.fresh, match.dropped, path)
        super().load_state_dict(match.loadable, strict=False)

    def _stored_state(self) -> dict[str, torch.Tensor]:
        """The entries of the state dict that checkpoints hold."""
        own = self.state_dict()
        for key in self._frozen_guidance_keys():
            own.pop(key, None)
        return own

    def _match_weights(self, own: dict, found: dict, path: str) -> StateMatch:
        match = match_state(own, found, {name for name, _ in self.named_parameters()})
        if match.problems:
            raise ValueError(
                f"system.weights {path} does not fit this system: "
                f"{describe_problems(match.problems)}. Use the config and the profile that the "
                "weights were trained with (upstream's have the sizes of profile=low_vram and "
                "paper), or list modules to leave out in system.weights_ignore_modules."
            )
        return match

    def on_weights_loaded(self, checkpoint: dict) -> None:
        """Called with the file that `load_weights` has taken weights from."""

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """As `torch.nn.Module.load_state_dict`, with our sentence when a strict load fails.

        Modules that only the file has at its top level (a guidance that this run does not build)
        are ignored with one line. Frozen parts of a guidance are not stored, hence not required.
        """
        if not strict:
            return super().load_state_dict(state_dict, strict=False, assign=assign)
        own = self.state_dict()
        roots = _roots(own)
        dropped = sorted(_roots(state_dict) - roots)
        kept = {key: value for key, value in state_dict.items() if _root(key) in roots}
        not_stored = set(self._frozen_guidance_keys())
        missing = [key for key in own if key not in kept and key not in not_stored]
        problems = [f"{key}: here, but not in the file" for key in missing]
        problems += [f"{key}: in the file, but not here" for key in kept if key not in own]
        problems += [
            f"{key}: shape {tuple(value.shape)} in the file, {tuple(own[key].shape)} here"
            for key, value in kept.items() if key in own and value.shape != own[key].shape
        ]
        if problems:
            raise ValueError(
                f"the checkpoint does not fit this system: {describe_problems(problems)}. "
                "Use the config that it was trained with."
            )
        _report_match([], dropped, "the checkpoint")
        return super().load_state_dict(kept, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Leave the frozen parts of a guidance out; add the optimizers of parts that have one."""
        state = checkpoint.get("state_dict", {})
        for key in self._frozen_guidance_keys():
            state.pop(key, None)
        own = {name: part.optimizer_state() for name, part in self._parts_with_optimizers()}
        if own:
            checkpoint["part_optimizers"] = own

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Give the parts that have an optimizer of their own its state, where the file has it."""
        stored = checkpoint.get("part_optimizers", {})
        for name, part in self._parts_with_optimizers():
            if name in stored:
                part.load_optimizer_state(stored[name])

    def _parts_with_optimizers(self) -> list[tuple[str, Any]]:
        return [(n, m) for n, m in self.named_modules() if getattr(m, "trains_itself", False)]

    def _frozen_guidance_keys(self) -> list[str]:
        """Keys below those modules of ``guidance*`` whose parameters are all frozen."""
        keys: dict[str, None] = {}
        for name, child in self.named_children():
            if not name.startswith("guidance"):
                continue
            for path, module in child.named_modules(prefix=name):
                flags = [p.requires_grad for p in module.parameters()]
                if flags and not any(flags):
                    keys.update(dict.fromkeys(module.state_dict(prefix=f"{path}.")))
        return list(keys)


def _without(state: dict, modules: Iterable[str]) -> dict:
    prefixes = tuple(f"{name}." for name in modules)
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _root(key: str) -> str:
    return key.partition(".")[0]


def _roots(state: dict) -> set[str]:
    return {_root(key) for key in state}


def _report_match(fresh: list[str], dropped: list[str], path: str) -> None:
    for name in fresh:
        threestudio.info("%s is not in %s and starts fresh.", name, path)
    for name in dropped:
        threestudio.info("%s of %s is not part of this system and is ignored.", name, path)
