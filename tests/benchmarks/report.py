"""Print the README's tables from the newest result files, so that no figure is typed by hand.

    python tests/benchmarks/report.py            # print them
    python tests/benchmarks/report.py --write    # put them into README.md, between the marks
    python tests/benchmarks/report.py --check    # exit 1 if README.md holds anything else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import edit_4d_report  # noqa: E402
import text_to_4d_report  # noqa: E402
import time_view_report  # noqa: E402
from text_to_3d_report import group_table, threshold_table  # noqa: E402

SAMPLING_BOUNDS_DB = {"1": 25, "2": 22}
"""Mean PSNR that samples of the embedded prior must reach, by the number of objects."""
RESULTS = Path(__file__).parent / "results"
README = ROOT / "README.md"
BEGIN = "<!-- figures: begin; written by tests/benchmarks/report.py -->"
END = "<!-- figures: end -->"
NOTHING = "No result is committed yet."


def newest(kind: str, folder: Path = RESULTS) -> tuple[str, dict[str, Any]] | None:
    """Return name and content of the newest result of a benchmark, by the date in its name."""
    # "_<cores>core_<date>" follows the name, so that no name that begins with another's is meant.
    pattern = f"{kind}_*core_*.json"
    found = [path for path in folder.glob(pattern) if path.stem.removeprefix(kind).count("_") == 2]
    found.sort(key=lambda path: path.stem.rsplit("_", 1)[-1])
    if not found:
        return None
    return found[-1].stem, json.loads(found[-1].read_text(encoding="utf-8"))


def _source(name: str, report: dict[str, Any], folder: Path) -> str:
    """One line: where the figures come from and how they were made."""
    facts = report.get("circumstances", {})
    told = [facts[key] for key in ("hardware", "date") if key in facts]
    if "packages" in facts:
        told.append(f"torch {facts['packages']['torch']}")
    if "commit" in facts:
        told.append(f"commit {facts['commit']}")
    if "command" in facts:
        told.append(f"`{facts['command']}`")
    link = f"[{name}](tests/benchmarks/results/{name}.{_readable(name, folder)})"
    return f"{link}: {'; '.join(told)}." if told else f"{link}."


def _readable(name: str, folder: Path) -> str:
    return "md" if (folder / f"{name}.md").is_file() else "json"


def _picture(name: str, folder: Path, shows: str) -> list[str]:
    """The picture that is committed beside a result, if any."""
    if not (folder / f"{name}.png").is_file():
        return []
    return [f"![{shows}](tests/benchmarks/results/{name}.png)", ""]


def text_to_3d_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Scenes from words against the truth."""
    shows = "Renders above the truth, for every prompt"
    return [
        "**Scenes from words, against the truth** (PSNR in dB; white: an empty white image).",
        _source(name, report, folder),
        "",
        *group_table(report),
        "",
        *threshold_table(report),
        "",
        *_picture(name, folder, shows),
    ]


def text_to_4d_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Moving scenes from words against the truth."""
    shows = "Renders above the truth, time to the right, for every prompt"
    return [
        "**Moving scenes from words, against the truth** (PSNR in dB over 8 cameras and 16 times; "
        "best static: the best picture that does not move; stage 1: the scene before it moved).",
        _source(name, report, folder),
        "",
        *text_to_4d_report.group_table(report),
        "",
        *threshold_table(report),
        "",
        *_picture(name, folder, shows),
    ]


def sample_multiview_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """The embedded multi-view prior, sampled and compared with the truth."""
    lines = [
        f"**The embedded prior alone**, sampled for held-out captions ({report['sampler']}).",
        _source(name, report, folder),
        "",
        "| objects | required mean PSNR, dB | measured | reached |",
        "|---|---|---|---|",
    ]
    for count, required in SAMPLING_BOUNDS_DB.items():
        value = report["means"][count]
        reached = "yes" if value >= required else "**no**"
        lines.append(f"| {count} | >= {required} | {value:.2f} | {reached} |")
    return [*lines, ""]


def sample_edit_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """The embedded edit model, sampled and compared with the truth."""
    lines = [
        f"**The embedded edit model alone**, on single images ({report['sampler']}).",
        _source(name, report, folder),
        "",
        "| edits | mean PSNR, dB | of the unedited images |",
        "|---|---|---|",
    ]
    for group, value in report["means"].items():
        lines.append(f"| {group} | {value:.2f} | {report['unedited'][group]:.2f} |")
    return [*lines, ""]


def edit_4d_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Edited scenes against the true edited world."""
    shows = "Original, edited and truth, time to the right, whole and frame by frame"
    return [
        "**Moving scenes edited by a sentence, against the true edited world** (PSNR in dB on the "
        "held-out camera over 16 times; the ratios are explained in the linked file).",
        _source(name, report, folder),
        "",
        *threshold_table(report),
        "",
        *edit_4d_report.ablation_table(report),
        "",
        *_picture(name, folder, shows),
    ]


def time_view_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Time and view control against the truth."""
    shows = "Generated cells above the truth, time to the right, from two views"
    return [
        "**Time and view of a frozen image model, against the truth** (PSNR in dB over unseen "
        "cells; methods and errors are explained in the linked file).",
        _source(name, report, folder),
        "",
        *threshold_table(report),
        "",
        *time_view_report.method_table(report),
        "",
        *_picture(name, folder, shows),
    ]


def time_view_ablations_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Variants of time and view control."""
    return [
        "**Variants of time and view control**, on one scene.",
        _source(name, report, folder),
        "",
        *time_view_report.run_table(report["runs"], "variant"),
        "",
    ]


def stage_1_step_lines(name: str, report: dict[str, Any], folder: Path) -> list[str]:
    """Speed of a training step and its parts."""
    tables = report["milliseconds"]
    lines = [
        "**One training step of stage 1, profile embedded.**",
        _source(name, report, folder),
        "",
        "| | steps/s | rendering | guidance | optimizer | the rest |",
        "|---|---|---|---|---|---|",
    ]
    for title, table in tables.items():
        total = table["total"]
        shares = [
            sum(value for part, value in table.items() if part.startswith(kind)) / total
            for kind in ("rendering", "guidance", "optimizer")
        ]
        cells = [f"{share:.0%}" for share in (*shares, 1 - sum(shares))]
        lines.append(f"| {title} | {1e3 / total:.2f} | {' | '.join(cells)} |")
    return [*lines, ""]


SECTIONS = {
    "text_to_3d": text_to_3d_lines,
    "text_to_4d": text_to_4d_lines,
    "edit_4d": edit_4d_lines,
    "time_view": time_view_lines,
    "time_view_ablations": time_view_ablations_lines,
    "sample_multiview": sample_multiview_lines,
    "sample_edit": sample_edit_lines,
    "stage_1_step": stage_1_step_lines,
}


def figures(folder: Path = RESULTS) -> str:
    """Return the README's tables."""
    lines: list[str] = []
    for kind, section in SECTIONS.items():
        result = newest(kind, folder)
        if result is not None:
            lines += section(*result, folder)
    return "\n".join(lines or [NOTHING, ""])


def with_figures(readme: str, text: str) -> str:
    """Return the README with everything between the marks replaced.

    Raises:
        ValueError: the marks are missing.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"README.md lacks the lines '{BEGIN}' and '{END}'; put them back.")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    parser.add_argument("--check", action="store_true", help="fail if README.md holds others")
    arguments = parser.parse_args()
    text = figures()
    if not (arguments.write or arguments.check):
        print(text)
        return
    readme = README.read_text(encoding="utf-8")
    wanted = with_figures(readme, text)
    if arguments.write:
        README.write_text(wanted, encoding="utf-8")
    elif wanted != readme:
        raise SystemExit("README.md is not what the results say; run report.py --write.")


if __name__ == "__main__":
    main()
