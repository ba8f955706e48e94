"""What the CPU's kernels are held to, over several runs.

    python tests/benchmarks/kernel_bounds.py [--runs 5] [--repeats 5] [--write]

Runs `hash_grid.py` (2^17 points, published size) and `dense_step.py` that many times in turn, each
in a process of its own: addresses, caches and the machine's other guests differ from run to run.
Every figure is a ratio within one run; the median over the runs is held to the bound. `--write`
stores the report under tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import operator
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from circumstances import as_lines, describe_circumstances, result_path  # noqa: E402

LOG2_POINTS = 17
LEVELS = 16
GRIDS = ("3D", "4D", "3D + 4D")


@dataclass(frozen=True)
class Bound:
    """What a ratio is held to."""

    what: str
    limit: float
    of: Callable[[dict, dict], float]
    """The ratio, from the reports of the grid and of the dense step."""
    is_least: bool = False
    """The limit is the least that is asked, not the most."""

    def holds(self, value: float) -> bool:
        """Whether a value is within the limit."""
        return (operator.ge if self.is_least else operator.le)(value, self.limit)

    def asked(self) -> str:
        """The limit in words."""
        return f"{'>=' if self.is_least else '<='} {self.limit:g}"


def _row(grid: dict, dims: str, name: str) -> dict:
    (found,) = (
        row
        for row in grid["rows"]
        if (row["grid"], row["pass"], row["backend"]) == (dims, name, "cpu")
        and (row["log2_points"], row["levels"]) == (LOG2_POINTS, LEVELS)
    )
    return found


def _of_row(dims: str, name: str, key: str) -> Callable[[dict, dict], float]:
    return lambda grid, _: _row(grid, dims, name)[key]


def all_bounds() -> list[Bound]:
    """Every bound: of each grid over its floor and under its twin, of the step over its floor."""
    bounds = []
    for name, limit in (("forward", 1.5), ("backward x+t", 1.9)):
        for dims in GRIDS:
            what = f"{dims} {name}"
            bounds.append(Bound(f"{what} over its floor", limit, _of_row(dims, name, "x_floor")))
            twin = _of_row(dims, name, "twin_over_it")
            bounds.append(Bound(f"eager twin over {what}", 10.0, twin, is_least=True))
    bounds.append(Bound("dense step over its floor", 2.5, lambda _, step: step["ratio"]))
    return bounds


def run_both(repeats: int, folder: Path) -> tuple[dict, dict]:
    """Run both benchmarks once; return their reports."""
    reports = []
    for script, further in (
        ("hash_grid", ("--log2-points", str(LOG2_POINTS))),
        ("dense_step", ()),
    ):
        path = folder / f"{script}.json"
        command = [sys.executable, str(Path(__file__).with_name(f"{script}.py")), "--device", "cpu"]
        command += ["--repeats", str(repeats), "--json", str(path), *further]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        reports.append(json.loads(path.read_text(encoding="utf-8")))
    return reports[0], reports[1]


def as_table(bounds: list[Bound], runs: list[list[float]]) -> list[str]:
    """Bounds as a Markdown table: each run, the median, whether it is held."""
    numbers = " | ".join(str(number + 1) for number in range(len(runs)))
    lines = [
        f"| ratio | asked | median | held | {numbers} |",
        f"|---|---|---|---|{'---|' * len(runs)}",
    ]
    for place, bound in enumerate(bounds):
        values = [run[place] for run in runs]
        median = statistics.median(values)
        shown = " | ".join(f"{value:.2f}" for value in values)
        held = "yes" if bound.holds(median) else "**no**"
        lines.append(f"| {bound.what} | {bound.asked()} | {median:.2f} | {held} | {shown} |")
    return lines


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="store the report under results/")
    arguments = parser.parse_args()
    facts = describe_circumstances()
    bounds, runs = all_bounds(), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.runs):
            reports = run_both(arguments.repeats, Path(folder))
            runs.append([bound.of(*reports) for bound in bounds])
            facts["threads_per_process"] = reports[0]["threads_per_process"]
            print(*(f"{value:.2f}" for value in runs[-1]), file=sys.stderr, flush=True)
    text = "\n".join(["# Bounds of the kernels", "", *as_lines(facts), "", *as_table(bounds, runs)])
    print(text)
    if arguments.write:
        result_path("kernel_bounds", "md").write_text(text + "\n", encoding="utf-8")
        rows = [
            {
                "what": bound.what,
                "asked": bound.asked(),
                "runs": [run[place] for run in runs],
                "median": statistics.median(run[place] for run in runs),
            }
            for place, bound in enumerate(bounds)
        ]
        report = json.dumps({**facts, "bounds": rows}, indent=1)
        result_path("kernel_bounds", "json").write_text(report + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
