"""What a figure depends on: hardware, versions, commit, load, command; kept beside each result."""

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "pytorch-lightning", "diffusers", "transformers")
ASSET_MANIFEST = ROOT / "custom" / "fourd" / "assets" / "MANIFEST.json"


def describe_circumstances(threads: int | None = None) -> dict[str, Any]:
    """Return hardware, versions, commit, load average and the command line of this process.

    Args:
        threads: CPU threads per process of the measured program; None leaves them out.
    """
    described = {
        "hardware": f"{processor()}, {os.cpu_count()} cores, {memory_gib():.0f} GiB",
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "embedded_weights": embedded_weights(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "command": command(),
    }
    if threads is not None:
        described["threads_per_process"] = threads
    return described


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def memory_gib() -> float:
    """Return the machine's memory in GiB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def commit() -> str:
    """Return the commit of the working copy, marked where tracked files differ from it."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    if not revision:
        return "unknown"
    return revision + (" with changes" if _git("status", "--porcelain", "-uno") else "")


def embedded_weights(manifest: Path = ASSET_MANIFEST, model: str = "multiview") -> str | None:
    """Return the start of the hash of an embedded U-Net; None where it is missing.

    Args:
        model: "multiview" or "video".
    """
    models = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    if model not in models:
        return None
    return models[model]["files"]["unet/diffusion_pytorch_model.safetensors"]["sha256"][:12]


def command() -> str:
    """Return this process's command line, the script relative to the project's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name
    return f"python {shlex.join([str(shown), *sys.argv[1:]])}"


def result_path(what: str, suffix: str, folder: Path = RESULTS) -> Path:
    """Return ``results/<what>_<cores>core_<date>.<suffix>``."""
    date = datetime.date.today().isoformat()
    return folder / f"{what}_{os.cpu_count()}core_{date}.{suffix}"


def as_lines(circumstances: dict[str, Any]) -> list[str]:
    """Return the circumstances as a Markdown list."""
    lines = []
    for name, value in circumstances.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(str(item) for item in value)
        quote = "`" if name == "command" else ""
        lines.append(f"- {name.replace('_', ' ')}: {quote}{value}{quote}")
    return lines


def _git(*arguments: str) -> str:
    run = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return run.stdout.strip() if run.returncode == 0 else ""
