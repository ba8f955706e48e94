"""Keeps credentials out of what a run writes: files, log lines and what trackers are told.

A credential is known by its value (an environment variable whose name says so), by its place (a key
such as ``api_key``, the user part or the signature of an address) or by its form (``hf_...``).
Whatever a program reads is never changed, only what it writes about itself.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

REDACTED = "<redacted>"

_SECRET_WORDS = (
    "api_?key|apikey|(?:secret_?|private_?|access_?)key|passwd|password|secret|credentials?"
)
# TOKENIZERS_PARALLELISM, pad_token and n_tokens are none, hence whole words and a closed list.
_TOKEN_OWNERS = "access|api|auth|bearer|github|gitlab|hf|hub|hugging_?face(?:_hub)?|session|wandb"
_SECRET_KEY = re.compile(
    rf"(?:^|[._-])(?:{_SECRET_WORDS}|(?:use_)?(?:{_TOKEN_OWNERS})_?token)$|^token$|\.token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(rf"(?:^|_)(?:{_SECRET_WORDS}|token)$", re.IGNORECASE)
_SHORTEST_VALUE = 8
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{20,}|wandb_v\d_\w{20,}|AKIA[0-9A-Z]{16})"
)
# Both begin with what is rare, which a search skips to; a look behind would stop at every letter.
_USER_OF_ADDRESS = re.compile(r"(://)[^/\s@'\"<>]+(?=@)")
_SIGNATURE_OF_ADDRESS = re.compile(
    r"([?&](?:token|key|api_?key|access_token|sig|signature|password|X-Amz-\w+)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_ASSIGNMENT = re.compile(r"(?P<key>[A-Za-z][\w.-]*)(?P<sign>\"?'?\s*[=:]\s*)(?P<value>[^\s#,}\]]+)")
_NOT_SECRET = re.compile(r"^['\"]?(?:\$\{.*|null|none|true|false|~)?['\"]?$", re.IGNORECASE)


def secret_values(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the values of environment variables whose names say that they are credentials.

    Values shorter than eight characters are left out: they would blot out ordinary words.
    """
    environment = os.environ if environment is None else environment
    values = {
        value.strip()
        for name, value in environment.items()
        if _SECRET_VARIABLE.search(name) and len(value.strip()) >= _SHORTEST_VALUE
    }
    return sorted(values, key=len, reverse=True)  # one may be part of another


def redact_values(text: str, secrets: Sequence[str] | None = None) -> str:
    """Return ``text`` without known credentials, without those in addresses or of a known form.

    Args:
        text: anything.
        secrets: the known ones, for callers with many texts; None takes `secret_values`.
    """
    for value in secret_values() if secrets is None else secrets:
        text = text.replace(value, REDACTED)
    text = _USER_OF_ADDRESS.sub(rf"\g<1>{REDACTED}", text)
    text = _SIGNATURE_OF_ADDRESS.sub(rf"\g<1>{REDACTED}", text)
    return _FORMS.sub(REDACTED, text)


def redact(text: str) -> str:
    """Return ``text`` also without the values that stand behind keys such as ``api_key=``."""
    return _ASSIGNMENT.sub(_without_value, redact_values(text))


def redact_tree(data: Any, key: str = "") -> Any:
    """Return nested plain containers with the credentials in them replaced.

    Args:
        data: dicts, lists, strings and anything else, which is returned as it is.
        key: the name under which ``data`` is kept.
    """
    if isinstance(data, Mapping):
        return {redact_values(str(k)) if isinstance(k, str) else k: redact_tree(v, str(k))
                for k, v in data.items()}  # fmt: skip
    if isinstance(data, str):
        if _SECRET_KEY.search(key) and not _NOT_SECRET.match(data):
            return REDACTED
        return redact_values(data)
    if isinstance(data, Sequence) and not isinstance(data, (bytes, bytearray)):
        items = [redact_tree(item, key) for item in data]
        return tuple(items) if isinstance(data, tuple) else items
    return data


class RedactingFormatter(logging.Formatter):
    """Formats a record, its traceback included, and takes the credentials out."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _without_value(found: re.Match) -> str:
    if not _SECRET_KEY.search(found["key"]) or _NOT_SECRET.match(found["value"]):
        return found[0]
    return f"{found['key']}{found['sign']}{REDACTED}"
