"""Measure and append rows to results.csv: `python run.py bench`, or `python benchmarks/run.py --suite NAME`.

Contenders of a case take turns in one process, because a shared or hot machine changes speed from minute to minute;
only ratios of one run are claimed. Peak memory is measured in a process of its own per contender. The torch backend
is checked against the float64 reference on a small case before anything is timed; triton tests itself.
"""

import argparse
import csv
import datetime
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parents[1]]
from contenders import DENSE, WINDOWED, Made, make_case  # noqa: E402
from registry import SUITES, Shape, Suite, declined_calls  # noqa: E402

from linearize.attention import ClearSpec, attention_cost, clear_attention, reference_attention  # noqa: E402

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.csv"
COLUMNS = (
    "date", "commit", "machine", "torch", "suite", "pixels", "text", "heads", "head_dim", "dtype", "contender",
    "median_ms", "p20_ms", "p80_ms", "times_dense", "peak_mib", "useful_tflops", "of_roofline", "batch", "pass",
)  # fmt: skip


PRINTED = (
    "suite", "pixels", "text", "contender", "median_ms", "times_dense", "useful_tflops", "of_roofline", "peak_mib",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure attention and append rows to benchmarks/results.csv.")
    parser.add_argument("--suite", default="", help=f"one of {', '.join(SUITES)}, declined; default: what suits here")
    parser.add_argument("--rounds", type=int, default=7, help="turns that every contender takes")
    parser.add_argument("--dry-run", action="store_true", help="print the rows, store nothing")
    parser.add_argument("--peak", nargs=3, metavar=("SUITE", "CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.peak:
        print(peak_mib(*args.peak, device))
        return 0
    suites = [args.suite] if args.suite else [f"clear-{'gpu' if device == 'cuda' else 'cpu'}", "declined"]
    if unknown := [suite for suite in suites if suite not in (*SUITES, "declined")]:
        print(f"no suite {unknown[0]}; there are {', '.join([*SUITES, 'declined'])}", file=sys.stderr)
        return 1
    check(device)
    if args.rounds < 2:
        print("--rounds is at least 2, because a median and quantiles are stored", file=sys.stderr)
        return 1
    for suite in suites:
        rows = declined_rows(args.rounds) if suite == "declined" else suite_rows(suite, args.rounds, device)
        if not args.dry_run:
            append(rows)
    return 0


def check(device: str) -> None:
    """Refuse to time what is not right."""
    shape = Shape(400, text=5, heads=2, head_dim=16)
    inputs, spec = shape.inputs(device), ClearSpec(6)
    output = clear_attention(*inputs, shape.layout, spec).cpu()
    truth = reference_attention(*(tensor.cpu() for tensor in inputs), shape.layout, spec)
    if float((output - truth).norm() / truth.norm()) > 1e-3:
        raise SystemExit("clear_attention differs from the reference on this machine; nothing was timed")


def suite_rows(name: str, rounds: int, device: str) -> list[dict[str, object]]:
    """Return one row per shape and contender; times_dense compares with the fastest exact dense attention."""
    suite, rows = SUITES[name], []
    ceiling = matmul_tflops() if device == "cuda" else None
    for number, shape in enumerate(suite.shapes):
        torch._dynamo.reset()  # or compiled contenders reach the limit of recompilations and run unfused
        runnable, useful = contenders(suite, shape, device)
        times = interleaved(runnable, rounds, device)
        exact = [statistics.median(samples) for each, samples in times.items() if each.startswith("dense")]
        for contender, samples in times.items():
            median = statistics.median(samples)
            row = {**about(name), **facts(shape), **summary(contender, samples)}
            row |= {
                "times_dense": f"{min(exact) / median:.3f}" if exact else "",
                "pass": "both" if suite.backward else "forward",
            }
            row["peak_mib"] = peak_in_own_process(name, number, contender)
            row |= {"useful_tflops": "", "of_roofline": ""}
            if ceiling:
                rate = useful[contender] / median / 1e9
                row |= {"useful_tflops": f"{rate:.1f}", "of_roofline": f"{rate / ceiling:.3f}"}
            rows.append(row)
            print(" ".join(str(row.get(key, "")) for key in PRINTED), flush=True)
    return rows


def contenders(suite: Suite, shape: Shape, device: str) -> tuple[dict[str, Callable], dict[str, float]]:
    """Return name: function for what runs here, and name: FLOPs that its result needs; say what does not run."""
    case = make_case(shape, device, suite.backward)
    made: dict[str, Made] = {each: DENSE[each](case) for each in suite.dense}
    pairs = {each: float(shape.heads * shape.layout.num_tokens**2) for each in suite.dense}
    for spec in suite.specs:
        cost = attention_cost(spec, shape.layout, shape.heads, shape.head_dim)
        for each in suite.windowed:
            name = f"{each} r={spec.radius}" + (f" d={spec.down_factor}" if spec.down_factor > 1 else "")
            made[name], pairs[name] = WINDOWED[each](case, spec), float(cost.pairs)
    runnable = {}
    for name, function in made.items():
        reason = function if isinstance(function, str) else why_not(function)
        if reason:
            print(f"{shape.pixels} {name}: not run: {reason}", file=sys.stderr, flush=True)
        else:
            runnable[name] = function
    # forward has two products of 2 D FLOPs a pair; backward five, counted without the forward it repeats
    per_pair = 4 * shape.head_dim * shape.batch * (3.5 if suite.backward else 1)
    return runnable, {name: pairs[name] * per_pair for name in runnable}


def why_not(function: Callable[[], object]) -> str:
    """Run a contender once, which compiles it; return why it cannot run, or nothing."""
    try:
        function()
    except Exception as error:  # another library may throw anything; the others are still timed
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"
    return ""


def matmul_tflops() -> float:
    """Return the rate of an 8192^3 bf16 product of random matrices now: the ceiling that rows are compared with."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    samples = interleaved({"matmul": lambda: left @ right}, 10, "cuda")["matmul"]
    return 2 * 8192**3 / statistics.median(samples) / 1e9


def declined_rows(rounds: int) -> list[dict[str, object]]:
    """Return rows in which median_ms is the time of one call; the difference to "host alone" is what a call adds."""
    repeats = 2000
    functions = {name: _repeat(function, repeats) for name, function in declined_calls().items()}
    times = interleaved(functions, rounds, "cpu")
    rows = []
    for name, samples in times.items():
        row = {**about("declined"), **summary(name, [sample / repeats for sample in samples], digits=5)}
        rows.append(row)
        print(f"declined {name}: {row['median_ms']} ms a call")
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


def peak_in_own_process(suite: str, number: int, name: str) -> str:
    """Return the peak memory of a contender beyond its inputs, measured by a fresh process."""
    command = [sys.executable, __file__, "--peak", suite, str(number), name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        print(f"{name}: no peak memory: {result.stderr.strip()[-300:]}", file=sys.stderr, flush=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def peak_mib(suite_name: str, number: str, name: str, device: str) -> str:
    """Return MiB that one call needs beyond its inputs, output included; empty where the platform cannot tell."""
    suite = SUITES[suite_name]
    small = contenders(only(suite, name), Shape(256, dtype=suite.shapes[0].dtype), device)[0]
    if name in small:
        small[name]()  # libraries allocate their work space on first use
    function = contenders(only(suite, name), suite.shapes[int(number)], device)[0][name]
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"
    if not _reset_peak():
        return ""
    before = _peak_rss()
    function()
    return f"{(_peak_rss() - before) / 2**20:.0f}"


def only(suite: Suite, name: str) -> Suite:
    """Return the suite with no contender but one."""
    kind = name.split(" r=")[0]
    specs = tuple(spec for spec in suite.specs if name.split(" d=")[0].endswith(f" r={spec.radius}"))
    dense, windowed = (tuple(each for each in names if each == kind) for names in (suite.dense, suite.windowed))
    return replace(suite, specs=specs, dense=dense, windowed=windowed)


def _reset_peak() -> bool:
    """Make the kernel forget the peak of this process so far; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def about(suite: str) -> dict[str, object]:
    """Return the columns that say when, where and with what."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty=+"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""  # no git here
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {"date": day, "commit": commit, "machine": machine(), "torch": torch.__version__, "suite": suite}


def machine() -> str:
    """Return the name of the card, or of the processor with its number of threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads"


def facts(shape: Shape) -> dict[str, object]:
    """Return the columns of a shape."""
    return {name: getattr(shape, name) for name in ("pixels", "text", "heads", "head_dim", "dtype", "batch")}


def summary(name: str, samples: list[float], digits: int = 2) -> dict[str, object]:
    """Return the columns of a contender's times."""
    p20, p80 = (statistics.quantiles(samples, n=5)[i] for i in (0, 3))
    times = {"median_ms": statistics.median(samples), "p20_ms": p20, "p80_ms": p80}
    return {"contender": name, **{key: f"{value:.{digits}f}" for key, value in times.items()}}


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
