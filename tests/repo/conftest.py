"""The project's own files, as the rules of its design see them."""

import ast
import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUNTIME = Path("extern/threestudio/threestudio")
EXTENSION = Path("custom/fourd")


@dataclass(frozen=True)
class PythonFile:
    """A source file: its path relative to the root, its text and its syntax tree."""

    path: Path
    text: str
    tree: ast.Module = field(repr=False)

    def at(self, node: ast.AST) -> str:
        """Where a node stands, for a message."""
        return f"{self.path}:{node.lineno}"


def read(path: Path) -> PythonFile:
    text = (ROOT / path).read_text(encoding="utf-8")
    return PythonFile(path, text, ast.parse(text))


def python_files(folder: Path) -> list[PythonFile]:
    found = sorted(path.relative_to(ROOT) for path in (ROOT / folder).rglob("*.py"))
    return [read(path) for path in found]


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def extension_files() -> list[PythonFile]:
    return python_files(EXTENSION)


@pytest.fixture(scope="session")
def runtime_files() -> list[PythonFile]:
    return python_files(RUNTIME)


@pytest.fixture(scope="session")
def source_files(extension_files, runtime_files) -> list[PythonFile]:
    return [*extension_files, *runtime_files, read(Path("launch.py"))]


@pytest.fixture(scope="session")
def test_files() -> list[PythonFile]:
    return [f for f in python_files(Path("tests")) if "benchmarks" not in f.path.parts]


@pytest.fixture(scope="session")
def tracked_files() -> list[Path]:
    """Paths that git tracks, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a git working copy")
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture
def snippet():
    """Make a `PythonFile` of a few lines, to show that a rule sees what breaks it."""

    def make(text: str, path: str = "custom/fourd/ops/example.py") -> PythonFile:
        return PythonFile(Path(path), text, ast.parse(text))

    return make


@pytest.fixture(scope="module")
def load():
    """Import a benchmark as `python tests/benchmarks/NAME.py` would."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
    yield importlib.import_module
    sys.path[:] = before
