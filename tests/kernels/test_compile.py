"""The kernels compile for every card of the table, in its registers and its shared memory. Needs no GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("cross_compile.py")
SHARED_BYTES = {"sm80": 166912, "sm86": 101376, "sm89": 101376, "sm90": 232448, "sm100": 232448, "sm120": 101376,
                "gfx942": 65536, "gfx1100": 65536, "gfx1201": 65536}  # fmt: skip
MOST_PARKED = 64  # bytes of a thread
FAMILIES = (
    "clear", "foveated", "small", "mapped", "raw", "logs", "fused", "relu", "exact", "unweighted", "unweighted raw",
)  # fmt: skip
QUICK = ("clear", "foveated", "small", "mapped", "raw", "exact", "unweighted")
EVERYTHING = [
    (dtype, [f"{card}:{size}" for card in SHARED_BYTES for size in (64, 96, 128)]) for dtype in ("fp16", "bf16")
]
EVERYTHING.append(("bf16", [f"{card}:256" for card in SHARED_BYTES if card.startswith("sm")]))


def compiled(family, dtype, targets, cache):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(SCRIPT), family, dtype, *targets]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def check(found):
    for each in found:
        assert each["shared"] <= SHARED_BYTES[each["target"]], each
        if each["target"].startswith("sm"):
            # values that only the end of a kernel needs may be parked, outside its loops
            assert each["spilled_in_loops"] == 0 and each["stack"] <= MOST_PARKED, each
            assert each["registers"] <= 255, each
            assert not each["hazards"], each
            if each["kernel"].startswith("foveated"):  # products of Hopper run on while the next are prepared
                assert each["waits"] <= each["products"] / 2, each
            assert each["async_copies"] > 0 or each["stages"] == 1, each
        elif each["target"].startswith("gfx9"):
            assert each["spilled"] == 0, each


@pytest.mark.parametrize("family", QUICK)
def test_the_tiles_of_flux_and_wan_fit_a_consumer_card_and_a_large_one(family, tmp_path):
    check(compiled(family, "bf16", ["sm89:128", "sm90:128", "gfx942:128"], tmp_path))


@pytest.mark.parametrize("family", ["mapped", "exact"])
def test_products_of_hopper_read_registers_that_nobody_writes(family, tmp_path):
    """At these sizes and in bf16 they did before the loops over features had one stage."""
    check(compiled(family, "bf16", ["sm90:64", "sm90:256"], tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LINEARIZE_TEST_ALL"), reason="runs with --all")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "targets"), EVERYTHING, ids=["fp16", "bf16", "256"])
def test_every_tile_fits_every_card(family, dtype, targets, tmp_path):
    check(compiled(family, dtype, targets, tmp_path))
