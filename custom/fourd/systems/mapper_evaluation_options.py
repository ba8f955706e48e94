"""What the test of time and view control compares with, as a config says it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from custom.fourd.data.video_scene_datamodule import plain

from .mapper_oracle import OracleOptions
from .mapper_setup import checked_keys

BASELINES = ("copy", "image_only", "control_only", "oracle")
FEATURE_SPACES = ("pixels", "vision")
ABSENT = {
    "lpips": "needs VGG or AlexNet weights, which neither this project nor its requirements bring",
    "dino": "needs DINO weights, which neither this project nor its requirements bring",
}


@dataclass
class EvaluationOptions:
    """Keys of `system.evaluation`."""

    baselines: list = field(default_factory=lambda: ["copy", "image_only", "control_only"])
    """what is scored beside ours: the source left as it is, the image prompt without controls, the
    controls without image prompt, and an oracle, tokens fitted to each target"""
    oracle: OracleOptions = field(default_factory=OracleOptions)
    """how the oracle is fitted, where it is among the baselines"""
    features: str = "pixels"
    """what images are compared by when the time and view that they show are sought: pixels, or
    vision for the IP-Adapter's encoder"""
    n_identity: int = 4
    """cells of each scene that are asked for unchanged"""
    n_reversals: int = 4
    """probes of each scene in which the sign of a control is turned, for time and for view"""


def evaluation_options(given: Any) -> EvaluationOptions:
    """The options of a config.

    Raises:
        ValueError: an unknown key, baseline or feature space.
    """
    given = plain(given) or {}
    options = checked_keys(EvaluationOptions, given, "system.evaluation")
    if isinstance(options.oracle, dict):
        options.oracle = checked_keys(OracleOptions, options.oracle, "system.evaluation.oracle")
    unknown = [name for name in options.baselines if name not in BASELINES]
    if unknown:
        raise ValueError(
            f"system.evaluation.baselines holds {unknown[0]!r}; expected some of "
            f"{', '.join(BASELINES)}."
        )
    if options.features not in FEATURE_SPACES:
        raise ValueError(
            f"system.evaluation.features is {options.features!r}; expected one of "
            f"{', '.join(FEATURE_SPACES)}."
        )
    return options
