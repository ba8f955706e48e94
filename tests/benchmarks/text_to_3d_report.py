"""Summary, Markdown report and contact sheet of the text-to-3D benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_SHEET_BYTES = 1_500_000
SHEET_CELLS_PX = (128, 112, 96, 80, 64)
VIEWS_PER_STRIP = 8

Rows = Sequence[Mapping[str, Any]]


def per_prompt(rows: Rows, value: str) -> list[float]:
    """Return one value per prompt, the mean over its seeds."""
    grouped: dict[str, list[float]] = {}
    for row in rows:
        grouped.setdefault(row["prompt"], []).append(row[value])
    return [sum(values) / len(values) for values in grouped.values()]


def mean(rows: Rows, value: str) -> float | None:
    """Return the mean over prompts of the means over seeds; None without rows."""
    values = per_prompt(rows, value)
    return round(sum(values) / len(values), 4) if values else None


def summarise(rows: Rows) -> dict[str, Any]:
    """Return means and worst runs by group, and every threshold with whether it is reached.

    Values of a run are means over its views; the ``*_min`` ones are of its lowest view.
    """
    one = [row for row in rows if row["objects"] == 1]
    two = [row for row in rows if row["objects"] == 2]
    groups = {
        "one object": one,
        "two objects": two,
        "one object, seen": [row for row in one if not row["held_out"]],
        "one object, held out": [row for row in one if row["held_out"]],
        "two objects, seen": [row for row in two if not row["held_out"]],
        "two objects, held out": [row for row in two if row["held_out"]],
    }
    return {
        "groups": {name: _group(group) for name, group in groups.items() if group},
        "seed_spread_db": _seed_spread(rows),
        "thresholds": thresholds(rows, groups),
    }


def _group(rows: Rows) -> dict[str, Any]:
    means = ("psnr", "psnr_white", "psnr_object", "psnr_object_white", "ssim", "alpha_iou")
    times = ("psnr_wrong_prompt", "seconds", "steps_per_second", "wall_seconds", "peak_memory_gb")
    return {
        "prompts": len({row["prompt"] for row in rows}),
        "runs": len(rows),
        **{name: mean(rows, name) for name in (*means, *times)},
        "psnr_worst_run": min(row["psnr"] for row in rows),
        "psnr_worst_view": min(row["psnr_min"] for row in rows),
        "alpha_iou_worst_run": min(row["alpha_iou"] for row in rows),
        "alpha_iou_worst_view": min(row["alpha_iou_min"] for row in rows),
    }


def _seed_spread(rows: Rows) -> dict[str, float]:
    """Largest minus smallest PSNR over the seeds of each prompt that has several."""
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row["prompt"], []).append(row["psnr"])
    return {p: round(max(v) - min(v), 2) for p, v in values.items() if len(v) > 1}


def thresholds(rows: Rows, groups: Mapping[str, Rows]) -> list[dict[str, Any]]:
    """Return name, limit, value and `reached` of every requirement that the rows can answer."""
    one, two = groups["one object"], groups["two objects"]

    def above_white(group: Rows) -> float | None:
        return None if not group else mean(group, "psnr") - mean(group, "psnr_white")

    def behind(name: str) -> float | None:
        seen, held = groups[f"{name}, seen"], groups[f"{name}, held out"]
        return None if not (seen and held) else mean(seen, "psnr") - mean(held, "psnr")

    def lowest(group: Rows, name: str) -> float | None:
        return min((row[name] for row in group), default=None)

    margin = min((row["psnr"] - row["psnr_wrong_prompt"] for row in rows), default=None)
    slowest = max((row["seconds"] for row in rows), default=None)
    table = [
        ("one object: mean PSNR, dB", ">=", 24.0, mean(one, "psnr")),
        ("one object: mean PSNR above the white image, dB", ">=", 14.0, above_white(one)),
        ("one object: worst PSNR, dB", ">=", 19.0, lowest(one, "psnr")),
        ("two objects: mean PSNR, dB", ">=", 21.0, mean(two, "psnr")),
        ("two objects: worst PSNR, dB", ">=", 17.0, lowest(two, "psnr")),
        ("mean silhouette IoU", ">=", 0.93, mean(rows, "alpha_iou")),
        ("worst silhouette IoU", ">=", 0.86, lowest(rows, "alpha_iou")),
        ("one object: held-out behind seen, dB", "<=", 2.0, behind("one object")),
        ("two objects: held-out behind seen, dB", "<=", 2.0, behind("two objects")),
        ("right prompt above a wrong one, worst run, dB", ">=", 4.0, margin),
        ("longest training, s", "<=", 300.0, slowest),
    ]
    return verdicts(table)


def verdicts(table: Sequence[tuple[str, str, float, float | None]]) -> list[dict[str, Any]]:
    """Return (name, ">=" or "<=", limit, value) as rows that say what is reached."""
    return [
        {
            "name": name,
            "limit": f"{sign} {limit:g}",
            "value": round(value, 3),
            "reached": value >= limit if sign == ">=" else value <= limit,
        }
        for name, sign, limit, value in table
        if value is not None
    ]


def threshold_table(report: Mapping[str, Any]) -> list[str]:
    """Return the thresholds as a Markdown table."""
    lines = ["| measure | required | measured | reached |", "|---|---|---|---|"]
    for row in report["thresholds"]:
        reached = "yes" if row["reached"] else "**no**"
        lines.append(f"| {row['name']} | {row['limit']} | {row['value']:.2f} | {reached} |")
    return lines


def group_table(report: Mapping[str, Any]) -> list[str]:
    """Return means and worst runs by group as a Markdown table."""
    lines = [
        "| group | runs | PSNR | white | in the object | white there | SSIM | IoU | worst PSNR "
        "| worst IoU | training, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in report["groups"].items():
        lines.append(
            f"| {name} | {row['runs']} | {row['psnr']:.2f} | {row['psnr_white']:.2f} "
            f"| {row['psnr_object']:.2f} | {row['psnr_object_white']:.2f} | {row['ssim']:.3f} "
            f"| {row['alpha_iou']:.3f} | {row['psnr_worst_run']:.2f} "
            f"| {row['alpha_iou_worst_run']:.3f} | {row['seconds']:.0f} |"
        )
    return lines


def run_table(report: Mapping[str, Any]) -> list[str]:
    """Return every run as a Markdown table."""
    lines = [
        "| prompt | seed | held out | PSNR | white | in the object | wrong prompt | SSIM | IoU "
        "| lowest view | s | steps/s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in report["runs"]:
        held = "yes" if row["held_out"] else "no"
        lines.append(
            f"| {row['prompt']} | {row['seed']} | {held} | {row['psnr']:.2f} "
            f"| {row['psnr_white']:.2f} | {row['psnr_object']:.2f} "
            f"| {row['psnr_wrong_prompt']:.2f} | {row['ssim']:.3f} | {row['alpha_iou']:.3f} "
            f"| {row['psnr_min']:.2f} | {row['seconds']:.0f} | {row['steps_per_second']:.2f} |"
        )
    return lines


def markdown(report: Mapping[str, Any], circumstances: Sequence[str]) -> str:
    """Return the whole report."""
    lines = [
        f"# Text to 3D against the truth, {report['circumstances']['date']}",
        "",
        *circumstances,
        f"- trainings at a time: {report['jobs']}",
        f"- runs: {len(report['runs'])} of {report['planned_runs']}",
        f"- views: {report['views']}",
        "- a run's value is the mean over its views; a mean is over prompts, each the mean of its",
        "  seeds; worst means the worst run; all values are those of the last step",
        "- white: the value of an empty white image; in the object: inside the dilated union of",
        "  both silhouettes; wrong prompt: the same renders against the truth of a prompt with",
        "  every object's colour and shape changed",
        "",
        *threshold_table(report),
        "",
        *group_table(report),
        "",
        *run_table(report),
    ]
    if report["seed_spread_db"]:
        spread = ", ".join(f"{p}: {v:.2f}" for p, v in report["seed_spread_db"].items())
        lines += ["", f"PSNR over seeds, largest minus smallest, dB: {spread}."]
    return "\n".join(lines) + "\n"


def _fitted(image: Any, width: int, height: int) -> Any:
    """The picture at that height, white to the right where it has fewer cells than others."""
    import cv2
    import numpy as np

    own = min(width, round(image.shape[1] * height / image.shape[0]))
    whole = np.full((height, width, 3), 255, np.uint8)
    whole[:, :own] = cv2.resize(image, (own, height), interpolation=cv2.INTER_AREA)
    return whole


def write_contact_sheet(path: Path, strips: Mapping[str, Path], strip_rows: int = 2) -> None:
    """Join the strips of all prompts in two columns, as large as the size limit allows.

    Args:
        path: PNG to write.
        strips: prompt to its picture, rows of renders, each above a row of truth.
        strip_rows: rows of a picture, those of the truth included.
    """
    import cv2
    import numpy as np

    for cell_px in SHEET_CELLS_PX:
        blocks = []
        for prompt, strip in strips.items():
            image = cv2.imread(str(strip))
            if image is None:
                raise ValueError(f"{strip} is no readable picture; delete its line and run again.")
            image = _fitted(image, cell_px * VIEWS_PER_STRIP, cell_px * strip_rows)
            label = np.full((18, image.shape[1], 3), 255, np.uint8)
            font = cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(label, prompt, (4, 13), font, 0.42, (0, 0, 0), 1, cv2.LINE_AA)
            blocks.append(np.concatenate([label, image]))
        if len(blocks) % 2:
            blocks.append(np.full_like(blocks[0], 255))
        half = len(blocks) // 2
        columns = [np.concatenate(blocks[:half]), np.concatenate(blocks[half:])]
        written, data = cv2.imencode(
            ".png", np.concatenate(columns, axis=1), [cv2.IMWRITE_PNG_COMPRESSION, 9]
        )
        if written and len(data) <= LARGEST_SHEET_BYTES:
            break
    path.write_bytes(data.tobytes())
