"""Draw the figures and renew the pages' tables from results.csv: `python -m lab.evidence.figures`.

Nothing is computed anew. Needs matplotlib (`.venv/bin/pip install matplotlib`), which nothing else here does.
"""

import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt

from .claims import Group, Row
from .experiments import (
    ALL,
    METHODS,
    SUITES,
    TEACHER,
    TRAININGS,
    VIDEO_METHODS,
    VIDEO_TOKENS,
    Method,
    num_updates,
)
from .rows import costs, digest, stored
from .sheets import SHOWN, write_sheet
from .tables import BARS, by_scale, pages
from .untrained_methods import FAMILIES
from .untrained_tables import points_of

matplotlib.use("Agg")
FIGURES = Path(__file__).resolve().parent / "figures"
COLOURS = {
    "untrained": "#b0b0b0",
    "stage 0": "#e6a23c",
    "stage 1": "#5b8ff9",
    "stages 1, 2": "#8e6bd1",
    "all stages": "#2a9d6f",
}
SIZES = ("#8fb3ff", "#27408b")  # of costs: the evidence's, twice the side
FAMILY_COLOURS = dict(
    zip(FAMILIES, ("#b2182b", "#e6a23c", "#8e6bd1", "#2a9d6f", "#5b8ff9", "#7f7f7f", "#000000", "#f4a6ad"), strict=True)
)
SETTINGS: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}


def methods_figure(rows: list[Row], suite: str, methods: tuple[Method, ...], tokens: int) -> None:
    """Draw the velocity error of every method after every stage, a dot per seed; what is not measured is left out."""
    methods = tuple(
        each for each in methods
        if any(Group(suite, each.name, training, tokens=tokens).rows(rows) for training in TRAININGS)
    )  # fmt: skip
    figure, axes = plt.subplots(figsize=(9, 4.2))
    width = 0.16
    for place, training in enumerate(TRAININGS):
        for column, method in enumerate(methods):
            found = Group(suite, method.name, training, tokens=tokens).rows(rows).values()
            values = [float(row["error"]) for row in found]
            x = column + (place - 2) * width
            axes.plot([x] * len(values), values, "o", markersize=4, color=COLOURS[training])
    for training, colour in COLOURS.items():
        axes.plot([], [], "o", color=colour, label=training)
    axes.set(yscale="log", xlim=(-0.6, len(methods) - 0.4))
    axes.grid(axis="y", alpha=0.3)
    axes.set_xticks(range(len(methods)), [method.name for method in methods], rotation=40, ha="right")
    axes.set_ylabel("relative velocity error")
    axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
    save(figure, suite)


def curve_figure(rows: list[Row]) -> None:
    """Draw the error over the updates, our recipe against each paper's own."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for each in [*SUITES["recipes"](), *SUITES["curve"]()]:
        group = Group(each.suite, each.method.name, ALL, each.note)
        for row in [row for seed, row in group.rows(rows).items() if seed == "0"]:
            recipe = each.note.partition(",")[0]
            lines.setdefault((each.method.name, recipe), {})[num_updates(each)] = float(row["error"])
    if not lines:
        return
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    for axes, method in zip(panels, dict.fromkeys(method for method, _ in lines), strict=False):
        for (name, recipe), points in lines.items():
            if name == method and len(points) > 1:
                updates = sorted(points)
                axes.plot(updates, [points[each] for each in updates], "o-", label=recipe)
        axes.set(title=method, xlabel="updates", yscale="log")
        axes.legend(frameon=False)
    panels[0].set_ylabel("relative velocity error")
    save(figure, "curve")


def levels_figure(rows: list[Row]) -> None:
    """Draw the error by noise level of untrained attention and of students with seed 0, for three methods."""
    figure, panels = plt.subplots(1, 3, figsize=(9, 3), sharey=True)
    for axes, name in zip(panels, ("clear r=4", "hybrid R=4 polynomial max", "linear polynomial"), strict=True):
        for training, colour in COLOURS.items():
            for row in [row for seed, row in Group("methods", name, training).rows(rows).items() if seed == "0"]:
                levels = json.loads(row["errors_by_level"])
                axes.plot([float(level) for level in levels], list(levels.values()), "o-", color=colour)
        axes.set(title=name, xlabel="noise level", yscale="log")
    panels[0].set_ylabel("relative velocity error")
    for training, colour in COLOURS.items():
        panels[-1].plot([], [], "o-", color=colour, label=training)
    panels[-1].legend(frameon=False)
    save(figure, "levels")


def notes_figure(rows: list[Row], suite: str) -> None:
    """Draw a suite whose experiments differ in method and note: a bar each, with a dot per seed."""
    groups = dict.fromkeys(Group(each.suite, each.method.name, each.training, each.note, each.tokens)
                           for each in SUITES[suite]())  # fmt: skip
    measured = [group for group in groups if group.rows(rows)]
    if not measured:
        return
    figure, axes = plt.subplots(figsize=(6.5, 0.4 + 0.33 * len(measured)))
    for line, group in enumerate(measured):
        values = [float(row["error"]) for row in group.rows(rows).values()]
        axes.barh(line, statistics.fmean(values), color=COLOURS[group.training])
        axes.plot(values, [line] * len(values), "k.", markersize=3)
    names = [" ".join(filter(None, (group.method, group.note, *_training(group)))) for group in measured]
    axes.set_yticks(range(len(measured)), names)
    axes.invert_yaxis()
    axes.set_xlabel("relative velocity error")
    save(figure, suite.replace(" ", "_"))


def _training(group: Group) -> tuple[str, ...]:
    return (group.training,) if group.suite == "sizes" else ()


def costs_figure() -> None:
    """Draw what a call of every method takes, over the teacher's, at the size of the evidence and at twice the side."""
    rows = [row for row in costs() if row["what"] == "call"]
    machine = rows[-1]["machine"] if rows else ""  # the one that was measured last
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.6))
    for axes, teacher in zip(panels, dict.fromkeys(TEACHER.values()), strict=True):
        own = [row for row in rows if (row["teacher"], row["machine"]) == (teacher, machine)]
        methods = list(dict.fromkeys(row["method"] for row in own))
        for place, size in enumerate(sorted({int(row["tokens"]) for row in own})):
            found = {row["method"]: float(row["ratio"]) for row in own if int(row["tokens"]) == size}
            lines = [methods.index(method) + 0.4 * place - 0.2 for method in found]
            axes.barh(lines, list(found.values()), 0.4, color=SIZES[place], label=f"{size} tokens wide")
        axes.axvline(1, color="k", linewidth=0.8)
        axes.set_yticks(range(len(methods)), methods)
        axes.invert_yaxis()
        axes.set(title=teacher, xlabel="time of a call over the teacher's")
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.12))
    save(figure, "costs")


def untrained_figure() -> None:
    """Draw the error over the share of keys of what needs no training, a line per family, on four questions."""
    questions = ("pictures", "clips", "large pictures", "large clips")
    figure, panels = plt.subplots(2, 2, figsize=(9, 7.4))
    for axes, question in zip(panels.flat, questions, strict=True):
        for family, points in points_of(question).items():
            is_ours = family.startswith("foveated")
            axes.plot(
                *zip(*points, strict=True), "o-" if is_ours else "x--", label=family, color=FAMILY_COLOURS[family]
            )
        axes.set(title=question, xlabel="share of the image keys that a query sees", yscale="log", xlim=(0, None))
        axes.grid(axis="y", alpha=0.3)
    panels[0, 0].set_ylabel("relative velocity error")
    panels[1, 0].set_ylabel("relative velocity error")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.06))
    save(figure, "untrained")


def save(figure: Any, name: str) -> None:
    """Write a figure and forget it."""
    FIGURES.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{name}.png", dpi=110, metadata={"Software": None, "Rows": digest(name)})
    plt.close(figure)


def main() -> None:
    """Write every figure and all pages."""
    rows = by_scale(stored())["1"]
    with plt.rc_context(SETTINGS):
        methods_figure(rows, "methods", METHODS, 32)
        methods_figure(rows, "video", VIDEO_METHODS, VIDEO_TOKENS)
        levels_figure(rows)
        curve_figure(rows)
        costs_figure()
        untrained_figure()
        for suite in BARS:
            notes_figure(rows, suite)
    for suite in SHOWN:
        write_sheet(suite, FIGURES / f"{suite}_sheet.jpg")
    for path, text in pages(stored()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
