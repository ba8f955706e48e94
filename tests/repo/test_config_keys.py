"""Every key that a config may set says what it means, beside its default."""

import ast


def undocumented_keys(file) -> list[str]:
    """Fields of config dataclasses without a string below them.

    `NAME` next to a documented `NAME_type` is the configuration of that module and needs no words.
    """
    found = []
    for node in ast.walk(file.tree):
        if not (isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
            continue
        if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        told = ast.get_docstring(node) or ""
        fields = [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]
        for item, below in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign):
                continue
            name = item.target.id
            has_words = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if not has_words and name not in told and f"{name}_type" not in fields:
                found.append(f"{file.at(item)}: {node.name}.{name}")
    return found


def test_every_key_is_documented(source_files):
    assert [line for file in source_files for line in undocumented_keys(file)] == []


def test_a_key_without_words_is_seen(snippet):
    head = "@dataclass\nclass SceneConfig:\n"
    bare, told = "    radius: float = 1.0\n", "    'in scene units'\n"
    assert len(undocumented_keys(snippet(head + bare))) == 1
    assert len(undocumented_keys(snippet(head + told + bare))) == 1
    assert undocumented_keys(snippet(head + bare + told)) == []
    assert undocumented_keys(snippet(head + "    'radius: its size'\n" + bare)) == []
    pair = "    a_type: str = ''\n    'name'\n    a: dict = field()\n"
    assert undocumented_keys(snippet(head + pair)) == []
