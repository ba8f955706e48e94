"""The requirement files: pinned, safe, within the package's own bounds, and complete."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Below these a known fault lets a file or a configuration run code.
SAFE_FLOORS = {"torch": "2.10", "transformers": "5.3", "omegaconf": "2.4", "pillow": "12.2"}
SAFE_FLOORS |= {"pytorch-lightning": "2.6.6"}
NEVER = {"torchvision", "lightning", "gradio"}
# Used where they are installed, with a sentence that names the package where they are not.
OPTIONAL = {
    "tinycudann",
    "nerfacc",
    "wandb",
    "torchvision",
    "xformers",
    "bitsandbytes",
    "xatlas",
    "triton",
    "nvdiffrast",
}
OPTIONAL |= {"mcubes", "scipy", "apex", "lpips"}
# Imported, and certain to come with a requirement of ours that cannot work without it.
COMES_WITH = {"yaml": "omegaconf"}
OURS = {"threestudio", "custom"}


def pins(text: str) -> dict[str, Requirement]:
    """Requirements by name; the editable line of our own package is none."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(item.name): item for item in found}


@pytest.fixture(scope="module")
def pinned(root):
    return pins((root / "requirements.txt").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def package(root):
    text = (root / "extern/threestudio/pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]


def version_of(requirement: Requirement) -> Version:
    (bound,) = requirement.specifier
    assert bound.operator == "==", f"{requirement} is no exact pin"
    return Version(bound.version)


def top_level_imports(file) -> set[str]:
    names = set()
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def undeclared(files, declared: set[str]) -> set[str]:
    """Imported top-level packages that no declared distribution provides."""
    providers = packages_distributions()
    names = set().union(*(top_level_imports(file) for file in files))
    names -= OURS | OPTIONAL | set(sys.stdlib_module_names)
    names -= {name for name, carrier in COMES_WITH.items() if carrier in declared}
    given = {n for n in names if {canonicalize_name(d) for d in providers.get(n, ())} & declared}
    return names - given


def test_every_requirement_is_an_exact_pin(pinned, root):
    for requirement in pinned.values():
        version_of(requirement)
    tests = pins((root / "tests" / "requirements.txt").read_text(encoding="utf-8"))
    for requirement in tests.values():
        version_of(requirement)
    assert str(pinned["torch"].specifier) == "==2.13.0"


def test_the_runtime_is_installed_with_them(root):
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert "-e ./extern/threestudio" in lines


def test_the_pins_lie_within_the_packages_bounds(pinned, package):
    bounds = list(package["dependencies"])
    for extra in package["optional-dependencies"].values():
        bounds += extra
    for bound in map(Requirement, bounds):
        name = canonicalize_name(bound.name)
        assert name in pinned, f"{name} is a dependency of the package, but not pinned"
        assert bound.specifier.contains(version_of(pinned[name])), f"{pinned[name]} against {bound}"


def test_the_package_supports_torch_from_2_11_and_python_from_3_11(package):
    assert package["requires-python"] == ">=3.11"
    (torch,) = [r for r in map(Requirement, package["dependencies"]) if r.name == "torch"]
    assert torch.specifier.contains("2.11.0") and not torch.specifier.contains("2.10.0")


def test_no_pin_is_below_its_safe_floor(pinned):
    for name, floor in SAFE_FLOORS.items():
        assert version_of(pinned[name]) >= Version(floor)
    assert not NEVER & set(pinned)


def test_the_packages_own_floors_are_safe_too(package):
    bounds = map(
        Requirement,
        package["dependencies"]
        + package["optional-dependencies"]["media"]
        + package["optional-dependencies"]["diffusion"],
    )
    found = {canonicalize_name(bound.name): bound.specifier for bound in bounds}
    for name, floor in SAFE_FLOORS.items():
        (lowest,) = [Version(s.version) for s in found[name] if s.operator == ">="]
        assert lowest >= Version(floor)


def test_everything_that_is_imported_is_required(source_files, pinned):
    assert undeclared(source_files, set(pinned)) == set()


def test_everything_that_the_tests_import_is_required(test_files, pinned, root):
    declared = set(pinned) | set(pins((root / "tests/requirements.txt").read_text("utf-8")))
    local = {file.path.stem for file in test_files} | {"tests"}
    local |= {path.stem for path in (root / "tests" / "benchmarks").glob("*.py")}
    assert undeclared(test_files, declared) - local == set()


def test_a_missing_requirement_is_seen(snippet):
    file = snippet("import pytest\nfrom torch import nn\nimport os, threestudio, yaml")
    assert undeclared([file], {"torch"}) == {"pytest", "yaml"}
    assert undeclared([file], {"torch", "omegaconf", "pytest"}) == set()


def test_an_inexact_pin_is_seen():
    with pytest.raises(AssertionError, match="is no exact pin"):
        version_of(Requirement("torch>=2.11"))
    assert list(pins("-e ./extern/x\nA_b==1 # why\n\n")) == ["a-b"]
    assert re.fullmatch(r"\d+\.\d+", SAFE_FLOORS["torch"])
