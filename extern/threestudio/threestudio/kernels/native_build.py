"""Builds one C++ source file into a shared library, once per machine.

The library lies in a per-user cache folder under a name made of the hashes of the source, of the
compiler's version and of the processor's features, so a changed source, compiler or machine never
meets a stale file. It is compiled into a temporary file and renamed, so concurrent builds are safe.
Nothing here runs at import.
"""

import atexit
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
BUILD_TIMEOUT_SEC = 300

# No -ffast-math: NaN must stay NaN, and sums must keep their order. Nobody reads floating-point
# exceptions, and without regard to them comparisons can be vectorised.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
)


class BuildError(RuntimeError):
    """The library cannot be built here; the message is one sentence with the cause."""


def cache_folder() -> Path:
    """Where libraries are kept: ``$XDG_CACHE_HOME`` or ``~/.cache``, then threestudio/kernels."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "threestudio" / "kernels"


def find_compiler() -> list[str]:
    """The compiler command: ``$CXX`` if set, else the first of g++, clang++, c++ on the path.

    Raises:
        BuildError: there is none.
    """
    chosen = os.environ.get("CXX")
    if chosen:
        command = shlex.split(chosen)
        if command and shutil.which(command[0]):
            return command
        raise BuildError(f"the compiler named by CXX, {chosen!r}, was not found.")
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler was found on the path (tried {', '.join(COMPILERS)}).")


def build(source: Path, macros: Mapping[str, str | int]) -> Path:
    """Returns the library built from one C++ file, compiling it if it is not cached.

    Args:
        macros: names and values that the source takes from the command line.

    Raises:
        BuildError: no compiler, or it refuses the source; names the cause.
    """
    if not source.is_file():
        raise BuildError(f"the source file {source} is missing from this installation.")
    compiler = find_compiler()
    flags = [*_FLAGS, *(f"-D{name}={value}" for name, value in macros.items())]
    key = _key(source, compiler, flags)
    folder = _writable_folder()
    library = folder / "-".join([source.stem, *map(str, macros.values()), f"{key}.so"])
    if not library.is_file():
        _compile([*compiler, *flags], source, library)
    return library


def _key(source: Path, compiler: list[str], flags: list[str]) -> str:
    parts = (source.read_bytes(), _compiler_version(compiler), _processor_features())
    digest = hashlib.sha256(repr(flags).encode())
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:24]


def _compiler_version(compiler: list[str]) -> bytes:
    result = _run([*compiler, "--version"])
    if result.returncode != 0:
        raise BuildError(f"{shlex.join(compiler)} --version failed: {_tail(result.stderr)}.")
    return " ".join(compiler).encode() + result.stdout.encode()


def _processor_features() -> bytes:
    """Names the instruction set that native code may use; a shared home serves several machines."""
    described = [platform.system(), platform.machine(), platform.processor()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for wanted in ("model name", "flags", "Features"):
        described += [line for line in lines if line.startswith(wanted)][:1]
    return "\n".join(described).encode()


def _writable_folder() -> Path:
    folder = cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass  # a read-only home: build for this process alone
    return _folder_of_this_process()


@functools.cache
def _folder_of_this_process() -> Path:
    folder = tempfile.mkdtemp(prefix="threestudio-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(command: list[str], source: Path, library: Path) -> None:
    """Compiles for this processor, or, where the compiler refuses that, for any."""
    failure = ""
    for native in (["-march=native"], ["-mcpu=native"], []):
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
        os.close(handle)
        try:
            result = _run([*command, *native, str(source), "-o", temporary])
            if result.returncode == 0:
                os.replace(temporary, library)
                return
            failure = failure or _tail(result.stderr)
        finally:
            Path(temporary).unlink(missing_ok=True)
    raise BuildError(f"{command[0]} could not compile {source.name}: {failure}.")


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_SEC, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{shlex.join(command[:1])} could not be run: {error}.") from error


def _tail(text: str) -> str:
    """The first error line of a compiler's output, or its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "error" in line), lines[-1])
