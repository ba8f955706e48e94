"""The test files that the README names as proof of something exist."""

import re

import pytest

NAMED = re.compile(r"(?<!\w)tests/[\w./-]*\w\.py\b|(?<!\w)tests/[\w/]+/(?=[`\s)|,;])")


def named_tests(text: str) -> set[str]:
    """Paths below ``tests/`` in a text: files, and folders written with a slash at the end."""
    return set(NAMED.findall(text))


def test_every_named_test_exists(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert [name for name in sorted(named_tests(text)) if not (root / name).exists()] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see `tests/contract/test_config.py`, then", {"tests/contract/test_config.py"}),
        ("| a | [x](tests/a/test_b.py) | `tests/repo/` |", {"tests/a/test_b.py", "tests/repo/"}),
        ("its own tests/ folder, or contests/a.py", set()),
    ],
)
def test_a_named_test_is_seen(text, found):
    assert named_tests(text) == found
