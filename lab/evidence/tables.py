"""The tables of lab/evidence/README.md and of the pages in lab/evidence/tables, made of the stored rows."""

import json
import re
import statistics
import textwrap
from collections import Counter
from pathlib import Path

from .calibrated_tables import parts as calibrated_parts
from .claims import CLAIMS, PICTURES, Group, Row
from .experiments import SUITES, TEACHER, UNTRAINED
from .rows import costs
from .untrained_tables import parts as untrained_parts

HERE = Path(__file__).resolve().parent
FRONT = HERE / "README.md"
PAGES = (FRONT, *sorted((HERE / "tables").glob("*.md")))
ANSWERS = {"reproduced": "yes", "mixed": "mixed", "not reproduced": "**no**"}  # to whether a claim holds here
MEASURES = {"psnr": 1, "ssim": 3, "frechet": 0, "flops": 3, "updates": 0}  # digits

BARS = {  # suites whose figure has a bar per line of the table, and what it shows
    "losses": "Error by loss of stage 1",
    "degrees": "Error by degree of the features",
    "recipes": "Error of recipes at equal updates",
    "settings": "Error of recipes with one thing changed",
    "noise levels": "Error by draws of noise levels",
    "data": "Error by whose pictures were trained on",
    "budgets": "Error of mixtures and of one kind under budgets",
    "sizes": "Error at a larger size than that of the training",
    "video losses": "Error by loss of stage 1, on the video teacher",
    "video budgets": "Error of mixtures and of one kind under budgets, on the video teacher",
}


def claims_table(rows: list[Row]) -> str:
    """Return the claims with their verdicts by velocities and by pictures, for every scale that was run."""
    parts = []
    for scale, own in by_scale(rows).items():
        lines = ["| claim | source | by error | by PSNR |", "|---|---|---|---|"]
        lines += [
            f"| {claim.text} | {claim.source} | {claim.verdict(own)} | {claim.verdict(own, PICTURES)} |"
            for claim in CLAIMS
        ]
        parts += [f"With {scale} times the updates:"] * (scale != "1") + ["\n".join(lines)]
    return "\n\n".join(parts)


def findings_table(rows: list[Row]) -> str:
    """Return the claims in short: whether they hold, and how the error changes from the worst group to the best."""
    lines = ["| claim | by | holds here | error changes by | seeds |", "|---|---|---|---:|---:|"]
    for claim in CLAIMS:
        outcome = claim.outcome(by_scale(rows).get("1", []))
        if isinstance(outcome, str):
            cells = [outcome, "", ""]
        else:
            change = f"{outcome.errors[-1] / outcome.errors[0] - 1:+.0%}".replace("%", " %").replace("-", "−")
            cells = [ANSWERS[outcome.word], change, str(outcome.seeds)]
        lines.append(f"| {' | '.join([claim.text, claim.source.partition(',')[0], *cells])} |")
    return "\n".join(lines)


def by_scale(rows: list[Row]) -> dict[str, list[Row]]:
    """Return rows by their factor on the updates, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(f"{float(row['scale']):g}", []).append(row)
    return found


def suite_table(rows: list[Row], suite: str) -> str:
    """Return all measures of a suite, means over seeds; the teacher's own in the first line."""
    order = dict.fromkeys(
        Group(suite, each.method.name, each.training, each.note, each.tokens) for each in SUITES[suite]()
    )
    sizes = list(dict.fromkeys(group.tokens for group in order))
    dense = [Group(f"dense {TEACHER[suite]}", "dense", UNTRAINED, tokens=size) for size in sizes]
    lines: list[str] = []
    for scale, own in by_scale(rows).items():
        if not any(group.rows(own) for group in order):
            continue
        for group in [*dense, *order]:
            found = list(group.rows(own).values())
            if not found:
                continue
            size = f"{group.tokens} tokens a side" if len(sizes) > 1 else ""
            times = f"{scale} times the updates" if scale != "1" else ""
            lines = lines or _head(list(json.loads(found[0]["structure"])))
            lines.append(_line(group, found, [size, times]))
    return "\n".join(lines) or "Not measured yet."


def _head(structure: list[str]) -> list[str]:
    heads = ["method", "training", "note", "seeds", "error", "σ ≥ 0.2", *MEASURES, *structure]
    return ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]


def _line(group: Group, found: list[Row], notes: list[str]) -> str:
    """Return a line of a suite's table.

    Args:
        group: what the line tells of.
        found: its rows, one or more.
        notes: put behind the group's own.
    """
    outcomes = Counter(row["outcome"] for row in found if row["outcome"])
    odd = [f"{count} of {len(found)} {outcome}" for outcome, count in outcomes.items()]
    note = ", ".join(filter(None, (group.note, *notes, *odd)))
    names = ["the teacher", "", note] if group.method == "dense" else [group.method, group.training, note]
    means = [statistics.fmean(float(row[name]) for row in found) for name in ("error", *MEASURES)]
    without = statistics.fmean(statistics.fmean(levels_above(row)) for row in found)
    values = [f"{means[0]:.4f}", f"{without:.4f}"]
    values += [f"{mean:.{digits}f}" for mean, digits in zip(means[1:], MEASURES.values(), strict=True)]
    for name in json.loads(found[0]["structure"]):
        values.append(f"{statistics.fmean(json.loads(row['structure'])[name] for row in found):.2f}")
    return "| " + " | ".join([*names, str(len(found)), *values]) + " |"


def levels_above(row: Row, least: float = 0.2) -> list[float]:
    """Return the errors of a row at noise levels of at least `least`."""
    return [error for level, error in json.loads(row["errors_by_level"]).items() if float(level) >= least]


def costs_table(teacher: str) -> str:
    """Return what calls of a teacher's students and updates take, over the teacher's own calls."""
    rows = [row for row in costs() if row["teacher"] == teacher]
    machines = dict.fromkeys(row["machine"] for row in rows)
    tables = [_machine_table([row for row in rows if row["machine"] == machine]) for machine in machines]
    return "\n\n".join(tables) or "Not measured yet."


def _machine_table(rows: list[Row]) -> str:
    sizes = sorted({row["tokens"] for row in rows}, key=int)
    columns = [("call", size) for size in sizes]
    updates = sorted({row["what"] for row in rows} - {"call"}, key=lambda what: ("stage 1" not in what, what))
    columns += [(what, sizes[0]) for what in updates]
    heads = [f"{what}, {size} tokens wide" if what == "call" else what for what, size in columns]
    lines = ["| method | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    found = {(row["method"], row["what"], row["tokens"]): _cost(row) for row in rows}
    for method in dict.fromkeys(row["method"] for row in rows):
        lines.append(f"| {method} | " + " | ".join(found.get((method, *column), "") for column in columns) + " |")
    origin = dict.fromkeys(f"{row['machine']}, torch {row['torch']}, commit {row['commit']}" for row in rows)
    return "\n".join([*lines, "", *textwrap.wrap(f"Taken on: {'; '.join(origin)}.", 120)])


def _cost(row: Row) -> str:
    return f"{row['ratio']} ({row['peak_mib']} MiB)" if row["peak_mib"] else row["ratio"]


def origins(rows: list[Row]) -> str:
    """Return where the rows were taken."""
    found = dict.fromkeys(f"{row['machine']}, torch {row['torch']}, scale {row['scale']}" for row in rows)
    commits = sorted({row["commit"] for row in rows})
    text = f"{len(rows)} rows, taken on: {'; '.join(found)}. Commits {', '.join(commits)}."
    return "\n".join(textwrap.wrap(text, 120))


def pages(rows: list[Row]) -> dict[Path, str]:
    """Return the text of every page, its tables renewed; text outside the marks stays.

    Raises:
        ValueError: a table has lost its marks, or stands twice.
    """
    parts = {"findings": findings_table(rows), "claims": claims_table(rows), "origin": origins(rows)}
    parts |= {suite: suite_table(rows, suite) for suite in SUITES}
    for suite, shown in BARS.items():
        if any(row["suite"] == suite for row in rows):
            parts[suite] = f"![{shown}](../figures/{suite.replace(' ', '_')}.png)\n\n{parts[suite]}"
    parts |= {f"costs of {teacher}": costs_table(teacher) for teacher in dict.fromkeys(TEACHER.values())}
    parts |= untrained_parts() | calibrated_parts()
    texts = {path: path.read_text(encoding="utf-8") for path in PAGES}
    for name, table in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        places = [path for path, text in texts.items() for _ in mark.finditer(text)]
        if len(places) != 1:
            raise ValueError(f"the pages have {len(places)} places for the table {name!r}, not one")
        texts[places[0]] = mark.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", texts[places[0]])
    return texts
