"""The tables of evidence/README.md, made of the stored rows; no number enters the page by hand."""

import json
import re
import statistics
import textwrap
from pathlib import Path

from claims import CLAIMS, Group, Row
from experiments import SUITES, TEACHER
from rows import costs

HERE = Path(__file__).resolve().parent
PAGE = HERE / "README.md"
MEASURES = {"error": 4, "psnr": 1, "ssim": 3, "frechet": 0, "flops": 3, "updates": 0}  # digits


def claims_table(rows: list[Row]) -> str:
    """Return the claims with their verdicts."""
    lines = ["| claim | source | here |", "|---|---|---|"]
    lines += [f"| {claim.text} | {claim.source} | {claim.verdict(rows)} |" for claim in CLAIMS]
    return "\n".join(lines)


def suite_table(rows: list[Row], suite: str) -> str:
    """Return all measures of a suite, means over seeds; the teacher's own in the first line."""
    sizes = {str(each.tokens) for each in SUITES[suite]()}
    dense = [row for row in rows if row["suite"] == f"dense {TEACHER[suite]}" and row["tokens"] in sizes]
    own = dense + [row for row in rows if row["suite"] == suite]
    if all(row["method"] == "dense" for row in own):
        return "Not measured yet."
    structure = list(json.loads(own[0]["structure"]))
    heads = ["method", "training", "note", "seeds", *MEASURES, *structure]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|" + "---:|" * (len(heads) - 3)]
    names = ("suite", "method", "training", "note", "tokens", "scale")
    keys = {tuple(row[name] for name in names) for row in own}
    order = {(suite, each.method.name, each.training, each.note, str(each.tokens)): place
             for place, each in enumerate(SUITES[suite]())}  # fmt: skip
    for key in sorted(keys, key=lambda key: (order.get(key[:5], -1), key[4:])):  # dense attention is first
        group = Group(*key[:4], int(key[4]), key[5])
        found = list(group.rows(own).values())
        means = [f"{statistics.fmean(float(row[name]) for row in found):.{MEASURES[name]}f}" for name in MEASURES]
        means += [f"{statistics.fmean(json.loads(row['structure'])[name] for row in found):.2f}" for name in structure]
        size = f"{group.tokens} tokens a side" if len(sizes) > 1 else ""
        scale = f"{float(group.scale):g} times the updates" if float(group.scale) != 1 else ""
        note = ", ".join(filter(None, (group.note, size, scale)))
        lines.append("| " + " | ".join([group.method, group.training, note, str(len(found)), *means]) + " |")
    return "\n".join(lines)


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


def page(rows: list[Row]) -> str:
    """Return README.md with its tables renewed; text outside the marks stays."""
    text = PAGE.read_text(encoding="utf-8")
    parts = {"claims": claims_table(rows), "origin": origins(rows)}
    parts |= {suite: suite_table(rows, suite) for suite in SUITES}
    parts |= {f"costs of {teacher}": costs_table(teacher) for teacher in dict.fromkeys(TEACHER.values())}
    for name, table in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text
