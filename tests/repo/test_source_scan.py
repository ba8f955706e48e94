"""What no source file may contain: code from data, unsafe reads, device names, star imports."""

import ast
import re

import pytest

UNSAFE_CALLS = {
    "eval": "runs a string as code",
    "exec": "runs a string as code",
    "compile": "makes code of a string",
    "__import__": "imports by string; use importlib with a name of our own",
    "pickle.load": "runs code of the file",
    "pickle.loads": "runs code of the data",
    "pickle.Unpickler": "runs code of the file",
    "marshal.loads": "runs code of the data",
    "dill.load": "runs code of the file",
    "joblib.load": "runs code of the file",
    "yaml.load": "builds objects; use safe_load",
    "yaml.unsafe_load": "builds objects; use safe_load",
    "os.system": "is a shell",
    "os.popen": "is a shell",
    "tempfile.mktemp": "names a file that another may create first",
}
UNSAFE_ATTRIBUTES = {"extractall": "writes where the archive says"}
UNSAFE_KEYWORDS = {"weights_only": False, "shell": True, "allow_pickle": True}
UNSAFE_KEYWORDS |= {"trust_remote_code": True}

DEVICE = re.compile(r"^(cpu|cuda|mps|xpu)(:|$)")
# Back ends of the grid are named for what they serve; Lightning's accelerators for the hardware; a
# draw without a generator's device stays where torch's default generator is.
DEVICE_NAMES_ALLOWED = {
    "kernels/hash_grid.py": "names of back ends and the devices that they serve",
    "launcher/trainer.py": "the name of Lightning's accelerator",
    "utils/ops.py": "the default generator's device",
}
STAR_IMPORT_ALLOWED = ("tests/contract", "tests/fixtures/foreign_project")
"""Foreign-style extensions star-import `threestudio.utils.typing`, so that is tested there."""


def unsafe_parts(file) -> list[str]:
    found = []
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in UNSAFE_CALLS:
            found.append(f"{file.at(node)}: {name} {UNSAFE_CALLS[name]}")
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_ATTRIBUTES:
            found.append(f"{file.at(node)}: {name} {UNSAFE_ATTRIBUTES[node.func.attr]}")
        given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        for key, value in UNSAFE_KEYWORDS.items():
            # Lightning's save_checkpoint(weights_only=False) means: with the optimizer's state.
            if given.get(key) is value and not name.endswith("save_checkpoint"):
                found.append(f"{file.at(node)}: {name} with {key}={value}")
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append(f"{file.at(node)}: torch.load without weights_only=True")
    return found


def device_names(file) -> list[str]:
    """Device strings, and calls of .cuda(); comparisons, `map_location` and defaults are not."""
    excused: set[ast.AST] = set()
    for node in ast.walk(file.tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            parts = [node]
        elif isinstance(node, ast.keyword) and node.arg == "map_location":
            parts = [node]
        elif isinstance(node, ast.arguments):
            parts = [*node.defaults, *node.kw_defaults]
        elif isinstance(node, ast.FunctionDef) and node.name == "get_device":
            parts = [node]
        for part in parts:
            excused.update(ast.walk(part) if part is not None else ())
    found = []
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "cuda" and not node.args:
                found.append(f"{file.at(node)}: .cuda()")
        if node in excused or not isinstance(node, ast.Constant):
            continue
        if isinstance(node.value, str) and DEVICE.match(node.value):
            found.append(f"{file.at(node)}: {node.value!r}")
    return found


def star_imports(file) -> list[str]:
    return [
        f"{file.at(node)}: from {node.module} import *"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    ]


def swallowed_errors(file) -> list[str]:
    """Bare excepts, and handlers of Exception that do nothing at all."""
    found = []
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        if node.type is None:
            found.append(f"{file.at(node)}: except without a type")
        elif ast.unparse(node.type) in ("Exception", "BaseException"):
            if all(isinstance(item, ast.Pass) for item in node.body):
                found.append(f"{file.at(node)}: every error is passed over")
    return found


def test_no_source_runs_code_from_data_or_reads_unsafely(source_files):
    assert [line for file in source_files for line in unsafe_parts(file)] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(text)",
        "exec(text)",
        "import pickle\npickle.load(file)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "load(path, weights_only=False)",
        "subprocess.run(command, shell=True)",
        "tempfile.mktemp()",
        "archive.extractall(folder)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text, Loader=yaml.Loader)",
    ],
)
def test_the_scan_sees(snippet, line):
    assert unsafe_parts(snippet(line)) != []


def test_the_scan_knows_what_is_harmless(snippet):
    text = "model.eval()\ntorch.load(p, weights_only=True)\nre.compile('a')\nrun(c, shell=False)"
    text += "\ntrainer.save_checkpoint(p, weights_only=False)"
    assert unsafe_parts(snippet(text)) == []


def test_devices_are_named_in_get_device_only(source_files):
    wrong = [
        line
        for file in source_files
        if not str(file.path).endswith(tuple(DEVICE_NAMES_ALLOWED))
        for line in device_names(file)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    ["x.to('cuda')", "x.cuda()", "torch.device('cuda:1')", "d = f'cuda:{rank}'", "d = 'cpu'"],
)
def test_a_device_name_is_seen(snippet, line):
    assert len(device_names(snippet(line))) == 1


@pytest.mark.parametrize(
    "line",
    [
        "x.device.type == 'cuda'",
        "load(p, map_location='cpu')",
        "def f(device='cpu'): pass",
        "def get_device():\n    return torch.device('cpu')",
        "say('cudagraph')",
    ],
)
def test_a_comparison_or_a_default_is_none(snippet, line):
    assert device_names(snippet(line)) == []


def test_allowed_device_names_are_still_needed(source_files):
    for path in DEVICE_NAMES_ALLOWED:
        (file,) = [file for file in source_files if str(file.path).endswith(path)]
        assert device_names(file), f"{path} names no device; take it off the list"


def test_no_star_imports(source_files, test_files):
    files = [f for f in test_files if not str(f.path).startswith(STAR_IMPORT_ALLOWED)]
    assert [line for file in (*source_files, *files) for line in star_imports(file)] == []


def test_a_star_import_is_seen(snippet):
    assert star_imports(snippet("from threestudio.utils.typing import *")) != []


def test_no_error_is_swallowed(source_files):
    assert [line for file in source_files for line in swallowed_errors(file)] == []


@pytest.mark.parametrize("head", ["except:", "except Exception:", "except BaseException:"])
def test_a_swallowed_error_is_seen(snippet, head):
    assert len(swallowed_errors(snippet(f"try:\n    f()\n{head}\n    pass"))) == 1
