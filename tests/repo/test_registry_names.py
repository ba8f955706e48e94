"""In custom/fourd a name is that of its file and of its class, and its last word is the kind."""

import ast

import custom.fourd

KINDS = (
    "-system -guidance -geometry -renderer -datamodule -prompt-processor -background -material "
    "-exporter"
).split()


def registrations(file) -> list[tuple[ast.ClassDef, str]]:
    """Classes of a file that are registered, with their names."""
    found = []
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("register"):
                found.append((node, decorator.args[0].value))
    return found


def naming_faults(file) -> list[str]:
    named = registrations(file)
    faults = []
    if len(named) > 1:
        faults.append(f"{file.path}: registers {len(named)} names; one file, one name")
    for node, name in named:
        if name.replace("-", "_") != file.path.stem:
            faults.append(f"{file.at(node)}: registers {name!r}")
        if node.name.lower() != name.replace("-", ""):
            faults.append(f"{file.at(node)}: class {node.name} registers {name!r}")
        if not name.endswith(tuple(KINDS)):
            faults.append(f"{file.at(node)}: {name!r} ends in no kind of {KINDS}")
    return faults


def test_names_are_those_of_files_and_classes(extension_files):
    assert [fault for file in extension_files for fault in naming_faults(file)] == []


def test_wrong_names_are_seen(snippet):
    text = '@threestudio.register("other-thing")\nclass SceneSystem: pass'
    assert len(naming_faults(snippet(text, "custom/fourd/systems/scene_system.py"))) == 3
    text = '@register("scene-system")\nclass SceneSystem: pass'
    assert naming_faults(snippet(text, "custom/fourd/systems/scene_system.py")) == []


def test_the_table_of_lazy_modules_lists_every_registration(extension_files):
    registered = {
        name: ".".join(file.path.with_suffix("").parts[2:])
        for file in extension_files
        for _, name in registrations(file)
    }
    assert registered == custom.fourd.REGISTRY


def test_the_table_of_built_ins_lists_every_registration(runtime_files):
    from threestudio.registry_table import BUILTINS

    registered = {
        name: ".".join(file.path.with_suffix("").parts[2:])
        for file in runtime_files
        for _, name in registrations(file)
        if isinstance(name, str)
    }
    assert registered == BUILTINS
