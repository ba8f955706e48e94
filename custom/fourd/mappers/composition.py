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

from jaxtyping import Float
from torch import Tensor

from custom.fourd.diffusion.layer_contexts import Contexts, LayerContexts

from .mapper import MapperOutput
from .text_injection import PlaceholderPrompts, TextInjection

COMPOSE_MODES = ("tokens", "joint_token", "attention", "guidance")
TIME, VIEW, JOINT = "<time>", "<view>", "<control>"
SUPER_CATEGORIES = {VIEW: "view", TIME: "time"}
JOINT_SUPER_CATEGORIES = {JOINT: "object"}


@dataclass(frozen=True)
class Composition:
    """How two controls join.

    The weights are those of the text branches for ``attention`` (they sum to 1 where the controls
    together should weigh as one text) and the strengths for ``guidance``.
    """

    mode: str = "tokens"
    """One of `COMPOSE_MODES`."""
    time_weight: float = 0.5
    """Of the time control."""
    view_weight: float = 0.5
    """Of the view control."""

    def __post_init__(self) -> None:
        if self.mode not in COMPOSE_MODES:
            raise ValueError(
                f"compose is {self.mode!r}; expected one of {', '.join(COMPOSE_MODES)}."
            )

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
            predictions `guided_by_controls` joins.

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
                injection.contexts(prompts, alone[TIME], self.time_weight),
                injection.contexts(prompts, alone[VIEW], self.view_weight),
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


def guided_by_image_and_control(
    without_both: Float[Tensor, "b *rest"],
    with_image: Float[Tensor, "b *rest"],
    with_image_and_control: Float[Tensor, "b *rest"],
    image_scale: float = 3.0,
    control_scale: float = 4.5,
) -> Float[Tensor, "b *rest"]:
    """e(0, 0) + s_I [e(img, 0) - e(0, 0)] + s_C [e(img, control) - e(img, 0)]."""
    return (
        without_both
        + image_scale * (with_image - without_both)
        + control_scale * (with_image_and_control - with_image)
    )


def guided_by_controls(
    with_image: Float[Tensor, "b *rest"],
    with_time: Float[Tensor, "b *rest"],
    with_view: Float[Tensor, "b *rest"],
    time_scale: float = 1.0,
    view_scale: float = 1.0,
) -> Float[Tensor, "b *rest"]:
    """e_img + s_T [e_T - e_img] + s_V [e_V - e_img]; every term saw the image prompt."""
    return (
        with_image + time_scale * (with_time - with_image) + view_scale * (with_view - with_image)
    )
