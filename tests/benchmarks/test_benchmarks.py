"""Claims come from stored rows, the rows hold what is claimed, and today's code still keeps the promise."""

import csv
import importlib.util
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def benchmarks():
    """A function that imports a file of benchmarks/."""

    def load(name):
        sys.path.insert(0, str(ROOT / "benchmarks"))
        try:
            spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "benchmarks" / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[f"bench_{name}"] = module
            spec.loader.exec_module(module)
            return module
        finally:
            sys.path.remove(str(ROOT / "benchmarks"))

    return load


@pytest.fixture
def poisoned_memory():
    """Not here: filling memory with NaN would be timed."""


def stored(suite):
    with (ROOT / "benchmarks" / "results.csv").open(encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["suite"] == suite]


def test_readme_tables_are_generated(benchmarks):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert benchmarks("tables").with_tables(text) == text, "run: python benchmarks/tables.py"


def test_the_recorded_speed_at_2048(benchmarks):
    rows = [row for row in stored("clear-cpu") if (row["pixels"], row["contender"]) == ("2048", "clear r=8")]
    assert rows and float(rows[-1]["times_dense"]) >= 6
    assert all(row["commit"] and row["machine"] and row["torch"] for row in rows)


def test_the_speed_at_2048_today(benchmarks):
    """Radius 8, one head of 128, fp32, 512 text tokens: at least 4 times dense attention on the same machine."""
    registry, run = benchmarks("registry"), benchmarks("run")
    with torch.inference_mode():
        functions = registry.contenders(registry.Shape(2048), (8,), "cpu")
        times = run.interleaved(functions, 5, "cpu")
    ratio = statistics.median(times["dense"]) / statistics.median(times["clear r=8"])
    assert ratio >= 4, f"{ratio:.2f} times dense"


def test_no_tensor_is_quadratic(benchmarks):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.values = max(self.values, tensor.numel())
            return result

    registry = benchmarks("registry")
    function = registry.contenders(registry.Shape(2048), (8,), "cpu")["clear r=8"]
    with Largest() as largest:
        function()
    tokens = 128 * 128 + 512
    assert 0 < largest.values < 0.05 * tokens**2


def test_a_declined_call_adds_microseconds(benchmarks):
    times = {row["contender"]: float(row["median_ms"]) for row in stored("declined")}
    assert 0 < times["declined"] - times["host alone"] < 0.1
    run = benchmarks("run")
    rows = {row["contender"]: float(row["median_ms"]) for row in run.declined_rows(3)}
    for name in ("declined", "left to host", "other call"):
        assert rows[name] - rows["host alone"] < 0.1, f"{name}: {rows[name]} ms a call"


def test_suites_run_and_unknown_ones_are_named(benchmarks, monkeypatch, capsys):
    run, registry = benchmarks("run"), benchmarks("registry")
    shapes = (registry.Shape(256, text=16),)
    monkeypatch.setitem(run.SUITES, "clear-cpu", (shapes, (2,)))
    monkeypatch.setattr(run, "peak_in_own_process", lambda *args: "1")
    rows = run.suite_rows("clear-cpu", 2, "cpu")
    assert [row["contender"] for row in rows] == ["dense", "clear r=2"]
    assert set(rows[0]) == set(run.COLUMNS)
    run.check("cpu")
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "fast"])
    assert run.main() == 1
    assert "no suite fast; there are clear-cpu" in capsys.readouterr().err


def test_nothing_wrong_is_timed(benchmarks, monkeypatch):
    run = benchmarks("run")
    monkeypatch.setattr(run, "clear_attention", lambda query, *rest: query)
    with pytest.raises(SystemExit, match="differs from the reference"):
        run.check("cpu")


def test_commands_of_the_gpu_list_exist():
    commands = re.findall(r"`((?:\w+=\w+ )?(?:python|pytest) [^`]+)`", (ROOT / "benchmarks" / "gpu.md").read_text())
    assert len(commands) >= 3
    for command in commands:
        paths = [word for word in command.split() if "/" in word]
        assert paths and all((ROOT / path).exists() for path in paths), command
