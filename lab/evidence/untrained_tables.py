"""The page of attention that needs no training: its tables and its figure, made of the rows of untrained.csv."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .claims import Group, Row
from .rows import UNTRAINED, rows_of, stored
from .untrained import QUESTIONS
from .untrained_methods import FAMILIES, family_of

TRAINED = {  # what is shown beside a question: students of the other tables, all stages, on captions of those
    "pictures": ("methods", ("clear r=6", "clear r=4 pooled 2", "hybrid R=2 polynomial max"), 32),
    "clips": ("video", ("hybrid R=2 polynomial max", "chunked 2 overlap 1"), 16),
}


@dataclass(frozen=True)
class Goal:
    """What was to be reached without training, before it was measured.

    Args:
        question: one of QUESTIONS.
        keys: share of the image keys, at most. error: at most. psnr: in dB, at least; 0 asks for none.
        by_distance: nothing may be chosen by content.
    """

    question: str
    keys: float
    error: float
    psnr: float = 0.0
    by_distance: bool = False


GOALS = (
    Goal("pictures", 0.17, 0.0042, 28),
    Goal("pictures", 0.27, 0.0026, 31),
    Goal("pictures", 0.13, 0.0125, by_distance=True),
    Goal("large pictures", 0.046, 0.009, by_distance=True),
    Goal("large pictures", 0.115, 0.005, by_distance=True),
    Goal("large pictures", 0.09, 0.004),
    Goal("large pictures", 0.161, 0.0016),
    Goal("clips", 0.27, 0.0105, 23.5),
    Goal("clips", 0.36, 0.006, 25),
    Goal("large clips", 0.105, 0.0013),
)


@dataclass(frozen=True)
class Line:
    """Means of one method over the seeds of a question.

    Args:
        keys, error, psnr, ssim: as in untrained.csv; psnr and ssim are None where nothing was sampled.
        spread: largest minus least error of the seeds.
        structure: by name.
        seeds: number of them.
    """

    method: str
    spec: dict[str, Any]
    keys: float
    error: float
    spread: float
    psnr: float | None
    ssim: float | None
    structure: dict[str, float]
    seeds: int


def lines_of(question: str) -> list[Line]:
    """Return a line per method of a question that has rows, in the order of its methods."""
    rows = [row for row in rows_of(UNTRAINED) if row["question"] == question]
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    order = ["dense", *(method.name for method in QUESTIONS[question].methods)]
    return [_line(name, by_method[name]) for name in order if name in by_method]


def _line(method: str, rows: Sequence[Row]) -> Line:
    errors = [float(row["error"]) for row in rows]
    psnr, ssim = (_mean(row[name] for row in rows) for name in ("psnr", "ssim"))
    told = [json.loads(row["structure"] or "{}") for row in rows]
    structure = {name: statistics.fmean(each[name] for each in told) for name in told[0]}
    keys = statistics.fmean(float(row["keys"]) for row in rows)
    spec = json.loads(rows[0]["spec"])
    spread = max(errors) - min(errors)
    return Line(method, spec, keys, statistics.fmean(errors), spread, psnr, ssim, structure, len(rows))


def _mean(values: Iterable[str]) -> float | None:
    found = [float(value) for value in values if value]
    return statistics.fmean(found) if found else None


def question_table(question: str) -> str:
    """Return every method of a question, families apart, with trained students below."""
    lines = lines_of(question)
    if not lines:
        return "Not measured yet."
    structure, is_sampled = list(lines[0].structure), lines[0].psnr is not None
    heads = ["method", "keys", "error", "spread"] + ["psnr", "ssim", *structure] * is_sampled
    rows = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for line in lines:
        values = [line.method, f"{line.keys:.1%}".replace("%", " %"), f"{line.error:.4f}", f"{line.spread:.4f}"]
        if is_sampled:
            assert line.psnr is not None and line.ssim is not None
            values += [f"{line.psnr:.1f}", f"{line.ssim:.3f}", *(f"{line.structure[name]:.2f}" for name in structure)]
        rows.append("| " + " | ".join(values) + " |")
    for suite, methods, tokens in [TRAINED[question]] if question in TRAINED else []:
        rows += [_trained_line(suite, method, tokens) for method in methods]
    return "\n".join(rows)


def _trained_line(suite: str, method: str, tokens: int) -> str:
    found = list(Group(suite, method, tokens=tokens).rows(stored()).values())
    means = {name: statistics.fmean(float(row[name]) for row in found) for name in ("error", "psnr", "ssim", "flops")}
    spread = max(float(row["error"]) for row in found) - min(float(row["error"]) for row in found)
    cells = [f"*trained: {method}*", f"{means['flops']:.0%} of the operations".replace("%", " %"),
             f"{means['error']:.4f}", f"{spread:.4f}", f"{means['psnr']:.1f}", f"{means['ssim']:.3f}"]  # fmt: skip
    for name in json.loads(found[0]["structure"]):
        cells.append(f"{statistics.fmean(json.loads(row['structure'])[name] for row in found):.2f}")
    return "| " + " | ".join(cells) + " |"


def goals_table() -> str:
    """Return what was to be reached, and the foveated method with the least error that is within the keys."""
    rows = ["| on | keys at most | error at most | psnr at least | best | keys | error | psnr | reached |",
            "|---|---:|---:|---:|---|---:|---:|---:|---|"]  # fmt: skip
    for goal in GOALS:
        fit = [line for line in lines_of(goal.question) if line.spec.get("kind") == "foveated"
               and line.keys <= goal.keys + 5e-4 and not (goal.by_distance and line.spec["top"])]  # fmt: skip
        wanted = [goal.question + ", by distance" * goal.by_distance, f"{goal.keys:.1%}".replace("%", " %"),
                  f"{goal.error:.4f}", f"{goal.psnr:g}" if goal.psnr else ""]  # fmt: skip
        if not fit:
            rows.append("| " + " | ".join([*wanted, "", "", "", "", "not measured"]) + " |")
            continue
        best = min(fit, key=lambda line: line.error)
        reached = best.error <= goal.error and (not goal.psnr or (best.psnr or 0) >= goal.psnr)
        shown = [best.method, f"{best.keys:.1%}".replace("%", " %"), f"{best.error:.4f}",
                 f"{best.psnr:.1f}" if best.psnr is not None and goal.psnr else ""]  # fmt: skip
        rows.append("| " + " | ".join([*wanted, *shown, "yes" if reached else "**no**"]) + " |")
    return "\n".join(rows)


def points_of(question: str) -> dict[str, list[tuple[float, float]]]:
    """Return (keys, error) of a question's methods by family, in order of keys; dense is left out."""
    points: dict[str, list[tuple[float, float]]] = {family: [] for family in FAMILIES}
    for line in lines_of(question):
        if line.spec:
            points[family_of(line.spec)].append((line.keys, line.error))
    return {family: sorted(each) for family, each in points.items() if each}


def parts() -> dict[str, str]:
    """Return the tables of the page by their marks."""
    return {"goals": goals_table(), **{f"untrained {name}": question_table(name) for name in QUESTIONS}}
