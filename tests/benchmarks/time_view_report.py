"""Summary and Markdown report of the benchmark of time and view control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from text_to_3d_report import threshold_table, verdicts

PROTOCOLS = {
    "time": "fixed view, varying time",
    "view": "varying view, fixed time",
    "both": "both varying",
}
METHODS = {
    "copy": "copy of the source",
    "image_only": "image prompt alone",
    "control_only": "controls alone",
    "oracle": "oracle token",
    "ours": "ours",
}
IMAGE_FIGURES = (("psnr", ".2f"), ("psnr_masked", ".2f"), ("ssim", ".3f"), ("ssim_masked", ".3f"))
OURS = "ours"
LEAST_REVERSAL, LEAST_IDENTITY_DB = 0.5, 20.0
"""What "reverses the motion" and "reproduces the source" mean here: a correlation of the change
with the truth's, and a PSNR."""

Row = Mapping[str, Any]
Rows = Sequence[Row]


def figure(row: Row, protocol: str, name: str, method: str = OURS) -> float | None:
    """A figure of one run."""
    key = name if method == OURS else f"{method}_{name}"
    return row["protocols"].get(protocol, {}).get(key)


def above_copy(row: Row, protocol: str) -> float | None:
    """PSNR above that of the source left as it is, in dB."""
    ours, copied = (figure(row, protocol, "psnr", method) for method in (OURS, "copy"))
    return None if ours is None or copied is None else ours - copied


def reversal(row: Row, control: str) -> float | None:
    """How turning the sign of a control follows the truth, in [-1, 1]."""
    return ((row.get("reversal") or {}).get(control) or {}).get("correlation")


def mean_of(values: Sequence[float | None]) -> float | None:
    """Mean of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def extreme(of: Callable[..., float], values: Sequence[float | None]) -> float | None:
    """Largest or smallest of what is known; None of nothing."""
    known = [value for value in values if value is not None]
    return of(known) if known else None


def summarise(rows: Rows) -> dict[str, Any]:
    """Return the table of methods, and every requirement with whether it is reached."""
    return {
        "methods": method_means(rows),
        "thresholds": thresholds(rows),
        "goals": goals(rows),
    }


def method_means(rows: Rows) -> list[dict[str, Any]]:
    """Means over the scenes, a row for each protocol and method that ran."""
    table = []
    for protocol in PROTOCOLS:
        for method in METHODS:
            names = [name for name, _ in IMAGE_FIGURES] + ["time_error_frames", "angle_error_deg"]
            values = {n: mean_of([figure(r, protocol, n, method) for r in rows]) for n in names}
            if values["psnr"] is not None:
                rounded = {n: None if v is None else round(v, 4) for n, v in values.items()}
                table.append({"protocol": protocol, "method": method, **rounded})
    return table


def control_error(rows: Rows, name: str) -> float | None:
    """Mean over the scenes of an error over all pairs in which the control varies."""
    return mean_of([row["control"].get(name) for row in rows])


def thresholds(rows: Rows) -> list[dict[str, Any]]:
    """Return name, limit, value and `reached` of every requirement that the rows can answer."""
    table = [
        (f"{name}: mean PSNR above the copied source, dB", ">=", 3.0,
         mean_of([above_copy(row, protocol) for row in rows]))
        for protocol, name in PROTOCOLS.items()
    ]  # fmt: skip
    table += [
        ("mean time error, frames of 16", "<=", 1.5, control_error(rows, "time_error_frames")),
        ("mean azimuth error, degrees", "<=", 20.0, control_error(rows, "angle_error_deg")),
    ]
    table += [
        (f"turned sign of {control}: lowest correlation with the truth's change", ">=",
         LEAST_REVERSAL, extreme(min, [reversal(row, control) for row in rows]))
        for control in ("time", "view")
    ]  # fmt: skip
    table += [
        ("identity cell: mean PSNR against the source, dB", ">=", LEAST_IDENTITY_DB,
         mean_of([(row.get("identity") or {}).get("psnr") for row in rows])),
        ("longest training of a scene, s", "<=", 1500.0,
         extreme(max, [row.get("seconds") for row in rows])),
    ]  # fmt: skip
    return verdicts(table)


def goals(rows: Rows) -> list[dict[str, Any]]:
    """Return what lies beyond the requirements, in the same form."""
    table = [
        (f"{name}: mean PSNR above the copied source, dB", ">=", 6.0,
         mean_of([above_copy(row, protocol) for row in rows]))
        for protocol, name in PROTOCOLS.items()
    ]  # fmt: skip
    table += [
        ("mean time error, frames of 16", "<=", 0.8, control_error(rows, "time_error_frames")),
        ("mean azimuth error, degrees", "<=", 8.0, control_error(rows, "angle_error_deg")),
    ]
    return verdicts(table)


# What is written


def method_table(report: Mapping[str, Any]) -> list[str]:
    """Return the means of all methods as a Markdown table."""
    lines = [
        "| protocol | method | PSNR | masked | SSIM | masked | time error, frames | azimuth error, "
        "deg |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["methods"]:
        cells = [number(row[name], how) for name, how in IMAGE_FIGURES]
        cells += [number(row["time_error_frames"], ".2f"), number(row["angle_error_deg"], ".1f")]
        names = f"{PROTOCOLS[row['protocol']]} | {METHODS[row['method']]}"
        lines.append(f"| {names} | {' | '.join(cells)} |")
    return lines


def run_table(rows: Rows, first: str = "scene") -> list[str]:
    """Return every run as a Markdown table.

    Args:
        first: what a run is called by: its scene, or its variant.
    """
    lines = [
        f"| {first} | held out | time: above copy, dB | view | both | PSNR, both | time error "
        "| azimuth error | turned time | turned view | identity | training, s | in all, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        control = row["control"]
        cells = [number(above_copy(row, protocol), "+.2f") for protocol in PROTOCOLS]
        cells += [
            number(figure(row, "both", "psnr"), ".2f"),
            number(control.get("time_error_frames"), ".2f"),
            number(control.get("angle_error_deg"), ".1f"),
            number(reversal(row, "time"), ".2f"),
            number(reversal(row, "view"), ".2f"),
            number((row.get("identity") or {}).get("psnr"), ".2f"),
            number(row.get("seconds"), ".0f"),
            number(row.get("wall_seconds"), ".0f"),
        ]
        held = "yes" if row["held_out"] else "no"
        lines.append(f"| {row[first]} | {held} | {' | '.join(cells)} |")
    return lines


def number(value: float | None, how: str) -> str:
    """A figure of a table; a dash where it is unknown."""
    return "-" if value is None else format(value, how)


def markdown(report: Mapping[str, Any], circumstances: Sequence[str]) -> str:
    """Return the whole report, of scenes or of variants."""
    date, of_variants = report["circumstances"]["date"], report["benchmark"].endswith("ablations")
    title = "Variants of time and view control" if of_variants else "Time and view control"
    lines = [
        f"# {title}, against the truth, {date}",
        "",
        *circumstances,
        f"- runs at a time: {report['jobs']}",
        f"- runs: {len(report['runs'])} of {report['planned_runs']}",
        f"- scored: {report['scored']}",
        "- copy: the source left as it is; image prompt alone: no controls; controls alone: no",
        "  image prompt; oracle token: a token fitted to each target (of a few targets)",
        f"- time and azimuth errors: of the nearest true image by {report['feature_space']}; true",
        "  images that look alike count as one",
        "- turned: how the difference between images with a control and with its reverse follows",
        "  the true one (1 as the truth, 0 no reaction)",
        *(f"- {name} is absent: {why}" for name, why in report["absent"].items()),
        "",
    ]
    if not of_variants:
        lines += [*threshold_table(report), "", "Goals beyond:", ""]
        lines += [*threshold_table({"thresholds": report["goals"]}), "", *method_table(report), ""]
    lines += run_table(report["runs"], "variant" if of_variants else "scene")
    return "\n".join(lines) + "\n"
