"""The tests mirror the source, and there are enough of them."""

import ast
from pathlib import Path

import pytest

MIRRORS = {"runtime": Path("extern/threestudio/threestudio"), "fourd": Path("custom/fourd")}
# Tests of a whole package or of several parts together, named for what they show.
TOPICS = {
    "runtime/data/test_data.py",
    "runtime/models/background/test_backgrounds.py",
    "runtime/models/exporters/test_exporters.py",
    "runtime/models/materials/test_materials.py",
    "runtime/models/renderers/test_scene_training.py",
    "runtime/test_import_weight.py",
    "fourd/guidance/test_full_layout.py",
    "fourd/systems/test_fourdfy_training.py",
    "fourd/systems/test_two_ranks.py",
    "fourd/test_fourd.py",
}
LEAST_TEST_LINES_PER_SOURCE_LINE = 0.8
LONGEST_FILE, LONGEST_FUNCTION = 600, 120


def mirrored(test: Path, root: Path) -> bool:
    """Whether a test's path, relative to tests/, is that of a module."""
    source = MIRRORS[test.parts[0]].joinpath(*test.parts[1:-1])
    stem = test.stem.removeprefix("test_")
    return (root / source / f"{stem}.py").is_file() or (root / source / stem).is_dir()


def line_count(files) -> int:
    return sum(file.text.count("\n") for file in files)


def test_every_test_file_is_named_for_a_module(test_files, root):
    tests = [Path(*file.path.parts[1:]) for file in test_files]
    tests = [t for t in tests if t.parts[0] in MIRRORS and t.name.startswith("test_")]
    strays = [str(t) for t in tests if not mirrored(t, root) and str(t) not in TOPICS]
    assert strays == [], "name the file for the module it tests, or list it under TOPICS"


def test_the_list_of_topics_is_not_stale(root):
    for topic in TOPICS:
        assert (root / "tests" / topic).is_file(), f"{topic} is gone; take it off the list"
        assert not mirrored(Path(topic), root) or topic == "fourd/test_fourd.py"


def test_a_stray_test_is_seen(root):
    assert mirrored(Path("runtime/utils/test_rng.py"), root)
    assert not mirrored(Path("runtime/utils/test_no_such_module.py"), root)


def test_every_module_is_named_by_a_test(source_files, test_files):
    """By its own name or, of a registered module, by the registered one."""
    words = " ".join(f"{file.path.stem} {file.text}" for file in test_files)
    modules = [file.path for file in source_files if file.path.stem != "__init__"]
    names = {path: (path.stem, path.stem.replace("_", "-")) for path in modules}
    assert [str(path) for path in modules if not any(n in words for n in names[path])] == []


def test_there_are_enough_tests(source_files, test_files):
    ratio = line_count(test_files) / line_count(source_files)
    assert ratio >= LEAST_TEST_LINES_PER_SOURCE_LINE


def test_no_folder_of_tests_shadows_a_package(root):
    assert [str(path) for path in (root / "tests").rglob("__init__.py")] == []


def test_no_file_or_function_is_too_long(source_files):
    long = [str(f.path) for f in source_files if f.text.count("\n") > LONGEST_FILE]
    for file in source_files:
        for node in ast.walk(file.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION:
                    long.append(f"{file.at(node)} {node.name}")
    assert long == []


@pytest.mark.parametrize("folder", MIRRORS.values(), ids=str)
def test_every_module_says_what_it_is(folder, source_files):
    files = [f for f in source_files if f.path.is_relative_to(folder) and f.text.strip()]
    assert [str(f.path) for f in files if not ast.get_docstring(f.tree)] == []
