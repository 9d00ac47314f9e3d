"""Newer cores record what each block allocates, and end the process if something of it outlives the block."""

import ast
import contextlib
import importlib
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Stands for the core's recorder: it holds every allocation of a block that is not paused.

    `left` lists the allocations that were still alive at the end of a block and are not what the block returns.
    """

    def __init__(self):
        super().__init__()
        self.paused, self.alive, self.left, self.pauses = False, None, [], 0

    @contextlib.contextmanager
    def pause(self):
        """As comfy.model_prefetch.pause_malloc_graph: it sets and clears a flag, it does not count."""
        self.paused, self.pauses = True, self.pauses + 1
        try:
            yield
        finally:
            self.paused = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)
        }
        output = func(*args, **(kwargs or {}))
        if self.alive is not None and not self.paused:
            for each in tree_leaves(output):
                if isinstance(each, torch.Tensor) and each.untyped_storage()._cdata not in given:
                    self.alive.append((str(func), StorageWeakRef(each.untyped_storage())))
        return output

    def watch(self, module):
        """Record each call of a module as one block; return what takes the hooks away."""

        def begin(*_):
            self.alive = []

        def end(module, args, output):
            returned = {each.untyped_storage()._cdata for each in tree_leaves(output) if isinstance(each, torch.Tensor)}
            self.left += [name for name, ref in self.alive if not ref.expired() and ref.cdata not in returned]
            self.alive = None

        return module.register_forward_pre_hook(begin), module.register_forward_hook(end)


@pytest.fixture
def recorder(comfy, monkeypatch):
    """A recorder where the core has its own: comfy.model_prefetch."""
    import comfy.model_prefetch

    found = Recorder()
    monkeypatch.setattr(comfy.model_prefetch, "pause_malloc_graph", found.pause, raising=False)
    return found


def sample_recorded(studio, recorder, patched, blocks, **options):
    """Sample with each of `blocks` recorded."""
    handles = [handle for block in blocks for handle in recorder.watch(block)]
    try:
        with recorder:
            return studio.sample(patched, **options)
    finally:
        for handle in handles:
            handle.remove()


CASES = {
    "windows": {"radius": 2},
    "pooled keys": {"radius": 2, "down_factor": 2},
    "some sites": {"radius": 2, "sites": "single"},
    "part of sampling": {"radius": 2, "end_percent": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_ours_outlives_a_recorded_block(studio, recorder, case):
    patched = studio.clear(studio.model, weights="none", **CASES[case])
    expected = studio.sample(patched, steps=2)
    module = patched.model.diffusion_model
    blocks = [*module.double_blocks, *module.single_blocks]
    assert torch.equal(sample_recorded(studio, recorder, patched, blocks, steps=2), expected)
    assert recorder.left == [] and recorder.pauses > 0
    recorder.left.clear()
    sample_recorded(studio, recorder, studio.model, blocks, steps=2)
    assert recorder.left == [], "the model itself keeps something, so this test shows nothing"


@pytest.mark.parametrize("kind", ["LinearizeLinear", "LinearizeHybrid"])
def test_nothing_of_feature_maps_outlives_a_recorded_block(studio, comfy, recorder, kind):
    with torch.inference_mode():
        patched = comfy.node(kind)(model=studio.model)[0]
    module = patched.model.diffusion_model
    sample_recorded(studio, recorder, patched, [*module.double_blocks, *module.single_blocks])
    assert recorder.left == [] and recorder.pauses > 0
    assert studio.record(patched).share_linearized == 1.0


@pytest.mark.parametrize("whole", [False, True])
def test_nothing_outlives_a_recorded_block_where_modules_tell_the_site(wan, recorder, whole):
    """`whole`: the recording holds the whole forward, with what wraps it, as for MiniMax H3."""
    patched = wan.clear(wan.model, radius=2)
    module = patched.model.diffusion_model
    expected = wan.sample(patched)
    found = sample_recorded(wan, recorder, patched, [module] if whole else module.blocks)
    assert torch.equal(found, expected)
    assert recorder.left == [] and recorder.pauses > 0


def test_a_forward_is_prepared_outside_of_the_recording(wan, recorder, monkeypatch):
    """Backends test themselves then, and compile, which allocates what stays."""
    patched = wan.clear(wan.model, radius=2, backend="torch")
    host, seen = type(wan.patching.runtime_of(patched).host), []
    chosen, layout = wan.runtime.choose_backend, host.layout
    monkeypatch.setattr(host, "layout", lambda *given: (seen.append(recorder.paused), layout(*given))[1])
    monkeypatch.setattr(wan.runtime, "choose_backend", lambda *of: (seen.append(recorder.paused), chosen(*of))[1])
    sample_recorded(wan, recorder, patched, [patched.model.diffusion_model], steps=1)
    assert len(seen) == 2 and all(seen)


@pytest.mark.parametrize("share", ["dense", "windows"])
def test_a_step_records_what_the_next_one_replays(studio, recorder, share):
    """Dense steps and steps on windows allocate the same inside the recording: attention allocates nothing there."""
    counts = []
    dispatch = Recorder.__torch_dispatch__

    def counted(self, func, types, args=(), kwargs=None):
        before = len(self.alive) if self.alive is not None else 0
        output = dispatch(self, func, types, args, kwargs)
        counts[-1] += (len(self.alive) if self.alive is not None else 0) - before
        return output

    patched = studio.clear(studio.model, radius=2, **({"start_percent": 0.99} if share == "dense" else {}))
    module = patched.model.diffusion_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "__torch_dispatch__", counted)
        counts.append(0)
        sample_recorded(studio, recorder, patched, [*module.double_blocks, *module.single_blocks], steps=1)
        counts.append(0)
        other = studio.clear(studio.model, radius=2)
        sample_recorded(studio, recorder, other, [*module.double_blocks, *module.single_blocks], steps=1)
    assert counts[0] == counts[1] > 0


def test_pauses_inside_each_other_end_with_the_outermost(comfy, recorder):
    pause = comfy.module("patching.patcher").pause_recording
    with pause():
        with pause():
            assert recorder.paused
        assert recorder.paused, "the inner pause ended the outer one"
    assert not recorder.paused and recorder.pauses == 1


def test_the_pause_is_that_of_a_core_that_records(comfy, monkeypatch):
    """Wherever this ComfyUI defines a pause, the pack enters that one; a name in another module would do nothing."""
    import comfy as package

    defined = []
    for path in sorted(Path(package.__path__[0]).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "def pause_malloc_graph" in text:
            names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
            assert "pause_malloc_graph" in names
            parts = path.relative_to(Path(package.__path__[0]).parent).with_suffix("").parts
            defined.append(".".join(parts))
    entered = []
    for name in defined:
        monkeypatch.setattr(
            importlib.import_module(name),
            "pause_malloc_graph",
            lambda: entered.append(True) or contextlib.nullcontext(),
        )
    with comfy.module("patching.patcher").pause_recording():
        pass
    assert len(entered) == len(defined) <= 1
