"""Measure and append rows to results.csv: `python run.py bench`, or `python -m lab.benchmarks.run --suite NAME`.

Contenders of a case take turns in one process, because a shared or hot machine changes speed from minute to minute;
only ratios of one run are claimed. Peak memory is measured by `peaks.py`. The torch backend is checked against the
float64 reference on small cases before anything is timed; triton tests itself.
"""

import argparse
import csv
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from linearize.attention import (
    ChunkedSpec,
    ClearSpec,
    FoveatedSpec,
    HybridSpec,
    LinearSpec,
    attention,
    attention_cost,
)

from .. import ROOT
from ..origin import origin
from . import peaks
from .contenders import runnable
from .registry import STREAMS, SUITES, Shape, Suite, declined_calls, label

DEFAULT = {
    "cpu": ("clear-cpu", "foveated-cpu", "mapped-cpu", "update-cpu", "stream"),
    "cuda": ("clear-gpu", "mapped-gpu", "stream-gpu"),
}
RESULTS = ROOT / "lab" / "benchmarks" / "results.csv"
COLUMNS = (
    "date", "commit", "machine", "torch", "suite", "pixels", "text", "heads", "head_dim", "dtype", "contender",
    "median_ms", "p20_ms", "p80_ms", "times_dense", "peak_mib", "useful_tflops", "of_roofline", "batch", "pass",
    "frames", "held_mib",
)  # fmt: skip


PRINTED = (
    "suite", "pixels", "frames", "text", "contender", "median_ms", "times_dense", "useful_tflops", "of_roofline",
    "peak_mib", "held_mib",
)  # fmt: skip


def main() -> int:
    names = [*SUITES, *STREAMS, "declined"]
    parser = argparse.ArgumentParser(description="Measure attention and append rows to lab/benchmarks/results.csv.")
    parser.add_argument("--suite", default="", help=f"one of {', '.join(names)}; default: what suits here")
    parser.add_argument("--rounds", type=int, default=7, help="turns that every contender takes")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, store nothing")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suites = [args.suite] if args.suite else [*DEFAULT[device], "declined"]
    if unknown := [suite for suite in suites if suite not in names]:
        print(f"no suite {unknown[0]}; there are {', '.join(names)}", file=sys.stderr)
        return 1
    check(device)
    if args.rounds < 2:
        print("--rounds is at least 2, because a median and quantiles are stored", file=sys.stderr)
        return 1
    for suite in suites:
        if suite in STREAMS:
            rows = stream_rows(suite)
        else:
            rows = declined_rows(args.rounds) if suite == "declined" else suite_rows(suite, args.rounds, device)
        if not args.dry_run:
            append(rows)
    return 0


def check(device: str) -> None:
    """Refuse to time what is not right."""
    shape = Shape(160, text=5, heads=2, head_dim=16, frames=4)
    inputs = shape.inputs(device)
    every = (
        ClearSpec(6),
        FoveatedSpec(),
        LinearSpec(),
        HybridSpec(3),
        HybridSpec(3, stabilizer="lse"),
        ChunkedSpec(2, 1),
    )
    for spec in every:
        with torch.no_grad():
            output = attention(*inputs, shape.layout, spec, backend="torch").cpu()
            truth = attention(*(tensor.cpu() for tensor in inputs), shape.layout, spec, backend="reference")
        if float((output - truth).norm() / truth.norm()) > 1e-3:
            raise SystemExit(f"kind {spec.kind} differs from the reference on this machine; nothing was timed")


def suite_rows(name: str, rounds: int, device: str) -> list[dict[str, object]]:
    """Return one row per shape and contender; times_dense compares with the fastest exact dense attention."""
    suite, rows = SUITES[name], []
    rates = (matmul_rate(), copy_rate()) if device == "cuda" else None
    for number, shape in enumerate(suite.shapes):
        torch._dynamo.reset()  # or compiled contenders reach the limit of recompilations and run unfused
        times = interleaved(runnable(suite, shape, device), rounds, device)
        exact = [statistics.median(samples) for each, samples in times.items() if each.startswith("dense")]
        for contender, samples in times.items():
            median, is_update = statistics.median(samples), contender.startswith("update")
            row = {**about(name), **facts(shape), **summary(contender, samples)}
            row |= {
                "times_dense": f"{min(exact) / median:.3f}" if exact else "",
                "pass": "update" if is_update else "both" if suite.backward else "forward",
            }
            row |= peaks.in_own_process(name, number, contender)
            if rates and not is_update:
                flops, moved = work(suite, shape, contender)
                floor_ms = max(flops / rates[0], moved / rates[1]) * 1000
                row |= {"useful_tflops": f"{flops / median / 1e9:.1f}", "of_roofline": f"{floor_ms / median:.3f}"}
            rows.append(finished(row))
    return rows


def stream_rows(name: str) -> list[dict[str, object]]:
    """Return one row per length of a clip and form; what is measured is memory."""
    suite, rows = STREAMS[name], []
    for frames in suite.frames:
        for form in peaks.FORMS:
            row = {**about(name), **facts(replace(suite.shape, frames=frames)), "pass": "forward"}
            row |= {"contender": f"{form} {label(suite.spec)}", **peaks.in_own_process(name, frames, form)}
            rows.append(finished(row))
    return rows


def work(suite: Suite, shape: Shape, contender: str) -> tuple[float, float]:
    """Return the FLOPs that a contender's result needs, and the bytes of its inputs and outputs, each touched once."""
    spec = suite.contenders[contender][1]
    cost = attention_cost(spec, shape.layout, shape.heads, shape.head_dim, getattr(torch, shape.dtype).itemsize)
    softmax = 4 * shape.head_dim * cost.pairs
    # the backward of a pair has five products to the forward's two; of a matrix product, two to one. It reads the
    # output, its gradient and the inputs, and writes three gradients
    forwards = (3.5, 3, 3) if suite.backward else (1, 1, 1)
    flops = forwards[0] * softmax + forwards[1] * (cost.flops - softmax)
    return shape.batch * flops, shape.batch * forwards[2] * cost.moved_bytes


def matmul_rate() -> float:
    """Return the FLOPs a second of an 8192^3 bf16 product of random matrices now: one ceiling of rows."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    samples = interleaved({"matmul": lambda: left @ right}, 10, "cuda")["matmul"]
    return 2 * 8192**3 / statistics.median(samples) * 1000


def copy_rate() -> float:
    """Return the bytes a second that a copy of 2 GiB reads and writes now: the other ceiling."""
    source = torch.ones(2**31, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    samples = interleaved({"copy": lambda: target.copy_(source)}, 10, "cuda")["copy"]
    return 2 * source.numel() / statistics.median(samples) * 1000


def declined_rows(rounds: int) -> list[dict[str, object]]:
    """Return rows in which median_ms is the time of one call; the difference to "host alone" is what a call adds."""
    repeats = 2000
    functions = {name: _repeat(function, repeats) for name, function in declined_calls().items()}
    times = interleaved(functions, rounds, "cpu")
    rows = []
    for name, samples in times.items():
        row = {**about("declined"), **summary(name, [sample / repeats for sample in samples], digits=5)}
        rows.append(finished(row))
    return rows


def _repeat(function: Callable[[], object], repeats: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(repeats):
            function()

    return run


def interleaved(functions: dict, rounds: int, device: str) -> dict[str, list[float]]:
    """Return milliseconds per contender, taken in turns after one warm-up each; on a GPU with a cold L2 cache."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    cache = torch.empty(2**28, dtype=torch.uint8, device=device) if device == "cuda" else None
    for turn in range(rounds + 1):
        for name, function in functions.items():
            taken = _milliseconds(function) if cache is None else _milliseconds_on_gpu(function, cache)
            if turn:
                times[name].append(taken)
    return times


def _milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1000


def _milliseconds_on_gpu(function: Callable[[], object], cache: torch.Tensor) -> float:
    cache.zero_()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def about(suite: str) -> dict[str, object]:
    """Return the columns that say when, where and with what; times need to know which processor it was."""
    if torch.cuda.is_available():
        return {**origin("cuda"), "suite": suite}
    return {**origin("cpu"), "machine": f"{processor()}, {torch.get_num_threads()} threads", "suite": suite}


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def facts(shape: Shape) -> dict[str, object]:
    """Return the columns of a shape."""
    return {name: getattr(shape, name) for name in ("pixels", "text", "heads", "head_dim", "dtype", "batch", "frames")}


def summary(name: str, samples: list[float], digits: int = 2) -> dict[str, object]:
    """Return the columns of a contender's times."""
    p20, p80 = (statistics.quantiles(samples, n=5)[i] for i in (0, 3))
    times = {"median_ms": statistics.median(samples), "p20_ms": p20, "p80_ms": p80}
    return {"contender": name, **{key: f"{value:.{digits}f}" for key, value in times.items()}}


def finished(row: dict[str, object]) -> dict[str, object]:
    """Return a row with every column, and print it."""
    row = dict.fromkeys(COLUMNS, "") | row
    print(" ".join(str(row[key]) for key in PRINTED if row[key] != ""), flush=True)
    return row


def append(rows: list[dict[str, object]]) -> None:
    """Append rows to results.csv."""
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
