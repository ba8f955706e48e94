"""Summary and Markdown report of the text-to-4D benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from text_to_3d_report import threshold_table, verdicts

LARGE_MOTION_DB = 20.0
"""A prompt whose best static picture is below this moves so much that motion must gain."""
LEAST_CORRELATION, LEAST_CORRELATION_OF_SPIN = 0.8, 0.7

Rows = Sequence[Mapping[str, Any]]


def mean(rows: Rows, value: str) -> float | None:
    """Return the mean over the rows that have the value; None without any."""
    values = [row[value] for row in rows if row[value] is not None]
    return sum(values) / len(values) if values else None


def gain(row: Mapping[str, Any]) -> float:
    """Return how far, in dB, a moving scene is above the best static picture."""
    return row["psnr"] - row["psnr_best_static"]


def by_motion(rows: Rows) -> dict[str, dict[str, float]]:
    """Return the mean correlation and amplitude ratio of every motion word."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        for word, values in row["motion"].items():
            lists = found.setdefault(word, {"correlation": [], "amplitude_ratio": []})
            for name, value in values.items():
                if value is not None:
                    lists[name].append(value)
    return {
        word: {name: sum(v) / len(v) for name, v in lists.items() if v}
        for word, lists in found.items()
    }


def summarise(rows: Rows) -> dict[str, Any]:
    """Return means by group and by motion, and every requirement with whether it is reached."""
    groups = {
        "all": rows,
        "seen": [row for row in rows if not row["held_out"]],
        "held out": [row for row in rows if row["held_out"]],
        "one object": [row for row in rows if row["objects"] == 1],
        "two objects": [row for row in rows if row["objects"] == 2],
    }
    return {
        "groups": {name: _group(group) for name, group in groups.items() if group},
        "motions": by_motion(rows),
        "thresholds": thresholds(rows),
        "goals": goals(rows),
    }


def _group(rows: Rows) -> dict[str, Any]:
    values = ("psnr", "psnr_best_static", "psnr_stage_1", "psnr_white", "alpha_iou", "correlation",
              "amplitude_ratio", "seconds_stage_1", "seconds_stage_3", "wall_seconds")  # fmt: skip
    found = {name: mean(rows, name) for name in values}
    rounded = {name: None if value is None else round(value, 4) for name, value in found.items()}
    return {"runs": len(rows), **rounded}


def thresholds(rows: Rows) -> list[dict[str, Any]]:
    """Return name, limit, value and `reached` of every requirement that the rows can answer."""
    large = [gain(row) for row in rows if row["psnr_best_static"] < LARGE_MOTION_DB]
    small = [gain(row) for row in rows if row["psnr_best_static"] >= LARGE_MOTION_DB]
    ratios = [row["amplitude_ratio"] for row in rows if row["amplitude_ratio"] is not None]
    table = [
        (f"above the best static picture, where that is below {LARGE_MOTION_DB:g} dB: mean, dB",
         ">=", 2.0, _or_none(lambda v: sum(v) / len(v), large)),
        ("above the best static picture elsewhere: lowest, dB", ">=", 0.0, _or_none(min, small)),
        ("mean PSNR, dB", ">=", 19.0, mean(rows, "psnr")),
        ("mean correlation of the motion", ">=", 0.9, mean(rows, "correlation")),
    ]  # fmt: skip
    for word, values in by_motion(rows).items():
        least = LEAST_CORRELATION_OF_SPIN if word == "spinning" else LEAST_CORRELATION
        table.append((f"correlation, {word}", ">=", least, values.get("correlation")))
    table += [
        ("lowest amplitude ratio", ">=", 0.7, _or_none(min, ratios)),
        ("highest amplitude ratio", "<=", 1.4, _or_none(max, ratios)),
        ("longest run from words to evaluated scene, s", "<=", 1200.0,
         _or_none(max, [row["wall_seconds"] for row in rows])),
    ]  # fmt: skip
    return verdicts(table)


def goals(rows: Rows) -> list[dict[str, Any]]:
    """Return what lies beyond the requirements, in the same form."""
    longest = _or_none(max, [row["wall_seconds"] for row in rows])
    return verdicts([
        ("mean PSNR, dB", ">=", 24.0, mean(rows, "psnr")),
        ("longest run from words to evaluated scene, s", "<=", 600.0, longest),
    ])  # fmt: skip


def _or_none(of: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return of(values) if values else None


def group_table(report: Mapping[str, Any]) -> list[str]:
    """Return means by group as a Markdown table."""
    lines = [
        "| group | runs | PSNR | best static | stage 1 | white | IoU | correlation | amplitude "
        "| stage 1, s | stage 3, s | in all, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["groups"].items():
        lines.append(f"| {name} | {row['runs']} | {_measures(row)} | {_seconds(row)} |")
    return lines


def run_table(report: Mapping[str, Any]) -> list[str]:
    """Return every run as a Markdown table."""
    lines = [
        "| prompt | held out | PSNR | best static | stage 1 | white | IoU | correlation "
        "| amplitude | stage 1, s | stage 3, s | in all, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        kinds = [kind for kind in ("appearance", "motion") if row[f"held_out_{kind}"]]
        held = ", ".join(kinds) or "no"
        lines.append(f"| {row['prompt']} | {held} | {_measures(row)} | {_seconds(row)} |")
    return lines


def _measures(row: Mapping[str, Any]) -> str:
    formats = {"psnr": ".2f", "psnr_best_static": ".2f", "psnr_stage_1": ".2f",
               "psnr_white": ".2f", "alpha_iou": ".3f", "correlation": ".2f",
               "amplitude_ratio": ".2f"}  # fmt: skip
    cells = ["-" if row[n] is None else format(row[n], how) for n, how in formats.items()]
    return " | ".join(cells)


def _seconds(row: Mapping[str, Any]) -> str:
    names = ("seconds_stage_1", "seconds_stage_3", "wall_seconds")
    return " | ".join(f"{row[name]:.0f}" for name in names)


def markdown(report: Mapping[str, Any], circumstances: Sequence[str]) -> str:
    """Return the whole report."""
    # Imported here, so that this module stands alone for report.py as well.
    lines = [
        f"# Text to 4D against the truth, {report['circumstances']['date']}",
        "",
        *circumstances,
        f"- trainings at a time: {report['jobs']}",
        f"- runs: {len(report['runs'])} of {report['planned_runs']}",
        f"- views: {report['views']}",
        "- a run's PSNR and IoU are means over views and times; best static: each view's mean over",
        "  the truth's times; stage 1: the scene before it moved; white: an empty white image",
        "- correlation and amplitude: of the silhouette's centroid (bouncing, sliding, orbiting),",
        "  its area (growing, shrinking) or the change of the image (spinning) with the truth's",
        "",
        *threshold_table(report),
        "",
        "Goals beyond:",
        "",
        *threshold_table({"thresholds": report["goals"]}),
        "",
        *group_table(report),
        "",
        *run_table(report),
    ]
    return "\n".join(lines) + "\n"
