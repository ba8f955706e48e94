"""Time and view control together: four ways to join two controls, and guidance over them.

- ``tokens``: one prompt with both placeholders. The default.
- ``joint_token``: one placeholder for one mapper that is told both; the reference for motion that
  does not separate from the view.
- ``attention``: a prompt for each control in which the other is neutral; every layer attends to the
  two separately and sums the results.
- ``guidance``: one prompt for each control, a call of the denoiser for each, and the differences
  from the uncontrolled prediction added up.

Both placeholders stand in every prompt of the first, third and fourth, in one order, so that
positions and causal sight never change; a control at rest carries its neutral input, not a missing
token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from custom.fourd.diffusion.layer_contexts import Contexts, LayerContexts

from .mapper import MapperOutput
from .text_injection import PlaceholderPrompts, TextInjection

COMPOSE_MODES = ("tokens", "joint_token", "attention", "guidance")
TIME, VIEW, JOINT = "<time>", "<view>", "<control>"
PLACEHOLDERS = {"time": TIME, "view": VIEW, "joint": JOINT}
"""Which placeholder a mapper of a kind speaks for."""
SUPER_CATEGORIES = {VIEW: "view", TIME: "time"}
JOINT_SUPER_CATEGORIES = {JOINT: "object"}


@dataclass(frozen=True)
class Composition:
    """How two controls join.

    The weights are those of the text branches for ``attention`` (they sum to 1 where the controls
    together should weigh as one text) and, for ``guidance``, factors on the strength of control.
    """

    mode: str = "tokens"
    """One of `COMPOSE_MODES`."""
    time_weight: float | None = None
    """Of the time control; None is 0.5 for ``attention`` and 1 for ``guidance``."""
    view_weight: float | None = None
    """Of the view control; None is as for time."""

    def __post_init__(self) -> None:
        if self.mode not in COMPOSE_MODES:
            raise ValueError(
                f"compose is {self.mode!r}; expected one of {', '.join(COMPOSE_MODES)}."
            )

    def weight(self, control: str) -> float:
        """Weight of "time" or "view"."""
        given = {"time": self.time_weight, "view": self.view_weight}[control]
        if given is not None:
            return float(given)
        return 0.5 if self.mode == "attention" else 1.0

    @property
    def super_categories(self) -> dict[str, str]:
        """Placeholders of the prompts, in the order in which they stand, and their words."""
        return dict(JOINT_SUPER_CATEGORIES if self.mode == "joint_token" else SUPER_CATEGORIES)

    def prompt(self, text: str) -> str:
        """A prompt with the placeholders before the text."""
        return f"{' '.join(self.super_categories)}. {text}"

    def branches(
        self,
        injection: TextInjection,
        prompts: PlaceholderPrompts,
        words: Mapping[str, MapperOutput],
        neutral: Mapping[str, MapperOutput],
    ) -> dict[str, Contexts]:
        """What the denoiser attends to, for each of its calls.

        Args:
            injection: with the placeholders of this composition.
            prompts: tokenised.
            words: of the mappers for what is asked; both controls, or the joint one.
            neutral: of the same mappers at rest (no time passes, the camera stays).

        Returns:
            {"control": contexts} for one call; {"time": ..., "view": ...} for ``guidance``, whose
            predictions `guidance_weights` joins.

        Raises:
            ValueError: a word is missing.
        """
        missing = [name for name in self.super_categories if name not in words]
        if missing:
            raise ValueError(
                f"compose={self.mode} has no words for {', '.join(missing)}; expected one mapper "
                "for each placeholder of its prompts."
            )
        if self.mode in ("tokens", "joint_token"):
            return {"control": injection.contexts(prompts, words)}
        missing = [name for name in self.super_categories if name not in neutral]
        if missing:
            raise ValueError(
                f"compose={self.mode} has no neutral words for {', '.join(missing)}; expected the "
                "same mappers at rest."
            )
        alone = {name: {**neutral, name: words[name]} for name in (TIME, VIEW)}
        if self.mode == "guidance":
            return {
                "time": injection.contexts(prompts, alone[TIME]),
                "view": injection.contexts(prompts, alone[VIEW]),
            }
        return {
            "control": [
                injection.contexts(prompts, alone[TIME], self.weight("time")),
                injection.contexts(prompts, alone[VIEW], self.weight("view")),
            ]
        }


def without_control(
    injection: TextInjection, prompts: PlaceholderPrompts, n_layers: int
) -> LayerContexts:
    """The prompts with the super-categories in place of every control."""
    contexts = injection.contexts(prompts, {})
    return LayerContexts(
        contexts.keys.expand(n_layers, -1, -1, -1), contexts.values.expand(n_layers, -1, -1, -1)
    )


def guidance_weights(
    controls: Mapping[str, float],
    has_image: bool = True,
    image_scale: float = 3.0,
    control_scale: float = 4.5,
) -> dict[str, float]:
    """What each prediction of the denoiser counts in the guided one; the weights sum to 1.

    e = e(0, 0) + s_I [e(img, 0) - e(0, 0)] + s_C sum_k w_k [e(img, k) - e(img, 0)], and without an
    image prompt e = e(0, 0) + s_C sum_k w_k [e(0, k) - e(0, 0)].

    Args:
        controls: w_k of each prediction that sees a control; empty for none.
        has_image: whether the predictions with control see an image prompt.
        image_scale: s_I. control_scale: s_C.

    Returns:
        Weights of "nothing", "image" (with ``has_image``) and of each control.
    """
    told = {name: control_scale * weight for name, weight in controls.items()}
    total = sum(told.values())
    if not has_image:
        return {"nothing": 1.0 - total, **told}
    return {"nothing": 1.0 - image_scale, "image": image_scale - total, **told}
