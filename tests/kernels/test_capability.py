"""What the Triton backend refuses, and with which words; its test of itself; its table of tiles."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from linearize.attention import ClearSpec, HeadGroup, HeadSplit, Segment, TokenLayout, attention, grid_segment
from linearize.attention.gpu import clear as backend
from linearize.attention.gpu import self_test
from linearize.attention.gpu.clear_blocks import query_table
from linearize.attention.gpu.self_test import Case
from linearize.attention.kinds.clear_table import TILES
from linearize.attention.kinds.kind import Learned
from linearize.attention.runtime.backends import BACKENDS, CallShape, choose_backend
from linearize.attention.specs import groups_of
from linearize.kernels import Tile, capability, refusal, tile_for, tuning

LAYOUT = TokenLayout.of((Segment("text", 5), grid_segment("main", 1, 9, 14)))
CUDA = torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    """Pretend that there is a card of some compute capability, and no interpreter."""

    def pretend(major=9, minor=0, hip=None, has_triton=True, amd="gfx1100"):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=amd))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(capability, "has_triton", lambda: has_triton)
        capability.architecture.cache_clear()

    yield pretend
    capability.architecture.cache_clear()


@pytest.mark.parametrize(
    ("machine", "facts", "code", "words"),
    [
        ({}, (torch.device("cpu"), torch.float16, 64), "device", "needs an NVIDIA or AMD GPU, got cpu"),
        ({}, (torch.device("mps"), torch.float16, 64), "device", "got mps"),
        ({"major": 7, "minor": 5}, (CUDA, torch.float16, 64), "device", "8.0 or newer, this card has 7.5"),
        ({}, (CUDA, torch.float32, 64), "dtype", "computes float16 and bfloat16, got float32"),
        ({}, (CUDA, torch.float64, 64), "dtype", "got float64"),
        ({}, (CUDA, torch.float16, 257), "head_size", "heads of up to 256 values, got 257"),
        ({"has_triton": False}, (CUDA, torch.float16, 64), "triton", "try: pip install triton"),
    ],
)
def test_refusals(card, machine, facts, code, words):
    card(**machine)
    found = refusal(*facts)
    assert found is not None and found[0] == code and words in found[1]


def test_windows_without_triton_is_told_the_package(card, monkeypatch):
    card(has_triton=False)
    monkeypatch.setattr(sys, "platform", "win32")
    assert "pip install triton-windows" in refusal(CUDA, torch.float16, 64)[1]


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ({"major": 8, "minor": 0}, "sm80"),
        ({"major": 8, "minor": 6}, "sm86"),
        ({"major": 8, "minor": 9}, "sm86"),
        ({"major": 9}, "sm90"),
        ({"major": 10}, "sm100"),
        ({"major": 10, "minor": 3}, "sm100"),
        ({"major": 12}, "sm120"),
        ({"major": 13}, "other"),
        ({"major": 9, "minor": 4, "hip": "6.4", "amd": "gfx942:sramecc+:xnack-"}, "cdna"),
        ({"major": 11, "hip": "6.4"}, "amd"),
    ],
)
def test_cards_that_can_run(card, machine, name):
    card(**machine)
    assert capability.architecture(CUDA) == name
    for dtype in (torch.float16, torch.bfloat16):
        assert refusal(CUDA, dtype, 128) is None


def test_the_interpreter_takes_what_it_computes_rightly(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(capability, "has_triton", lambda: True)
    cpu = torch.device("cpu")
    assert refusal(cpu, torch.float32, 64) is None and refusal(cpu, torch.float16, 64) is None
    assert refusal(cpu, torch.bfloat16, 64)[0] == "dtype"


@pytest.mark.parametrize("architecture", [*tuning.TILES, "other"])
@pytest.mark.parametrize("head_size", [3, 64, 96, 128, 256])
def test_every_architecture_has_tiles_that_tables_can_hold(architecture, head_size):
    for kernel in tuning.KERNELS:
        tile = tile_for(kernel, architecture, head_size)
        assert tile.rows in TILES and tile.columns % 32 == 0 and tile.columns >= 32


@pytest.mark.parametrize("architecture", [*tuning.TILES, "other"])
@pytest.mark.parametrize("head_size", [3, 64, 96, 128, 256])
def test_every_architecture_has_tiles_for_kernels_with_feature_maps(architecture, head_size):
    for kernel in tuning.MAPPED_KERNELS:
        tile = tile_for(kernel, architecture, head_size)
        assert all(side >= 16 and side & (side - 1) == 0 for side in (tile.rows, tile.columns))


@pytest.mark.parametrize("architecture", [*tuning.TILES, "other"])
@pytest.mark.parametrize("head_size", [3, 64, 96, 128, 256])
def test_every_architecture_has_tiles_for_foveated_attention(architecture, head_size):
    for kernel in tuning.FOVEATED_KERNELS:
        tile = tile_for(kernel, architecture, head_size)
        assert all(side >= 32 and side & (side - 1) == 0 for side in (tile.rows, tile.columns))
    small = tuning.of_rows(tile, 9)
    assert small.rows == 16 and small.columns == tile.columns and small.num_warps <= tile.num_warps
    assert tuning.of_rows(tile, 17).rows == 32 and tuning.of_rows(tile, 500) == tile


def test_heads_may_differ_in_radius_only():
    def split(*specs):
        return HeadSplit(tuple(HeadGroup((head,), spec) for head, spec in enumerate(specs)))

    shape = (1, 2, LAYOUT.num_tokens, 64)
    assert backend.clear_refusal(split(ClearSpec(2), ClearSpec(5, 3)), shape) is None
    for other in (ClearSpec(2, down_factor=2), ClearSpec(2, proportional=True)):
        assert backend.clear_refusal(split(ClearSpec(2), other), shape).code == "heads"


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_the_self_test_visits_every_kind_of_step(rows, columns):
    tile = Tile(rows, columns, 4, 1)
    layout, spec = self_test.clear_case(tile)
    discs = [(group.spec.radius, 0) for group in groups_of(spec, 2)]
    table = query_table(layout, discs, (), tile, torch.device("cpu"))
    kinds = table.blocks[table.num_shared :][:, [4, 6, 7]].amax(0)
    # a tile of 16 x 16 cells has fewer than 128 keys that all its queries see, unless the picture is large
    assert kinds[0] > 0 and kinds[2] > 0 and (kinds[1] > 0 or columns > rows)
    assert table.num_shared > 0 and layout.num_tokens < 2000


def test_the_kernels_pass_their_own_test(device, exact_dtype):
    case = Case(device, exact_dtype, 16, True)
    assert self_test.clear_error(case) < self_test.TOLERANCE[exact_dtype] / 2
    assert self_test.CLEAR.run(case) is None


@pytest.fixture
def untested(monkeypatch, device):
    monkeypatch.setattr(self_test.CLEAR, "results", {})
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return device


def test_wrong_results_disable_the_backend_with_a_message(untested, exact_dtype, monkeypatch, caplog):
    attend = backend.attend
    monkeypatch.setattr(backend, "attend", lambda *args: attend(*args) * 1.05)
    call = CallShape(ClearSpec(4), LAYOUT, (1, 2, LAYOUT.num_tokens, 16), exact_dtype, untested)
    for _ in range(2):
        chosen, reasons = choose_backend(call, "triton")
        assert chosen is None and "failed its self-test: its results are wrong by 5.0%" in reasons[0].text
    assert len(caplog.records) == 1
    query = torch.randn(1, 2, LAYOUT.num_tokens, 16, device=untested, dtype=exact_dtype)
    with pytest.raises(ValueError, match="self-test"):
        attention(query, query, query, LAYOUT, ClearSpec(4), backend="triton")


def test_dense_results_fail_the_self_test(untested, exact_dtype, monkeypatch):
    """A kernel that reads every key is caught even where it hides them: NaN times 0 is NaN."""
    monkeypatch.setattr(
        self_test, "clear_with_triton", lambda q, k, v, layout, spec, **_: BACKENDS["torch"].run(
            q, k, v + 0 * v.sum(2, keepdim=True), SimpleNamespace(layout=layout, spec=spec),
            scale=None, learned=Learned(), memory=None,
        ),
    )  # fmt: skip
    assert self_test.clear_error(Case(untested, exact_dtype, 16, False)) == float("inf")


@pytest.mark.parametrize("error", [RuntimeError("ptxas died\nsecond line"), AssertionError(), ImportError("no lib")])
def test_whatever_a_compiler_throws_disables_the_backend(untested, exact_dtype, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(backend, "attend", fail)
    reason = self_test.CLEAR.refusal(untested, exact_dtype, 16, False)
    assert reason is not None and f"failed its self-test: {type(error).__name__}" in reason.text
    assert "second line" not in reason.text


def test_a_lack_of_memory_says_nothing_of_the_kernels(untested, exact_dtype, monkeypatch):
    attend = backend.attend

    def fail(*_):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(backend, "attend", fail)
    assert self_test.CLEAR.refusal(untested, exact_dtype, 16, False).code == "memory"
    monkeypatch.setattr(backend, "attend", attend)
    assert self_test.CLEAR.refusal(untested, exact_dtype, 16, False) is None


def test_a_tile_that_does_not_fit_is_replaced_by_the_next_smaller_one_that_does(untested, exact_dtype, monkeypatch):
    class OutOfResources(Exception):
        pass

    monkeypatch.setattr(tuning, "_rungs", {})
    monkeypatch.setitem(tuning.TILES, "interpreted", {256: (Tile(64, 64, 8, 3),) * 3})
    tiles, attend = [], backend.attend

    def small_device(query, key, value, tables, scale):
        tiles.append(tables[0].tile)
        if tables[0].tile.columns > 32:
            raise OutOfResources
        return attend(query, key, value, tables, scale)

    if untested.type != "cpu":
        pytest.skip("the tiles of a real card are its own")
    monkeypatch.setattr(backend, "attend", small_device)
    assert self_test.CLEAR.refusal(untested, exact_dtype, 16, False) is None
    assert list(dict.fromkeys(tiles)) == [
        Tile(64, 64, 8, 3),
        Tile(64, 64, 8, 2),
        Tile(64, 64, 8, 1),
        Tile(64, 32, 8, 1),
    ]


def test_a_missing_c_compiler_is_named(untested, exact_dtype, monkeypatch):
    def without(*_):
        raise RuntimeError(
            "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs..."
        )

    monkeypatch.setattr(backend, "attend", without)
    reason = self_test.CLEAR.refusal(untested, exact_dtype, 16, False)
    assert reason.code == "compiler" and "install gcc or clang" in reason.text


def test_a_ladder_of_tiles_ends():
    tile, rungs = Tile(128, 128, 8, 3), []
    while tuning.smaller(tile) != tile:
        tile = tuning.smaller(tile)
        rungs.append(tile)
    assert rungs[:3] == [Tile(128, 128, 8, 2), Tile(128, 128, 8, 1), Tile(128, 64, 8, 1)]
    assert tile == Tile(32, 32, 4, 1) == tuning.SAFE[0]


def test_where_no_tile_fits_the_reason_is_told(untested, exact_dtype, monkeypatch):
    class OutOfResources(Exception):
        pass

    def tiny_device(*_):
        raise OutOfResources("shared memory")

    monkeypatch.setattr(tuning, "_rungs", {})
    monkeypatch.setattr(backend, "attend", tiny_device)
    assert "OutOfResources: shared memory" in self_test.CLEAR.refusal(untested, exact_dtype, 16, False).text


def test_the_self_test_leaves_random_numbers_and_modes_alone(untested, exact_dtype):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert self_test.CLEAR.refusal(untested, exact_dtype, 16, True) is None
        assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_imports_triton_before_a_kernel_runs_and_a_second_copy_is_welcome():
    """As in ComfyUI, which loads the pack under another name; and without Triton the pack works."""
    code = """
import sys, importlib.util
sys.modules["triton"] = None
import linearize, linearize.attention, linearize.kernels.clear
from pathlib import Path
root = Path(linearize.attention.__file__).parents[1]
spec = importlib.util.spec_from_file_location("copy", root / "__init__.py", submodule_search_locations=[str(root)])
sys.modules["copy_of_pack"] = module = importlib.util.module_from_spec(spec)
import torch
before = torch.ops.linearize.clear_forward
module.__name__ = "copy_of_pack"; module.__path__ = [str(root)]
import copy_of_pack.attention
from copy_of_pack.attention import ClearSpec, TokenLayout, attention, grid_segment
layout = TokenLayout.of((grid_segment("main", 1, 9, 9),))
q = torch.randn(1, 1, 81, 8)
assert attention(q, q, q, layout, ClearSpec(3)).shape == q.shape
assert torch.ops.linearize.clear_forward is before
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
