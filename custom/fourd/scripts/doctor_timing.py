"""How long a profile takes, and what memory it used, from committed benchmark results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .doctor_models import ROOT

RESULTS = ROOT / "tests" / "benchmarks" / "results"
# Benchmark of the embedded profile by stage: its results end with a date, so names sort by age.
_BENCHMARKS = {"fourdfy_stage_1": "text_to_3d", "fourdfy_stage_3": "text_to_4d"}
PUBLISHED = {
    "paper": "about 23 h for all three stages on one A100 with 80 GB, as published for 4D-fy",
    "low_vram": "not measured; 200,000 of its steps are stage 3's",
    "test": "seconds; not a benchmark",
}


@dataclass(frozen=True)
class Measured:
    """What a benchmark saw: seconds of training per run, GB of memory, and on which machine."""

    seconds: float
    peak_memory_gb: float
    steps_per_second: float
    hardware: str
    source: str


def measured(benchmark: str, folder: Path = RESULTS) -> Measured | None:
    """The newest committed result of a benchmark, the slowest of its groups; None without one."""
    for path in sorted(folder.glob(f"{benchmark}_*.json"), reverse=True):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            groups = list(content["groups"].values())
            slowest = max(groups, key=lambda group: group["seconds"])
            return Measured(
                float(slowest["seconds"]),
                max(float(group["peak_memory_gb"]) for group in groups),
                float(slowest.get("steps_per_second") or 0.0),
                str(content["circumstances"]["hardware"]),
                path.name,
            )
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another layout, or damaged: an older one may do
    return None


def estimate(profile: str, stages: list[tuple[str, int]], folder: Path = RESULTS) -> str:
    """In words, how long a profile's stages take, and on which machine that was seen.

    Args:
        stages: (config name, steps) in order.
    """
    if profile != "embedded":
        return PUBLISHED.get(profile, "not measured")
    parts = []
    for name, steps in stages:
        benchmark = _BENCHMARKS.get(name)
        seen = measured(benchmark, folder) if benchmark else None
        if seen is None or not seen.steps_per_second:
            parts.append(f"{name}: not measured")
            continue
        seconds = steps / seen.steps_per_second
        parts.append(f"{name}: about {_duration(seconds)} ({seen.hardware}; {seen.source})")
    return "; ".join(parts) or "not measured"


def memory_seen_gb(folder: Path = RESULTS) -> tuple[float, str] | None:
    """(largest peak of the embedded profile's benchmarks in GB, the file that says so)."""
    seen = [found for name in _BENCHMARKS.values() if (found := measured(name, folder))]
    if not seen:
        return None
    most = max(seen, key=lambda item: item.peak_memory_gb)
    return most.peak_memory_gb, most.source


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
