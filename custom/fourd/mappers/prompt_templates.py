"""What follows the placeholders of a prompt: sentences with the scene's caption.

A template holds ``{caption}``, the words as given ("a red cube bouncing"), or ``{noun}``, the same
without an article at the front ("red cube bouncing").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

ARTICLES = ("a", "an", "the", "one")
FIELDS = ("caption", "noun")
NEUTRAL_TEMPLATES = (
    "the photo of a {noun}",
    *(f"a photo of {article} {{noun}}" for article in ("a", "the", "my", "one")),
    *(
        f"a photo of {article} {quality} {{noun}}"
        for quality in ("clean", "nice", "cool", "small")
        for article in ("a", "the")
    ),
    *("a photo of a dirty {noun}", "a photo of the weird {noun}", "a photo of the large {noun}"),
    *(f"a rendition of {article} {{noun}}" for article in ("a", "the")),
    "a rendering of a {noun}",
    *(
        f"a {quality} photo of {article} {{noun}}"
        for quality in ("cropped", "close-up", "good")
        for article in ("a", "the")
    ),
    *("a dark photo of the {noun}", "a bright photo of the {noun}"),
)
"""The 27 neutral templates of textual inversion, under the name "imagenet" in a config."""
NAMED_TEMPLATES = {"imagenet": NEUTRAL_TEMPLATES}


def checked_templates(given: Any, key: str) -> tuple[str, ...]:
    """Templates of a config: one, a list, or a name of `NAMED_TEMPLATES`.

    Raises:
        ValueError: there is none, or one names something else than a caption or noun.
    """
    if isinstance(given, str):
        listed = NAMED_TEMPLATES.get(given, (given,))
    else:
        listed = tuple(str(template) for template in given or ())
    if not listed:
        raise ValueError(
            f'{key} is empty; expected a template such as "a photo of {{caption}}", a list of '
            f"them, or one of the names {', '.join(NAMED_TEMPLATES)}."
        )
    for template in listed:
        try:
            fill_template(template, "")
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"{key} holds {template!r}, whose fields cannot be filled ({error}); expected "
                "{caption} or {noun} alone in braces."
            ) from error
    return listed


def fill_template(template: str, caption: str) -> str:
    """The sentence of a template about a caption."""
    first, _, rest = caption.partition(" ")
    noun = rest if first.lower() in ARTICLES and rest else caption
    return template.format(caption=caption, noun=noun)


def drawn_templates(templates: Sequence[str], unit: Float[Tensor, "b"]) -> list[str]:
    """The template of each sample, by numbers in [0, 1)."""
    places = (unit * len(templates)).to(torch.long).clamp(max=len(templates) - 1)
    return [templates[place] for place in places.tolist()]
