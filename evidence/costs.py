"""Measure what students cost: `.venv/bin/python evidence/costs.py`. Rows go to costs.csv; what is there stays.

A denoising forward of a student takes turns with the teacher's in one process; a stage's updates are compared with the
teacher's forwards before and after the training. Peak memory is what a forward or an update takes beyond what there is
before it; `benchmarks/memory.py` tells how it is counted. Every case has a process of its own.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from experiments import (
    ALL,
    METHODS,
    STAGED,
    UNTRAINED,
    VIDEO_METHODS,
    VIDEO_TOKENS,
    Experiment,
    Method,
    chunked,
    clear,
    hybrid,
    linear,
)
from laboratory import TEACHERS, Laboratory
from measures import LEVELS, velocities
from tables import COSTS, costs

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from memory import ENVIRONMENT, peak_of  # noqa: E402

from run import origin  # noqa: E402

COLUMNS = ("date", "commit", "machine", "torch", "teacher", "method", "what", "tokens", "seconds", "times", "peak_mib")
FORWARD = "forward"
ROUNDS, UPDATES, WARM = 3, 5, 2  # turns of forwards; updates of a stage, of which the first are not counted
DENSE = Method("dense", ())
LARGER = {  # what is measured at twice the side too
    TEACHERS[0]: (DENSE, clear(4), clear(4, down_factor=2), linear("elu1"), hybrid(4)),
    TEACHERS[1]: (DENSE, VIDEO_METHODS[0], hybrid(4), chunked(1, 1)),
}


@dataclass(frozen=True)
class Case:
    """One process: the forwards of a method at a size, or the updates of all stages of its training.

    Args:
        teacher: one of TEACHERS.
        method: what the sites run.
        tokens: a side, of clips the columns.
        trains: whether updates are measured instead of forwards.
    """

    teacher: str
    method: Method
    tokens: int
    trains: bool = False


def cases() -> list[Case]:
    """Return every method at the size of the evidence, some at twice the side, and a training of each kind."""
    found = []
    for teacher, methods, tokens in zip(TEACHERS, (METHODS, VIDEO_METHODS), (32, VIDEO_TOKENS), strict=True):
        found += [Case(teacher, method, tokens) for method in (DENSE, *methods)]
        found += [Case(teacher, method, 2 * tokens) for method in LARGER[teacher]]
        found += [Case(teacher, method, tokens, trains=True) for method in STAGED if method in methods]
    return found


def measured(case: Case) -> list[dict[str, Any]]:
    """Return the rows of a case, measured in this process."""
    laboratory = Laboratory(case.teacher, on_cpu=not torch.cuda.is_available())
    empty = laboratory.teacher.empty(case.tokens, 1)["samples"]

    def forward(model: Any) -> float:
        start = time.perf_counter()
        velocities(laboratory, model, empty)
        return (time.perf_counter() - start) / len(LEVELS)

    if case.trains:
        return _updates(laboratory, case, lambda: forward(laboratory.model))
    model = laboratory.model
    if case.method is not DENSE:
        model = laboratory.apply(laboratory.student(Experiment("costs", case.method, UNTRAINED)))
    for each in (laboratory.model, model):  # a first time, not counted
        forward(each)
    peak = peak_of(lambda: forward(model), _device())
    turns = [(forward(laboratory.model), forward(model)) for _ in range(ROUNDS)]
    seconds = statistics.median(student for _, student in turns)
    times = statistics.median(student / teacher for teacher, student in turns)
    return [_row(case, FORWARD, seconds, times, peak)]


def _updates(laboratory: Laboratory, case: Case, forward: Callable[[], float]) -> list[dict[str, Any]]:
    """Return a row for each stage of a training whose job is new, so that it is not found done."""
    stages, transfer = laboratory.module("training.stages"), laboratory.module("training.transfer")
    watched = {
        "update of stage 1": transfer.Transfer,
        "update block by block": stages.BlockStage,
        "update end to end": stages.PredictionStage,
    }
    seen = {what: _watch(stage) for what, stage in watched.items()}
    experiment = Experiment(
        "costs", case.method, ALL, seed=time.time_ns() % 2**31, tokens=case.tokens,
        transfer={"updates": UPDATES, "output_draws": 0, "held_out": 1},
        finetune={"updates": UPDATES, "block_updates": UPDATES, "held_out": 1},
    )  # fmt: skip
    forward()
    before = forward()
    laboratory.student(experiment)
    teacher = (before + forward()) / 2  # a model in training cannot be asked for anything else
    rows = []
    for what, found in seen.items():
        if found[WARM:]:
            seconds, peaks = zip(*found[WARM:], strict=True)
            middle = statistics.median(seconds)
            rows.append(_row(case, what, middle, middle / teacher, max(peaks, key=float)))
    return rows


def _watch(stage: Any) -> list[tuple[float, str]]:
    """Let a stage's updates tell their seconds and peak memory."""
    found: list[tuple[float, str]] = []
    own = stage.update

    def update(self: Any, number: int) -> Any:
        losses: list[Any] = []
        start = time.perf_counter()
        peak = peak_of(lambda: losses.append(own(self, number)), _device())
        found.append((time.perf_counter() - start, peak))
        return losses[0]

    stage.update = update
    return found


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _row(case: Case, what: str, seconds: float, times: float, peak: str) -> dict[str, Any]:
    return {
        **origin(), "teacher": case.teacher, "method": case.method.name, "what": what, "tokens": case.tokens,
        "seconds": f"{seconds:.3f}", "times": f"{times:.2f}", "peak_mib": peak,
    }  # fmt: skip


def main() -> int:
    """Measure the cases that have no rows yet, one process after the other."""
    parser = argparse.ArgumentParser(description="Measure time and memory of students and of their training.")
    parser.add_argument("--case", type=int, help="measure one case in this process and print its rows")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measured(cases()[args.case])))
        return 0
    done = {(row["teacher"], row["method"], row["tokens"], row["what"] != FORWARD) for row in costs()}
    for number, case in enumerate(cases()):
        if (case.teacher, case.method.name, str(case.tokens), case.trains) in done:
            continue
        command = [sys.executable, __file__, "--case", str(number)]
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | ENVIRONMENT)
        if result.returncode:
            print(f"{case.teacher} {case.method.name}: {result.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
            continue
        rows = json.loads(result.stdout.splitlines()[-1])  # libraries may print too
        new = not COSTS.exists()
        with COSTS.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(rows)
        for row in rows:
            print(" ".join(str(row[name]) for name in COLUMNS[4:]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
