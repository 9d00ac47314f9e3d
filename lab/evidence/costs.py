"""Measure what students cost: `python -m lab.evidence.costs`. Rows go to costs.csv; what is there stays.

Time: calls of the student's model and of the teacher's take turns in one process; a stage's updates are compared with
the teacher's calls before and after the training. Peak memory is what a call or an update takes beyond what there is
before it, in a second process, because counting it (`lab/benchmarks/memory.py`) slows calls down. On a CPU one thread
does all of it.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ROOT
from ..benchmarks.memory import ENVIRONMENT, peak_of
from ..origin import origin
from .experiments import (
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
from .laboratory import HOME, TEACHERS, Laboratory
from .rows import COSTS, append, costs

COLUMNS = ("date", "commit", "machine", "torch", "teacher", "method", "what", "tokens", "seconds", "ratio", "peak_mib")
CALL = "call"
ROUNDS, CALLS = 3, 3  # turns of teacher and student; calls in a turn
UPDATES, WARM = 7, 2  # of a stage; of these the first are not counted
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COST_SEED = 1_000_000  # of a training that is for nothing else
DENSE = Method("dense", ())
Meter = Callable[[Callable[[], object]], float]
LARGER = {  # what is measured at twice the side too
    "lake": (DENSE, clear(4), clear(4, down_factor=2), linear("elu1"), hybrid(4)),
    "clips": (DENSE, VIDEO_METHODS[0], hybrid(4), chunked(1, 1)),
}


@dataclass(frozen=True)
class Case:
    """What a method's calls take at a size, or the updates of all stages of its training.

    Args:
        teacher: one of TEACHERS.
        method: what the sites run.
        tokens: a side, of clips the columns.
        trains: whether updates are measured instead of calls.
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


def measured(case: Case, counts_memory: bool) -> dict[str, tuple[float, float]]:
    """Return what was measured of a case in this process, by name of a row.

    Args:
        case: what to measure.
        counts_memory: peaks in MiB instead of times.

    Returns:
        Seconds and their ratio to a call of the teacher; or a peak in MiB, twice.
    """
    torch.set_num_threads(1)  # of a CPU: what else runs on the machine matters less
    laboratory = Laboratory(case.teacher, device=DEVICE)
    meter = peak if counts_memory else seconds
    if case.trains:
        return _updates(laboratory, case, meter)
    model = laboratory.model
    if case.method is not DENSE:
        model = laboratory.apply(laboratory.student(Experiment("costs", case.method, UNTRAINED)))
    turns = [(_calls(laboratory, laboratory.model, case, meter), _calls(laboratory, model, case, meter))
             for _ in range(1 if counts_memory else ROUNDS)]  # fmt: skip
    own = statistics.median(student for _, student in turns)
    return {CALL: (own, statistics.median(student / max(teacher, 1e-9) for teacher, student in turns))}


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(work: Callable[[], object]) -> float:
    """Return the MiB that some work needs beyond what there is before it; NaN where the platform cannot tell."""
    return float(peak_of(work, DEVICE) or "nan")


def _calls(laboratory: Laboratory, model: Any, case: Case, meter: Meter) -> float:
    """Return the median of some calls of a model with a caption and pure noise, after one that is not counted."""
    empty = laboratory.teacher.empty(case.tokens, 1)["samples"]
    noise = torch.randn(empty.shape, generator=torch.Generator().manual_seed(0))

    def ask(call: Any, noise: Tensor, latent: Tensor) -> list[float]:
        level = noise.new_ones(len(noise))
        return [meter(lambda: call(noise, level)) for _ in range(1 + CALLS)]

    found = laboratory.ask(model, laboratory.conditionings()[0], noise, empty, ask)
    return statistics.median(found[1:])


def _updates(laboratory: Laboratory, case: Case, meter: Meter) -> dict[str, tuple[float, float]]:
    """Return what an update of each stage takes, of a training whose folders are deleted; found done, it has none."""
    tune, transfer = laboratory.module("training.finetune.finetune"), laboratory.module("training.transfer.transfer")
    experiment = Experiment(
        "costs", case.method, ALL, seed=COST_SEED, tokens=case.tokens, transfer={"updates": UPDATES, "output_draws": 0},
        finetune={"updates": UPDATES, "block_updates": UPDATES},
    )  # fmt: skip
    _forget_jobs()  # of a run that was killed: what is found done is not measured
    laboratory.samples("teacher")
    transferred, tuned = _watch(transfer.Transfer, meter), _watch(tune.Finetune, meter)
    calls = [_calls(laboratory, laboratory.model, case, meter)]
    laboratory.student(experiment)
    calls.append(_calls(laboratory, laboratory.model, case, meter))  # a model in training cannot be asked in between
    _forget_jobs()
    seen = {
        "update of stage 1": transferred,
        "update block by block": tuned[:UPDATES],
        "update end to end": tuned[UPDATES:],
    }
    means = {what: statistics.median(found[WARM:]) for what, found in seen.items() if found[WARM:]}
    return {what: (mean, mean / max(statistics.fmean(calls), 1e-9)) for what, mean in means.items()}


def _forget_jobs() -> None:
    for job in (HOME / "linearize" / "jobs").glob("*/job.json"):
        if json.loads(job.read_text(encoding="utf-8"))["recipe"]["seed"] == COST_SEED:
            shutil.rmtree(job.parent)


def _watch(stage: Any, meter: Meter) -> list[float]:
    """Let a stage's updates tell what they take."""
    found: list[float] = []
    own = stage.update

    def update(self: Any, number: int) -> Any:
        losses: list[Any] = []
        found.append(meter(lambda: losses.append(own(self, number))))
        return losses[0]

    stage.update = update
    return found


def rows_of(number: int, case: Case) -> list[dict[str, Any]]:
    """Return the rows of a case, measured in two processes.

    Raises:
        RuntimeError: a process failed; the end of what it said.
    """
    found = []
    for flags, environment in ((["--memory"], ENVIRONMENT), ([], {})):
        command = [sys.executable, "-m", "lab.evidence.costs", "--case", str(number), *flags]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
        if result.returncode:
            raise RuntimeError(result.stderr.strip()[-300:])
        found.append(json.loads(result.stdout.splitlines()[-1]))  # libraries may print too
    peaks, times = found
    return [
        {**origin(DEVICE), "teacher": case.teacher, "method": case.method.name, "what": what, "tokens": case.tokens,
         "seconds": f"{own:.3f}", "ratio": f"{ratio:.2f}",
         "peak_mib": "" if math.isnan(peaks[what][0]) else f"{peaks[what][0]:.0f}"}
        for what, (own, ratio) in times.items()
    ]  # fmt: skip


def main() -> int:
    """Measure the cases that have no rows of this machine yet."""
    parser = argparse.ArgumentParser(description="Measure time and memory of students and of their training.")
    parser.add_argument("--case", type=int, help="measure one case in this process, and print what was found")
    parser.add_argument("--memory", action="store_true", help="of one case: peak memory instead of times")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps(measured(cases()[args.case], args.memory)))
        return 0
    machine, failed = origin(DEVICE)["machine"], 0
    done = {(row["teacher"], row["method"], row["tokens"], row["what"] != CALL) for row in costs()
            if row["machine"] == machine}  # fmt: skip
    for number, case in enumerate(cases()):
        if (case.teacher, case.method.name, str(case.tokens), case.trains) in done:
            continue
        try:
            rows = rows_of(number, case)
        except RuntimeError as problem:
            print(f"{case.teacher} {case.method.name}: {problem}", file=sys.stderr, flush=True)
            failed = 1
            continue
        append(COSTS, COLUMNS, rows)
        for row in rows:
            print(" ".join(str(row[name]) for name in COLUMNS[4:]), flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
