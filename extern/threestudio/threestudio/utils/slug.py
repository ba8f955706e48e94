"""Folder names that stay inside their parent, whatever a tag or prompt holds."""

import hashlib
import re

from threestudio.utils.redaction import redact_values

# Common file systems allow 255 bytes; the rest is left for suffixes such as a second's counter.
_MAX_BYTES = 200
_UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]")


def safe_folder_name(text: str, suffix: str = "") -> str:
    """Return ``text + suffix`` as the name of one folder.

    Ordinary text is kept as it is. Path separators and control characters become underscores, a
    name of dots only gets an underscore, and a long text is cut and marked with its hash, so that
    different texts keep different names. Credentials are left out.

    Args:
        text: any text, such as a prompt.
        suffix: appended after cutting, such as a time stamp.
    """
    name = _UNSAFE.sub("_", redact_values(text)).strip(" ")
    suffix = _UNSAFE.sub("_", suffix)
    encoded = name.encode("utf-8", errors="replace")
    if len(encoded) > _MAX_BYTES:
        mark = hashlib.sha256(encoded).hexdigest()[:8]
        name = encoded[: _MAX_BYTES - 9].decode("utf-8", errors="ignore") + "-" + mark
    joined = name + suffix
    return joined + "_" if joined.strip(".") == "" else joined


def safe_relative_path(text: str) -> str:
    """Return ``text`` as a relative path without ``..``: every part a safe folder name."""
    parts = [part for part in text.replace("\\", "/").split("/") if part not in ("", ".")]
    return "/".join(safe_folder_name(part) for part in parts) or "_"
