"""Summary and Markdown report of the editing benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from text_to_3d_report import threshold_table, verdicts

VARIANTS = ("full", "no flow", "no depth", "frame by frame")
FULL, FRAME_BY_FRAME = VARIANTS[0], VARIANTS[-1]
LOOKS, SHAPES, SEVERAL = "look", "shape", "several answers"

Row = Mapping[str, Any]
Rows = Sequence[Row]
COLUMNS = (
    ("psnr", ".2f"), ("psnr_unedited", ".2f"), ("temporal_error_ratio", ".2f"),
    ("view_error_ratio", ".2f"), ("edits_temporal_ratio", ".2f"), ("edit_seconds", ".0f"),
    ("wall_seconds", ".0f"),
)  # fmt: skip
HEADINGS = (
    "PSNR", "unedited", "along time / truth", "between cameras / truth",
    "edits along time / truth", "editing, s", "in all, s",
)  # fmt: skip


def mean(rows: Rows, value: str) -> float | None:
    """Return the mean over the rows that have the value; None without any."""
    values = [row[value] for row in rows if row.get(value) is not None]
    return sum(values) / len(values) if values else None


def of_variant(rows: Rows, variant: str) -> list[Row]:
    """Return the rows of one variant."""
    return [row for row in rows if row["variant"] == variant]


def of_group(rows: Rows, group: str) -> list[Row]:
    """Return the rows whose edits are of a group: `LOOKS`, `SHAPES` or `SEVERAL`."""
    return [row for row in rows if row["group"] == group]


def summarise(fits: Rows, edits: Rows) -> dict[str, Any]:
    """Return means by variant and group, and every requirement with whether it is reached."""
    table = []
    for variant in VARIANTS:
        for group in (LOOKS, SHAPES, SEVERAL):
            rows = of_group(of_variant(edits, variant), group)
            if rows:
                values = {name: mean(rows, name) for name, _ in COLUMNS}
                rounded = {n: None if v is None else round(v, 4) for n, v in values.items()}
                table.append({"variant": variant, "group": group, "runs": len(rows), **rounded})
    return {
        "ablations": table,
        "thresholds": thresholds(fits, edits),
        "goals": goals(edits),
    }


def thresholds(fits: Rows, edits: Rows) -> list[dict[str, Any]]:
    """Return name, limit, value and `reached` of every requirement that the rows can answer."""
    full = of_variant(edits, FULL)
    worst = [_extreme(max, full, name) for name in ("temporal_error_ratio", "view_error_ratio")]
    return verdicts([row for row in (
        ("fitted field on the held-out camera: lowest PSNR, dB", ">=", 27.0,
         _extreme(min, fits, "psnr")),
        ("colour and style edits: mean PSNR, dB", ">=", 21.0, mean(of_group(full, LOOKS), "psnr")),
        ("shape edits: mean PSNR, dB", ">=", 19.0, mean(of_group(full, SHAPES), "psnr")),
        ("error along time over the truth's: highest", "<=", 1.3, worst[0]),
        ("error between cameras over the truth's: highest", "<=", 1.3, worst[1]),
        ("several answers: edits' error along time, frame by frame over full", ">=", 1.5,
         several_answers_ratio(edits)),
        ("exact edits: best variant's mean PSNR above full, dB", "<=", 0.5, behind_best(edits)),
        ("longest fit and edit of a scene, s", "<=", 1500.0, longest(full)),
    ) if row[3] is not None])  # fmt: skip


def goals(edits: Rows) -> list[dict[str, Any]]:
    """Return what lies beyond the requirements, in the same form."""
    exact = [row for row in of_variant(edits, FULL) if row["group"] != SEVERAL]
    return verdicts([
        ("exact edits: mean PSNR, dB", ">=", 25.0, mean(exact, "psnr")),
        ("exact edits, held out: mean PSNR, dB", ">=", 25.0,
         mean([row for row in exact if row["held_out"]], "psnr")),
    ])  # fmt: skip


def several_answers_ratio(edits: Rows) -> float | None:
    """Return how much less frames agree along time that were edited one by one.

    Where a sentence has several answers; measured on the edited frames of the training cameras,
    before a field averages them. Only instructions that both variants have run count.
    """
    rows = of_group(edits, SEVERAL)
    alone, full = (_by_edit(of_variant(rows, variant)) for variant in (FRAME_BY_FRAME, FULL))
    both = [edit for edit in full if edit in alone]
    if not both:
        return None
    error = "edits_temporal_error"
    return sum(alone[e][error] for e in both) / sum(full[e][error] for e in both)


def behind_best(edits: Rows) -> float | None:
    """Return how far, in dB, the best variant's mean PSNR over exact edits is above full's.

    Over the instructions that every variant has run; None without any.
    """
    exact = [row for row in edits if row["group"] != SEVERAL]
    found = {variant: _by_edit(of_variant(exact, variant)) for variant in VARIANTS}
    common = set.intersection(*(set(rows) for rows in found.values()))
    if not common:
        return None
    means = {v: sum(rows[e]["psnr"] for e in common) / len(common) for v, rows in found.items()}
    return max(means.values()) - means[FULL]


def longest(rows: Rows) -> float | None:
    """Return the most seconds that fitting a scene and editing it once took together."""
    times = [row["fit_wall_seconds"] + row["wall_seconds"] for row in rows]
    return max(times) if times else None


def _by_edit(rows: Rows) -> dict[tuple[str, str], Row]:
    return {(row["caption"], row["instruction"]): row for row in rows}


def _extreme(of: Callable[..., float], rows: Rows, value: str) -> float | None:
    values = [row[value] for row in rows if row.get(value) is not None]
    return of(values) if values else None


# What is written


def fit_table(fits: Rows) -> list[str]:
    """Return the fitted scenes as a Markdown table."""
    lines = [
        "| scene | held out | PSNR | best static | SSIM | depth error | training, s | in all, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in fits:
        lines.append(
            f"| {row['caption']} | {_yes(row['held_out'])} | {row['psnr']:.2f} "
            f"| {row['psnr_best_static']:.2f} | {row['ssim']:.3f} | {row['depth_error']:.1%} "
            f"| {row['seconds']:.0f} | {row['wall_seconds']:.0f} |"
        )
    return lines


def ablation_table(report: Mapping[str, Any]) -> list[str]:
    """Return means by variant and group as a Markdown table."""
    lines = [
        f"| variant | edits | runs | {' | '.join(HEADINGS)} |",
        "|---|---|---|" + "---|" * len(HEADINGS),
    ]
    for row in report["ablations"]:
        lines.append(f"| {row['variant']} | {row['group']} | {row['runs']} | {_cells(row)} |")
    return lines


def run_table(rows: Rows) -> list[str]:
    """Return every edit as a Markdown table."""
    lines = [
        f"| scene | instruction | held out | variant | {' | '.join(HEADINGS)} |",
        "|---|---|---|---|" + "---|" * len(HEADINGS),
    ]
    for row in rows:
        lines.append(
            f"| {row['caption']} | {row['instruction']} | {_yes(row['held_out'])} "
            f"| {row['variant']} | {_cells(row)} |"
        )
    return lines


def _cells(row: Row) -> str:
    cells = ["-" if row.get(n) is None else format(row[n], how) for n, how in COLUMNS]
    return " | ".join(cells)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def markdown(report: Mapping[str, Any], circumstances: Sequence[str]) -> str:
    """Return the whole report."""
    date = report["circumstances"]["date"]
    lines = [
        f"# Editing moving scenes, against the true edited world, {date}",
        "",
        *circumstances,
        f"- runs at a time: {report['jobs']}",
        f"- edits: {len(report['edits'])} of {report['planned_edits']}",
        f"- views: {report['views']}",
        "- PSNR: of the edited field on the held-out camera over all times, against the true",
        "  edited world; where several answers are right, the nearest one; unedited: of the frames",
        "- along time, between cameras: how much renders of neighbouring times and cameras differ",
        "  where the truth says that they show the same surface, over what the truth itself does;",
        "  edits along time: the same of the edited frames of the training cameras",
        "- full: the release's order; no flow, no depth: without these warps; frame by frame:",
        "  every frame alone, without anchor",
        "",
        *threshold_table(report),
        "",
        "Goals beyond:",
        "",
        *threshold_table({"thresholds": report["goals"]}),
        "",
        *ablation_table(report),
        "",
        *fit_table(report["fits"]),
        "",
        *run_table(report["edits"]),
    ]
    return "\n".join(lines) + "\n"
