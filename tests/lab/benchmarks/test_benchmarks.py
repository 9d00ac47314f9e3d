"""Claims come from stored rows, the rows hold what is claimed, and today's code still keeps the promise."""

import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linearize.lab.benchmarks import contenders, gpu_bundle, peaks, registry, run, tables, tree

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def poisoned_memory():
    """Not here: filling memory with NaN would be timed."""


def stored(suite):
    return [row for row in tables.stored() if row["suite"] == suite]


def test_tables_of_all_documents_are_generated():
    pages = tables.pages()
    assert {"README.md", "README.zh.md", "CONTRIBUTING.md", "docs/hosts.md", "docs/tree.md"} <= set(pages)
    for page, text in pages.items():
        assert (ROOT / page).read_text(encoding="utf-8") == text, f"{page}: run python -m lab.benchmarks.tables"


def test_modules_say_in_one_line_what_they_are():
    lines = {path.as_posix(): tree.summary(path) for path in tree.modules()}
    assert len(lines) > 100
    assert {path: line for path, line in lines.items() if not 0 < len(line) <= tree.MAX_LENGTH} == {}


def test_gpu_rows_become_a_table(tmp_path, monkeypatch):
    row = dict.fromkeys(run.COLUMNS, "") | {
        "suite": "clear-gpu",
        "pixels": "2048",
        "contender": "triton r=8",
        "times_dense": "7",
    }
    for module in (tables, run):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results.csv")
    run.append([])
    assert tables.gpu_table().startswith("Not measured yet.")
    run.append([row])
    assert "| 2048 |  |  |  | triton r=8 |  |  | 7 |" in tables.gpu_table()


def test_the_recorded_speed_at_2048():
    rows = [row for row in stored("clear-cpu") if (row["pixels"], row["contender"]) == ("2048", "clear r=8")]
    assert rows and float(rows[-1]["times_dense"]) >= 6
    assert all(row["commit"] and row["machine"] and row["torch"] for row in rows)


def test_the_speed_at_2048_today():
    """Radius 8, one head of 128, fp32, 512 text tokens: at least 4 times dense attention on the same machine."""
    with torch.inference_mode():
        suite = registry.Suite((), (registry.ClearSpec(8),), ("dense",), ("clear",))
        functions = run.runnable(suite, registry.Shape(2048), "cpu")
        times = run.interleaved(functions, 5, "cpu")
    ratio = statistics.median(times["dense"]) / statistics.median(times["clear r=8"])
    assert ratio >= 4, f"{ratio:.2f} times dense"


def test_no_tensor_is_quadratic():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        values = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.values = max(self.values, tensor.numel())
            return result

    suite = registry.Suite((), (registry.ClearSpec(8),), (), ("clear",))
    function = contenders.runnable(suite, registry.Shape(2048), "cpu")["clear r=8"]
    with Largest() as largest:
        function()
    tokens = 128 * 128 + 512
    assert 0 < largest.values < 0.05 * tokens**2


def test_a_declined_call_adds_microseconds():
    times = {row["contender"]: float(row["median_ms"]) for row in stored("declined")}
    assert 0 < times["declined"] - times["host alone"] < 0.1
    rows = {row["contender"]: float(row["median_ms"]) for row in run.declined_rows(3)}
    for name in ("declined", "left to host", "other call"):
        assert rows[name] - rows["host alone"] < 0.1, f"{name}: {rows[name]} ms a call"


def test_suites_run_and_unknown_ones_are_named(monkeypatch, capsys):
    shapes = (registry.Shape(256, text=16),)
    monkeypatch.setitem(
        run.SUITES, "clear-cpu", registry.Suite(shapes, (registry.ClearSpec(2),), ("dense",), ("clear",))
    )
    monkeypatch.setattr(run.peaks, "in_own_process", lambda *args: {"peak_mib": "1"})
    rows = run.suite_rows("clear-cpu", 2, "cpu")
    assert [row["contender"] for row in rows] == ["dense", "clear r=2"]
    assert all(set(row) == set(run.COLUMNS) for row in (*rows, *run.stream_rows("stream"), *run.declined_rows(2)))
    run.check("cpu")
    monkeypatch.setattr(sys, "argv", ["run.py", "--suite", "fast"])
    assert run.main() == 1
    assert "no suite fast; there are clear-cpu" in capsys.readouterr().err


def test_flex_attention_is_compared_on_the_same_pairs():
    shape, spec = registry.Shape(512, text=20, heads=2, head_dim=16, height=256), registry.ClearSpec(5)
    case = contenders.make_case(shape, "cpu")
    ours = contenders.RUNNERS["clear"](case, spec)()
    raster = contenders.flex(case, spec, in_tiles=False, compiled=False)()
    assert (raster - ours).abs().max() < 1e-5
    (rows, columns), (tile_rows, tile_columns) = shape.grid, contenders.FLEX_TILE
    tiles = torch.arange(rows * columns).view(rows // tile_rows, tile_rows, columns // tile_columns, tile_columns)
    order = torch.cat((torch.arange(20), 20 + tiles.transpose(1, 2).flatten()))
    permuted = contenders.Case(shape, *(tensor[:, :, order] for tensor in case.inputs), None)
    in_tiles = contenders.flex(permuted, spec, in_tiles=True, compiled=False)()
    assert (in_tiles - ours[:, :, order]).abs().max() < 1e-5
    assert "do not divide" in contenders.flex(contenders.make_case(registry.Shape(1216, height=832), "cpu"), spec, True)


def test_the_gpu_bundle_holds_comfyuis_models(tmp_path):
    if not (gpu_bundle.COMFYUI / "comfy").is_dir():
        pytest.skip("no ComfyUI here; run the tests with: python run.py test")
    assert gpu_bundle.write_bundle(tmp_path) < gpu_bundle.MAX_BYTES
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"comfy/ldm/flux/model.py", "comfy_kitchen/__init__.py", "linearize/__init__.py"} <= names
    assert all(name.endswith(".py") for name in names if name.startswith("comfy/"))
    script = (
        "import sys; sys.argv = ['x', '--cpu']; import comfy.options; comfy.options.enable_args_parsing();"
        "import torch, comfy.ops, linearize.attention; from comfy.ldm.flux.model import Flux;"
        "model = Flux(image_model='flux', in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=8,"
        " hidden_size=128, mlp_ratio=1.0, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56],"
        " theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[], dtype=torch.float32,"
        " device='cpu', operations=comfy.ops.disable_weight_init);"
        "out = model(torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 2, 8), torch.zeros(1, 8));"
        "assert out.shape == (1, 4, 4, 4) and comfy.ops.__file__.startswith(sys.path[1])"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-1500:]


@pytest.mark.parametrize("kind", ["clear", "linear", "hybrid", "chunked"])
def test_nothing_wrong_is_timed(monkeypatch, kind):
    right = run.attention

    def wrong(query, key, value, layout, spec, backend):
        result = right(query, key, value, layout, spec, backend=backend)
        return result * 1.01 if (spec.kind, backend) == (kind, "torch") else result

    monkeypatch.setattr(run, "attention", wrong)
    with pytest.raises(SystemExit, match=f"kind {kind} differs from the reference"):
        run.check("cpu")


def test_suites_name_what_exists_and_nothing_twice():
    for suite in registry.SUITES.values():
        assert len(suite.contenders) == len(suite.dense) + len(suite.specs) * len(suite.runners)
        assert {*suite.dense} <= {*contenders.DENSE} and {*suite.runners} <= {*contenders.RUNNERS}


def test_suites_for_gpus_have_specs_that_run():
    for name, suite in registry.SUITES.items():
        if name.startswith(("mapped-gpu", "linear-gpu")):
            shape = replace(suite.shapes[0], width=64, height=0, frames=5, heads=2)
            here = replace(suite, dense=("dense",), runners=("torch",))
            assert list(contenders.runnable(here, shape, "cpu")) == list(here.contenders), name


def test_an_update_trains(monkeypatch):
    """Every spec of the suite learns from the call: its loss falls."""
    losses = []
    backward = contenders.SiteTrainer.backward
    monkeypatch.setattr(
        contenders.SiteTrainer, "backward", lambda *arguments: losses.append(backward(*arguments)) or losses[-1]
    )
    suite = replace(registry.SUITES["update-cpu"], shapes=(registry.Shape(96, text=3, heads=2),))
    found = contenders.runnable(suite, suite.shapes[0], "cpu")
    assert list(found) == list(suite.contenders)
    for name, function in found.items():
        losses.clear()
        for _ in range(12 if name.startswith("update") else 0):
            function()
        assert not losses or losses[-1] < losses[0], name


def test_the_work_of_a_result():
    """One head of 4 + 60 tokens and 128 numbers: 4 D FLOPs a pair, 3.5 times with gradients; D + 1 by F for states."""
    shape = registry.Shape(32, text=4, dtype="bfloat16", frames=15)
    suite = registry.Suite((shape,), (registry.LinearSpec("elu1"),), ("dense",), ("torch",))
    assert run.work(suite, shape, "dense") == (64**2 * 512, 4 * 64 * 256)
    states = 2 * 60 * 2 * 128 * 129
    assert run.work(suite, shape, "torch linear elu1") == ((64 + 60) * 4 * 512 + states, 4 * 64 * 256)
    both = run.work(replace(suite, backward=True), shape, "torch linear elu1")
    assert both == (3.5 * (64 + 60) * 4 * 512 + 3 * states, 12 * 64 * 256)


def test_what_a_stream_holds_does_not_grow():
    suite = registry.StreamSuite(registry.Shape(64, text=0, heads=2, head_dim=16))
    held = [float(peaks.stream_memory(suite, frames, "stream", "cpu")["held_mib"]) for frames in (12, 96)]
    state, overlap = 2 * 32 * 17, 2 * 2 * 16 * 16  # S and z; keys and values of one frame
    assert held == [round(4 * (state + overlap) / 2**20, 2)] * 2
    whole = torch.zeros(1000)
    assert peaks.held_bytes((whole[:1], [whole[1:2]])) == 4000


def test_memory_of_a_stream_does_not_grow():
    """Each clip in a process of its own; the direct form shows that growth would be seen."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process is known on Linux only")
    script = (
        "import sys; from linearize.lab.benchmarks import peaks, registry;"
        "suite = registry.StreamSuite(registry.Shape(320, text=0));"
        "print(peaks.stream_memory(suite, int(sys.argv[1]), sys.argv[2], 'cpu')['peak_mib'])"
    )

    def peak(frames, form):
        command = [sys.executable, "-c", script, str(frames), form]
        environment = os.environ | peaks.ENVIRONMENT
        return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert peak(96, "stream") < 1.1 * peak(12, "stream")
    assert peak(96, "direct") > 2 * peak(12, "direct")


def test_the_recorded_memory_of_a_stream():
    rows = tables.newest("stream")
    peak = {(row["contender"].split()[0], row["frames"]): float(row["peak_mib"]) for row in rows}
    held = [row["held_mib"] for row in rows if row["contender"].startswith("stream")]
    assert len(held) == 5 and len(set(held)) == 1 and float(held[0]) > 0
    assert peak["stream", "96"] < 1.1 * peak["stream", "12"]
    assert peak["direct", "96"] > 3 * peak["direct", "12"]


def test_the_recorded_speed_of_the_kinds_with_maps():
    """A video of 81 frames at 832 x 480: fewer exact keys cost less, and linear attention least."""
    rows = {row["contender"]: row for row in tables.newest("mapped-cpu") if row["frames"] == "21"}
    times = {name.removeprefix("torch "): float(row["times_dense"]) for name, row in rows.items()}
    for stabilizer in ("", " lse"):
        rates = [times[f"hybrid polynomial rate={rate}{stabilizer}"] for rate in (2, 4, 8)]
        assert rates[0] < rates[1] < rates[2] < times["linear polynomial"]
    assert times["chunked polynomial 3+1"] > 2
    assert all(row["commit"] and row["machine"] and row["peak_mib"] for row in rows.values())


def test_commands_of_the_gpu_list_exist():
    text = (ROOT / "lab" / "benchmarks" / "gpu.md").read_text(encoding="utf-8")
    commands = re.findall(r"`((?:\w+=\w+ )?(?:python|pytest) [^`]+)`", text)
    assert len(commands) >= 3
    for command in commands:
        places = [word for word in command.split() if "/" in word]
        places += [f"{name.replace('.', '/')}.py" for name in re.findall(r"-m (lab\S+)", command)]
        assert places and all((ROOT / place).exists() for place in places), command
        suite = re.search(r"--suite (\S+)", command)
        assert suite is None or suite[1] in (*registry.SUITES, *registry.STREAMS, "declined"), command
