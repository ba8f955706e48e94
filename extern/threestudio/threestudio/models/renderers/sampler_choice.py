"""Which sampler serves a renderer: by its config, the device of the rays and the kind of pass."""

from typing import Any

import torch

from threestudio.models.renderers.nerfacc_sampler import INSTEAD, NerfaccSampler, require_nerfacc
from threestudio.models.renderers.ray_samplers import DynamicSampler, StaticSampler

SAMPLERS = ("auto", "dynamic", "static", "nerfacc")


class SamplerChoice:
    """The samplers of one renderer.

    Args:
        cfg: of a `NeRFVolumeRenderer`: sampler, sample_budget, estimator, prune_alpha_threshold.

    Raises:
        ValueError: an unknown sampler, one that cannot serve on this machine, or a budget that the
            sampler or the estimator cannot keep.
    """

    def __init__(self, cfg: Any) -> None:
        self.name, self.budget = str(cfg.sampler), int(cfg.sample_budget)
        self._check(cfg.estimator)
        self.static = StaticSampler(self.budget, bool(cfg.prune_alpha_threshold))
        self._dynamic = DynamicSampler()
        if self.name == "nerfacc":
            self._dynamic = NerfaccSampler(require_nerfacc())

    def _check(self, estimator: str) -> None:
        if self.name not in SAMPLERS:
            raise ValueError(f"sampler is {self.name!r}; expected one of {', '.join(SAMPLERS)}.")
        if self.budget < 0:
            raise ValueError(
                f"sample_budget is {self.budget}; expected a number of samples, or 0 for the "
                "program's choice."
            )
        if self.budget and self.name in ("dynamic", "nerfacc"):
            raise ValueError(
                f"sample_budget is {self.budget}, but sampler {self.name!r} makes lists as long as "
                "there are samples; expected sampler: static (or auto) beside a budget."
            )
        if self.budget and estimator != "occgrid":
            raise ValueError(
                f"sample_budget is {self.budget}, but estimator {estimator!r} takes equally many "
                "samples on each ray; expected 0. Lower num_samples_per_ray instead."
            )

    def of(self, device: torch.device, is_training: bool) -> DynamicSampler:
        """Return the sampler of a pass.

        "auto" takes fixed lists in training where the rays are on a GPU or there is a budget.
        Evaluation renders in slices with exact lists, whatever they make the host wait.

        Raises:
            ValueError: nerfacc was asked for, and the rays are not on a GPU.
        """
        if self.name == "nerfacc" and device.type != "cuda":
            raise ValueError(
                f"system.renderer.sampler is 'nerfacc', but the rays are on {device}; expected "
                f"them on a CUDA device. {INSTEAD}"
            )
        wants_static = self.name == "static" or (
            self.name == "auto" and (device.type == "cuda" or self.budget > 0)
        )
        return self.static if wants_static and is_training else self._dynamic
