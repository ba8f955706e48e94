"""The registry: who may take a name, and what an unknown one is told."""

import sys
import types

import pytest
from threestudio import registry


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    """Give every test its own tables; the real ones are restored afterwards."""
    monkeypatch.setattr(registry, "__modules__", {})
    monkeypatch.setattr(registry, "_lazy_modules", {})
    monkeypatch.setattr(registry, "_aliases", {})
    monkeypatch.setattr(registry, "_failed_extensions", {})


def class_of(module: str, name: str = "Thing") -> type:
    return type(name, (), {"__module__": module, "__qualname__": name})


def test_find_returns_the_registered_class():
    thing = registry.register("a-thing")(class_of("ext"))
    assert registry.find("a-thing") is thing
    assert registry.__modules__ == {"a-thing": thing}


def test_unknown_name_is_a_key_error_with_the_three_nearest_names():
    for name in ("implicit-volume", "implicit-sdf", "volume-grid", "no-material"):
        registry.register(name)(class_of("ext", name))
    with pytest.raises(KeyError) as caught:
        registry.find("implicit-volum")
    message = str(caught.value)
    assert message.startswith("no module is registered as 'implicit-volum'.")
    assert message.index("'implicit-volume'") < message.index("'implicit-sdf'")
    assert message.count("'") == 2 * 4  # the asked name and three others


def test_unknown_name_tells_which_extension_failed_and_why():
    registry.record_failed_extension("threestudio-x", ModuleNotFoundError("No module named 'igl'"))
    with pytest.raises(KeyError, match="'threestudio-x' could not be imported: Module.*'igl'"):
        registry.find("x-system")


def test_two_foreign_modules_with_one_name_collide():
    registry.register("a-thing")(class_of("ext_one"))
    with pytest.raises(ValueError, match="registered by ext_one and again by ext_two"):
        registry.register("a-thing")(class_of("ext_two"))


def test_two_modules_of_ours_with_one_name_collide():
    registry.register("a-thing")(class_of("threestudio.a"))
    with pytest.raises(ValueError, match="registered by threestudio.a and again by custom.fourd.b"):
        registry.register("a-thing")(class_of("custom.fourd.b"))


def test_two_classes_of_one_module_collide_and_a_reload_does_not():
    registry.register("a-thing")(class_of("ext", "First"))
    reloaded = registry.register("a-thing")(class_of("ext", "First"))
    assert registry.find("a-thing") is reloaded
    with pytest.raises(ValueError, match="'a-thing' is registered by ext and again by ext"):
        registry.register("a-thing")(class_of("ext", "Second"))


def test_a_foreign_module_replaces_ours_with_one_line(caplog):
    registry.register("a-thing")(class_of("threestudio.a"))
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        foreign = registry.register("a-thing")(class_of("ext"))
    assert registry.find("a-thing") is foreign
    assert [r.getMessage() for r in caplog.records] == [
        "ext replaces the built-in module 'a-thing'."
    ]


def test_a_replacement_survives_the_later_import_of_our_own_module():
    registry.register_lazy("a-thing", "threestudio.a")
    foreign = registry.register("a-thing")(class_of("ext"))
    registry.register("a-thing")(class_of("threestudio.a"))
    assert registry.find("a-thing") is foreign


def test_find_imports_a_lazy_module_once(monkeypatch):
    imports = []

    def fake_import(name):
        imports.append(name)
        return registry.register("a-thing")(class_of(name))

    monkeypatch.setattr(registry.importlib, "import_module", fake_import)
    registry.register_lazy("a-thing", "threestudio.a")
    assert imports == []
    assert registry.find("a-thing") is registry.find("a-thing")
    assert imports == ["threestudio.a"]


def test_a_lazy_module_that_cannot_be_imported_names_the_cause():
    registry.register_lazy("a-thing", "threestudio.there_is_no_such_module")
    with pytest.raises(ImportError, match="'a-thing' is provided by .*No module named"):
        registry.find("a-thing")


def test_a_lazy_module_that_does_not_register_its_name_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "an_empty_module", types.ModuleType("an_empty_module"))
    registry.register_lazy("a-thing", "an_empty_module")
    with pytest.raises(ImportError, match="imported for 'a-thing' but registers no such name"):
        registry.find("a-thing")


def test_a_lazy_name_of_another_module_of_ours_is_an_error():
    registry.register_lazy("a-thing", "threestudio.a")
    registry.register_lazy("a-thing", "threestudio.a")  # the same again is no change
    with pytest.raises(ValueError, match="threestudio.a and again by threestudio.b"):
        registry.register_lazy("a-thing", "threestudio.b")
    with pytest.raises(ValueError, match="threestudio.a and again by threestudio.c"):
        registry.register("a-thing")(class_of("threestudio.c"))


def test_lazy_declaration_after_registration_by_another_module_of_ours_is_an_error():
    registry.register("a-thing")(class_of("threestudio.a"))
    registry.register_lazy("a-thing", "threestudio.a")
    with pytest.raises(ValueError, match="threestudio.a and again by custom.fourd.b"):
        registry._lazy_modules.clear()
        registry.register_lazy("a-thing", "custom.fourd.b")


def test_composite_name_builds_a_class_with_the_mixins_first():
    main = registry.register("main")(type("Main", (), {"who": lambda self: "main"}))
    a = registry.register("a")(type("A", (), {"who": lambda self: "a"}))
    b = registry.register("b")(type("B", (), {"who": lambda self: "b"}))
    composed = registry.find("main:a,b")
    assert composed.__bases__ == (a, b, main)
    assert composed.__name__ == "main.a,b"
    assert composed().who() == "a"
    assert registry.find("main:a,b") is not composed  # built at call time, as upstream


def test_composite_name_with_two_colons_is_refused():
    with pytest.raises(ValueError, match="more than one colon"):
        registry.find("main:a:b")


def test_alias_answers_with_the_class_of_the_other_name():
    thing = registry.register("ours")(class_of("custom.fourd.ours"))
    registry.register_alias("theirs", "ours")
    assert registry.find("theirs") is thing
    assert registry.canonical_name("theirs") == "ours"
    with pytest.raises(ValueError, match="stands for 'ours' already"):
        registry.register_alias("theirs", "other")


def test_the_extension_behind_an_alias_may_take_its_name_and_we_may_not():
    registry.register("ours")(class_of("custom.fourd.ours"))
    registry.register_alias("theirs", "ours")
    with pytest.raises(ValueError, match="'theirs' is an alias of 'ours'"):
        registry.register("theirs")(class_of("custom.fourd.b"))
    foreign = registry.register("theirs")(class_of("threestudio_theirs"))
    assert registry.find("theirs") is foreign
    assert registry.canonical_name("theirs") == "theirs"


def test_party_is_decided_by_whole_package_names():
    assert registry.is_first_party("threestudio.models")
    assert registry.is_first_party("custom.fourd")
    assert not registry.is_first_party("threestudio_4dfy.system")
    assert not registry.is_first_party("custom.fourd_fork")
