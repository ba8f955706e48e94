"""Attribute access imports a submodule, and hides no error of its own."""

import sys

import pytest
from threestudio.lazy import submodule_getattr


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "lazy_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "good.py").write_text("value = 7\n")
    (folder / "broken.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "lazy_package"
    for name in [n for n in sys.modules if n.startswith("lazy_package")]:
        del sys.modules[name]


def test_a_submodule_is_imported_on_access(package):
    assert submodule_getattr(package)("good").value == 7


def test_an_absent_name_is_an_attribute_error(package):
    with pytest.raises(AttributeError, match="'lazy_package' has no attribute 'absent'"):
        submodule_getattr(package)("absent")


def test_a_missing_dependency_is_not_taken_for_an_absent_submodule(package):
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        submodule_getattr(package)("broken")


def test_private_names_are_never_imported(package):
    with pytest.raises(AttributeError):
        submodule_getattr(package)("__path_of_nothing__")
