"""Building C++ on first use: cached, safe against concurrent builds, clear when it fails."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from threestudio.kernels import native_build
from threestudio.kernels.native_build import BuildError, build

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n'


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A tiny source file, and an empty cache folder of its own."""
    try:
        native_build.find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "answer.cpp"
    path.write_text(SOURCE)
    return path


def answer(library: Path) -> int:
    return ctypes.CDLL(str(library)).answer()


def libraries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.so"))


def test_builds_once_and_loads(source, tmp_path, monkeypatch):
    library = build(source, {"ANSWER": 42})
    assert answer(library) == 42
    assert libraries(tmp_path) == [library]
    monkeypatch.setattr(native_build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build(source, {"ANSWER": 42}) == library


def test_whatever_changes_the_code_changes_the_name(source, monkeypatch):
    names = {build(source, {"ANSWER": 1}).name, build(source, {"ANSWER": 2}).name}
    source.write_text(SOURCE + "// changed\n")
    names.add(build(source, {"ANSWER": 1}).name)
    monkeypatch.setattr(native_build, "_FLAGS", (*native_build._FLAGS, "-g0"))
    names.add(build(source, {"ANSWER": 1}).name)
    monkeypatch.setattr(native_build, "_processor_features", lambda: b"another processor")
    names.add(build(source, {"ANSWER": 1}).name)
    monkeypatch.setattr(native_build, "_compiler_version", lambda _: b"another compiler")
    names.add(build(source, {"ANSWER": 1}).name)
    assert len(names) == 6


def test_cache_folder_is_private(source):
    build(source, {"ANSWER": 1})
    assert stat.S_IMODE(native_build.cache_folder().stat().st_mode) == 0o700


def test_concurrent_builds_leave_one_whole_library(source, tmp_path):
    # By file, not by package: the build needs no torch, and three interpreters would load it.
    code = (
        "import ctypes, importlib.util, pathlib, sys;"
        "spec = importlib.util.spec_from_file_location('native_build', sys.argv[1]);"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "path = module.build(pathlib.Path(sys.argv[2]), {'ANSWER': 7});"
        "sys.exit(ctypes.CDLL(str(path)).answer() - 7)"
    )
    command = [sys.executable, "-c", code, native_build.__file__, str(source)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    assert len(libraries(tmp_path)) == 1


def test_compile_error_names_compiler_file_and_cause(source, tmp_path):
    source.write_text("this is not C++\n")
    with pytest.raises(BuildError, match=r"could not compile answer\.cpp: .*error"):
        build(source, {})
    assert libraries(tmp_path) == []


def test_a_compiler_without_native_flags_still_builds(source, tmp_path, monkeypatch):
    real = native_build.find_compiler()[0]
    picky = tmp_path / "picky"
    picky.write_text(
        '#!/bin/sh\ncase "$*" in *=native*) echo "error: unknown option" >&2; exit 1;; esac\n'
        f'exec {real} "$@"\n'
    )
    picky.chmod(0o755)
    monkeypatch.setenv("CXX", str(picky))
    assert answer(build(source, {"ANSWER": 5})) == 5


def test_missing_source_is_named(source):
    with pytest.raises(BuildError, match=r"nothing\.cpp is missing from this installation"):
        build(source.with_name("nothing.cpp"), {})


def test_no_compiler_lists_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler .*tried g\+\+, clang\+\+, c\+\+"):
        native_build.find_compiler()


def test_cxx_chooses_the_compiler(monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -flag")
    assert native_build.find_compiler() == [sys.executable, "-flag"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="named by CXX, 'no-such-compiler', was not found"):
        native_build.find_compiler()


def test_a_compiler_that_fails_or_hangs_is_named(source, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho 'licence expired' >&2\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(BuildError, match=r"broken --version failed: licence expired"):
        build(source, {})
    broken.write_text("#!/bin/sh\nexec sleep 20\n")
    monkeypatch.setattr(native_build, "BUILD_TIMEOUT_SEC", 0.2)
    with pytest.raises(BuildError, match=r"broken could not be run: .*timed out"):
        build(source, {})


def test_unwritable_cache_falls_back_to_a_private_folder(source, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    library = build(source, {"ANSWER": 9})
    assert answer(library) == 9
    assert not library.is_relative_to(tmp_path / "cache")
    assert stat.S_IMODE(library.parent.stat().st_mode) == 0o700
    assert os.access(library, os.R_OK)
