"""Imports inside custom/fourd go down only, and the runtime knows nothing of the extension."""

import ast
from pathlib import Path

import pytest

LAYERS = (
    {"ops"},
    {"world", "encoders", "fields", "diffusion", "losses", "metrics"},
    {"renderers", "mappers", "policy", "codec", "prompts"},
    {"guidance", "data"},
    {"editing"},
    {"systems"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FREE = {"scripts"}
"""May import everything; nothing may import them."""
NO_CODE = {"assets"}


def imported_modules(file) -> list[tuple[ast.AST, str]]:
    """Every module that a file imports, absolute, at any depth of the file."""
    package = ".".join(file.path.with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parts, base]).rstrip(".")
            found += [(node, f"{base}.{alias.name}") for alias in node.names]
    return found


def extension_package(module: str) -> str | None:
    """The layer folder of a module of the extension, None for anything else."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["custom", "fourd"] and len(parts) > 2 else None


def upward_imports(file) -> list[str]:
    own = file.path.parts[2]
    if own in FREE or own not in RANK:
        return []
    wrong = []
    for node, module in imported_modules(file):
        other = extension_package(module)
        if other is None or other == own:
            continue
        if other in FREE or RANK.get(other, len(LAYERS)) >= RANK[own]:
            wrong.append(f"{file.at(node)}: {own} imports {module}, which is not below it")
    return wrong


def test_every_folder_of_the_extension_has_a_layer(extension_files):
    folders = {file.path.parts[2] for file in extension_files if len(file.path.parts) > 3}
    assert folders <= set(RANK) | FREE | NO_CODE


def test_imports_go_down_only(extension_files):
    assert [line for file in extension_files for line in upward_imports(file)] == []


@pytest.mark.parametrize(
    "own, line",
    [
        ("ops", "from custom.fourd.world.render import render"),
        ("world", "from ..diffusion import samplers"),
        ("world", "from .. import metrics"),
        ("guidance", "def f():\n    import custom.fourd.systems.fourdfy_system"),
        ("systems", "from custom.fourd.scripts.world_views import say"),
    ],
)
def test_an_import_upward_or_sideways_is_seen(snippet, own, line):
    assert len(upward_imports(snippet(line, f"custom/fourd/{own}/example.py"))) == 1


def test_an_import_downward_is_not(snippet):
    text = "from ..ops import camera\nfrom .fourdfy_system import x\nimport torch"
    assert upward_imports(snippet(text, "custom/fourd/systems/example.py")) == []


def test_no_method_imports_the_system_of_another(extension_files):
    wrong = []
    for file in extension_files:
        if file.path.parts[2] in FREE:
            continue
        for node, module in imported_modules(file):
            parts = [p for p in module.split(".") if p.endswith("_system")]
            if extension_package(module) == "systems" and parts and parts[0] != file.path.stem:
                wrong.append(f"{file.at(node)}: imports {module}")
    assert wrong == []


def test_the_runtime_imports_nothing_of_the_extension(runtime_files):
    wrong = [
        f"{file.at(node)}: imports {module}"
        for file in runtime_files
        for node, module in imported_modules(file)
        if module.split(".")[0] == "custom"
    ]
    assert wrong == []


def test_the_root_holds_only_what_the_design_allows(tracked_files):
    allowed = {
        "custom", "configs", "extern", "tests", "launch.py", "requirements.txt", "README.md",
        "pyproject.toml", "CHANGELOG.md", "LICENSE",
    }  # fmt: skip
    found = {path.parts[0] for path in tracked_files}
    assert {name for name in found if not name.startswith(".")} <= allowed


def test_relative_imports_resolve_against_the_package(snippet):
    text = "from . import a\nfrom .b import c\nfrom ..d.e import f"
    modules = [module for _, module in imported_modules(snippet(text, "custom/fourd/ops/x.py"))]
    assert modules == ["custom.fourd.ops.a", "custom.fourd.ops.b.c", "custom.fourd.d.e.f"]
    assert Path("custom/fourd/ops/x.py").parts[2] == "ops"
