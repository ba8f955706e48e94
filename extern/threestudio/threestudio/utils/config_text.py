"""Text in configurations that must stay as typed: prompts and literal ``${``."""

import re
from typing import Any

from omegaconf import OmegaConf

# Keys whose values are text at any depth: never YAML and never interpolated on the command line.
TEXT_KEYS = (
    "prompt",
    "prompt_front",
    "prompt_side",
    "prompt_back",
    "prompt_overhead",
    "negative_prompt",
    "instruction",
)

_INTERPOLATION = re.compile(r"(\\*)\$\{")


def is_text_key(key: str) -> bool:
    """Tell whether the last part of a dotted key names text."""
    return key.rpartition(".")[2] in TEXT_KEYS


def escape_interpolations(text: str) -> str:
    """Return ``text`` such that OmegaConf reads it back literally, ``${`` included."""
    return _INTERPOLATION.sub(r"\1\1\\${", text)


def escaped_config(values: Any) -> Any:
    """Return plain containers as an OmegaConf object in which every text is literal."""
    return OmegaConf.create(_escape(values), flags={"allow_objects": True})


def unquote(text: str) -> str:
    """Remove one pair of matching outer quotes; users of upstream must quote prompts twice."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return escape_interpolations(value)
    if isinstance(value, dict):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape(item) for item in value]
    return value
