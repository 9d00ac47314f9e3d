"""The ablations of the benchmark run on changed tables, in bounds, and are wrong on purpose."""

from linearize.attention import ClearSpec
from linearize.lab.benchmarks import contenders
from linearize.lab.benchmarks.registry import Shape


def test_ablations_change_the_result_and_stay_in_bounds(device):
    shape = Shape(160, text=40, heads=1, head_dim=16, dtype="float16")
    case = contenders.make_case(shape, str(device))
    right = contenders.RUNNERS["triton"](case, ClearSpec(2))()
    for name in ("no masks", "no gather"):
        changed = contenders.RUNNERS[name](case, ClearSpec(2))()
        assert changed.shape == right.shape and changed.isfinite().all()
        assert (changed - right).abs().max() > 1e-2, name
