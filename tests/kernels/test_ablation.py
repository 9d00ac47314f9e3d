"""The ablations of the benchmark run on changed tables, in bounds, and are wrong on purpose."""

import importlib.util
import sys
from pathlib import Path

import pytest

from linearize.attention import ClearSpec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def contenders(monkeypatch):
    """The module benchmarks/contenders.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("bench_contenders", ROOT / "benchmarks" / "contenders.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_contenders", module)
    spec.loader.exec_module(module)
    return module


def test_ablations_change_the_result_and_stay_in_bounds(contenders, device):
    shape = contenders.Shape(160, text=40, heads=1, head_dim=16, dtype="float16")
    case = contenders.make_case(shape, str(device))
    right = contenders.RUNNERS["triton"](case, ClearSpec(2))()
    for name in ("no masks", "no gather"):
        changed = contenders.RUNNERS[name](case, ClearSpec(2))()
        assert changed.shape == right.shape and changed.isfinite().all()
        assert (changed - right).abs().max() > 1e-2, name
