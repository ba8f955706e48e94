"""Loading of custom/: what is loaded, in which order, and what happens to what fails."""

import sys

import pytest
from threestudio import registry
from threestudio.launcher.extensions import load_extensions

REGISTER = "import threestudio\n@threestudio.register({name!r})\nclass {cls}:\n    pass\n"


@pytest.fixture
def custom(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "__modules__", {})
    monkeypatch.setattr(registry, "_failed_extensions", {})
    monkeypatch.setattr("threestudio.__modules__", registry.__modules__)
    before = set(sys.modules)
    folder = tmp_path / "custom"
    folder.mkdir()
    yield folder
    for name in set(sys.modules) - before:
        if name.startswith("r1x"):
            del sys.modules[name]


def extension(custom, name, text, **files):
    folder = custom / name
    folder.mkdir()
    (folder / "__init__.py").write_text(text)
    for stem, content in files.items():
        (folder / f"{stem}.py").write_text(content)


def test_a_hyphenated_extension_imports_its_own_parts(custom):
    extension(
        custom,
        "r1x-hyphen-ated",
        "from .part import Thing\nfrom . import part\n",
        part=REGISTER.format(name="r1x-thing", cls="Thing"),
    )
    assert load_extensions(custom) == ["r1x-hyphen-ated"]
    assert registry.find("r1x-thing").__module__ == "r1x-hyphen-ated.part"
    assert sys.modules["r1x-hyphen-ated"].part.Thing is registry.find("r1x-thing")


def test_order_and_what_is_skipped(custom):
    for name in ("r1x_b", "r1x_a", "r1x_c_disabled", ".r1x_hidden", "__pycache__"):
        extension(custom, name, "")
    (custom / "r1x_single.py").write_text("")
    (custom / "r1x_off_disabled.py").write_text("raise RuntimeError")
    (custom / "README.md").write_text("")
    (custom / "configs").mkdir()
    (custom / "configs" / "a.yaml").write_text("")
    assert load_extensions(custom) == ["r1x_a", "r1x_b", "r1x_single"]
    assert registry.failed_extensions() == {}


def test_a_folder_of_python_without_init_is_named(custom, caplog):
    (custom / "r1x-clone").mkdir()
    (custom / "r1x-clone" / "setup.py").write_text("raise RuntimeError")
    assert load_extensions(custom) == []
    assert "r1x-clone has no __init__.py" in caplog.text


@pytest.mark.parametrize("last_line", ["import a_missing_package", "raise SystemExit(3)", "1 / 0"])
def test_a_failing_extension_is_reported_once_and_the_rest_loads(custom, capsys, last_line):
    registered = REGISTER.format(name="r1x-half", cls="Half")
    extension(custom, "r1x-bad", registered + last_line + "\n")
    extension(custom, "r1x-good", REGISTER.format(name="r1x-fine", cls="Fine"))
    assert load_extensions(custom) == ["r1x-good"]
    assert capsys.readouterr().err.count("Traceback") == 1
    assert "r1x-bad" not in sys.modules
    with pytest.raises(KeyError, match="Extension 'r1x-bad' could not be imported: "):
        registry.find("r1x-half")
    assert registry.find("r1x-fine")


def test_a_failing_extension_gives_back_the_name_that_it_took(custom):
    ours = registry.register("r1x-thing")(type("Ours", (), {"__module__": "threestudio.ours"}))
    extension(custom, "r1x-bad", REGISTER.format(name="r1x-thing", cls="T") + "1 / 0\n")
    load_extensions(custom)
    assert registry.find("r1x-thing") is ours


def test_two_extensions_with_one_name_collide_as_upstream(custom, capsys):
    for name in ("r1x-one", "r1x-two"):
        extension(custom, name, REGISTER.format(name="r1x-thing", cls="Thing"))
    assert load_extensions(custom) == ["r1x-one"]
    assert "registered by r1x-one and again by r1x-two" in capsys.readouterr().err
    assert isinstance(registry.failed_extensions()["r1x-two"], ValueError)


def test_an_extension_named_like_a_loaded_module_is_refused(custom):
    extension(custom, "json", "raise RuntimeError('not reached')")
    import json

    load_extensions(custom)
    assert "the name 'json' is taken" in str(registry.failed_extensions()["json"])
    assert sys.modules["json"] is json


def test_loading_again_changes_nothing(custom):
    extension(custom, "r1x-again", REGISTER.format(name="r1x-thing", cls="Thing"))
    assert load_extensions(custom) == load_extensions(custom) == ["r1x-again"]


def test_a_missing_folder_holds_no_extension(tmp_path):
    assert load_extensions(tmp_path / "absent") == []


def test_ours_is_loaded_first_under_its_own_name(tmp_path):
    from pathlib import Path

    root = Path(__file__).parents[3]
    assert load_extensions(root / "custom")[0] == "fourd"
    assert "custom.fourd" in sys.modules and "fourd" not in sys.modules
