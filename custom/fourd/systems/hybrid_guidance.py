"""Which priors a training of `fourdfy-system` needs, and which of them a step draws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import threestudio

# What the keys of each kind end in; `single_view` has the contract's own keys. The order is that in
# which upstream's attribute `guidance` takes the first that exists.
KEY_SUFFIX = {"multi_view": "_multi_view", "video": "_video", "single_view": ""}

_SHARE_KEYS = {
    "multi_view": "data.prob_multi_view",
    "video": "data.single_view.prob_single_view_video",
    "single_view": "data.prob_multi_view or data.single_view.prob_single_view_video",
}


@dataclass
class HybridGuidanceConfig:
    """Keys of the system that say which priors there are and how often each is drawn."""

    prob_multi_view: float | None = None
    """Share of multi-view steps, the data module's key; null means none."""
    prob_single_view_video: float | None = None
    """Share of clips among the other steps, the data module's key; null means none."""
    simultan: bool | None = None
    """The data module's key: false leaves images only, whatever the share of clips."""
    prompt_processor_type_multi_view: str = ""
    """Registered name of the prompt processor of the multi-view prior."""
    prompt_processor_multi_view: dict = field(default_factory=dict)
    """Its configuration; its prompt is replaced by `prompt_processor.prompt`."""
    guidance_type_multi_view: str = ""
    """Registered name of the multi-view guidance."""
    guidance_multi_view: dict = field(default_factory=dict)
    """Its configuration."""
    prompt_processor_type_video: str = ""
    """Registered name of the prompt processor of the video prior."""
    prompt_processor_video: dict = field(default_factory=dict)
    """Its configuration; its prompt is replaced by `prompt_processor.prompt`."""
    guidance_type_video: str = ""
    """Registered name of the video guidance."""
    guidance_video: dict = field(default_factory=dict)
    """Its configuration."""


def guidance_shares(cfg: Mapping[str, Any]) -> dict[str, float]:
    """Return the share of the steps that draws each kind of guidance, those with none left out.

    A step is a multi-view step with `prob_multi_view`; of the others, one shows a clip with
    `prob_single_view_video`, else an image.
    """
    multi_view = float(cfg.get("prob_multi_view") or 0.0)
    video = float(cfg.get("prob_single_view_video") or 0.0)
    if cfg.get("simultan") is False:
        video = 0.0
    shares = {
        "multi_view": multi_view,
        "video": (1.0 - multi_view) * video,
        "single_view": (1.0 - multi_view) * (1.0 - video),
    }
    return {kind: share for kind, share in shares.items() if share > 0}


def guidance_kind(batch: Mapping[str, Any]) -> str:
    """Return the kind of guidance that a batch is for; the data module's flags say."""
    if batch.get("is_video", False):
        return "video"
    return "single_view" if batch.get("single_view", False) else "multi_view"


class HybridGuidance:
    """Mixin of `FourdfySystem` that builds the priors which its steps draw, and no others.

    Attributes `guidance_<kind>`, `prompt_processor_<kind>` and `prompt_utils_<kind>` exist for each
    kind that is drawn: multi_view, video, single_view. Frozen priors are plain attributes and stand
    in no checkpoint; a guidance that trains is a module, and its attribute names its keys there.
    """

    late_modules = tuple(f"guidance_{kind}" for kind in KEY_SUFFIX)
    # All priors hear the same words, so upstream's users give the first prompt only.
    supplied_values = {
        f"prompt_processor{suffix}.prompt": "${system.prompt_processor.prompt}"
        for suffix in KEY_SUFFIX.values()
        if suffix
    }

    @classmethod
    def unused_parts(cls, cfg: Mapping[str, Any]) -> set[str]:
        """Return the keys of this configuration whose parts no step of a training would use."""
        unused = set(KEY_SUFFIX) - set(guidance_shares(cfg))
        parts = ("guidance", "prompt_processor")
        return {f"{part}{KEY_SUFFIX[kind]}" for kind in unused for part in parts}

    @property
    def guidance(self) -> Any:
        """Upstream's name for the first prior among multi-view, video, single view; else None."""
        return self._first_of("guidance")

    @property
    def prompt_processor(self) -> Any:
        """Likewise its prompt processor."""
        return self._first_of("prompt_processor")

    @property
    def prompt_utils(self) -> Any:
        """Likewise what its prompt processor has returned."""
        return self._first_of("prompt_utils")

    def _first_of(self, part: str) -> Any:
        found = (getattr(self, f"{part}_{kind}", None) for kind in KEY_SUFFIX)
        return next((value for value in found if value is not None), None)

    def setup(self, stage: str | None = None) -> None:
        """Build what training needs, before optimizers and before weights are restored."""
        if stage == "fit" and self.guidance is None:
            self._build_guidance()
            if not self.resumed:
                self.load_late_weights()
        super().setup(stage)

    def _build_guidance(self) -> None:
        """Only the priors that a step can draw; the others would hold memory for nothing."""
        for kind, share in guidance_shares(self.cfg).items():
            self._add_guidance(kind, share)

    def _add_guidance(self, kind: str, share: float) -> None:
        suffix = KEY_SUFFIX[kind]
        names = (f"prompt_processor_type{suffix}", f"guidance_type{suffix}")
        for name in names:
            if not getattr(self.cfg, name):
                raise ValueError(
                    f"system.{name} is empty, but {share:.0%} of the steps draw this guidance; "
                    f"name one, or change {_SHARE_KEYS[kind]}."
                )
        processor_cfg = {**getattr(self.cfg, f"prompt_processor{suffix}"), "prompt": self.prompt}
        processor = threestudio.find(getattr(self.cfg, names[0]))(processor_cfg)
        guidance_class = threestudio.find(getattr(self.cfg, names[1]))
        guidance = guidance_class(getattr(self.cfg, f"guidance{suffix}"))
        setattr(self, f"guidance_{kind}", guidance)
        setattr(self, f"prompt_processor_{kind}", processor)
        setattr(self, f"prompt_utils_{kind}", processor())

    def configure_optimizers(self) -> dict[str, Any]:
        """Build optimizer and scheduler; the group of a prior that no step draws is left out.

        So one override, such as ``data.single_view.prob_single_view_video=1.0``, ends VSD.
        """
        groups = self.cfg.optimizer.get("params") or {}
        for name in [name for name, group in groups.items() if group is not None]:
            root = name.split(".")[0]
            if root in self.late_modules and getattr(self, root, None) is None:
                threestudio.info("No step draws %s; its optimizer group is left out.", root)
                groups[name] = None
        return super().configure_optimizers()

    def drawn_guidance(self, kind: str) -> tuple[Any, Any]:
        """Return the guidance of a kind and its prompts.

        Raises:
            ValueError: the data module draws what the system's shares exclude.
        """
        guidance = getattr(self, f"guidance_{kind}", None)
        if guidance is None:
            raise ValueError(
                f"the data module drew a {kind} step, but the system has built no such guidance; "
                "expected system.prob_multi_view, prob_single_view_video and simultan to be the "
                "data module's own values, for example ${data.prob_multi_view}."
            )
        return guidance, getattr(self, f"prompt_utils_{kind}")
