"""The page of calibration: its tables, made of the rows of calibrated.csv."""

import json
import statistics
from collections.abc import Sequence
from itertools import combinations

from .calibrated import TEACHERS
from .claims import Row
from .rows import CALIBRATED, rows_of


def method_table(teacher: str) -> str:
    """Return every plan of a teacher: time, summed and measured errors, likeness; of single kinds the best by error."""
    rows = [row for row in rows_of(CALIBRATED) if row["teacher"] == teacher and row["calibration"] == "0"]
    if not rows:
        return "Not measured yet."
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    lines = ["| plan | time | summed | error | spread | psnr | ssim |", "|---|---:|---:|---:|---:|---:|---:|"]
    for method, found in sorted(by_method.items(), key=lambda each: -_mean(each[1], "error")):
        errors = [float(row["error"]) for row in found]
        cells = [
            method, f"{float(found[0]['time_share']):.1%}".replace("%", " %"), f"{float(found[0]['summed']):.3f}",
            f"{statistics.fmean(errors):.5f}", f"{max(errors) - min(errors):.5f}",
            f"{_mean(found, 'psnr'):.1f}", f"{_mean(found, 'ssim'):.3f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def calibrations_table() -> str:
    """Return what several calibrations of one model chose: time, errors, agreement, and what each took."""
    lines = [
        "| on | calibration | time | error checked | error on other captions | a step, s (dense) | took, s | steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for teacher in TEACHERS:
        rows = _usual(teacher)
        for row in rows:
            took, step = float(row["calibrating_s"]), float(row["step_s"])
            cells = [
                teacher, row["calibration"], f"{float(row['time_share']):.1%}".replace("%", " %"),
                f"{float(row['checked'] or 0):.5f}", f"{float(row['error']):.5f}",
                f"{float(row['planned_step_s'] or step):.2f} ({step:.2f})", f"{took:.0f}", f"{took / step:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured yet."


def agreement() -> str:
    """Return, in a sentence, how many sites two calibrations give the same spec."""
    words = []
    for teacher in TEACHERS:
        plans = [json.loads(row["specs"]) for row in _usual(teacher)]
        pairs = list(combinations(plans, 2))
        if not pairs:
            continue
        sites = max(len({*one, *other}) for one, other in pairs)
        same = statistics.fmean(_same(*pair) / sites for pair in pairs)
        errors = [float(row["error"]) for row in _usual(teacher)]
        spread = max(errors) / min(errors)
        words.append(f"{teacher}: {same:.0%} of the sites, largest error over least {spread:.2f}".replace("%", " %"))
    return "; ".join(words) + "." if words else "Not measured yet."


def origin_line() -> str:
    """Return where the rows were taken."""
    rows = rows_of(CALIBRATED)
    places = dict.fromkeys(f"{row['machine']}, torch {row['torch']}" for row in rows)
    commits = dict.fromkeys(row["commit"] for row in rows)
    return f"{len(rows)} rows, taken on: {'; '.join(places)}. Commits {', '.join(commits)}. Times are the CPU's."


def _same(one: dict, other: dict) -> int:
    return sum(one.get(site) == other.get(site) for site in {*one, *other})


def _usual(teacher: str) -> list[Row]:
    return [row for row in rows_of(CALIBRATED) if row["teacher"] == teacher and row["method"] == "calibrated, 4 checks"
            and row["seed"] == "0"]  # fmt: skip


def _mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(float(row[name]) for row in rows)


def parts() -> dict[str, str]:
    """Return the tables of the page by their marks."""
    tables = {f"calibrated {teacher}": method_table(teacher) for teacher in TEACHERS}
    return {
        **tables,
        "calibrations": calibrations_table(),
        "agreement": agreement(),
        "calibrated origin": origin_line(),
    }
