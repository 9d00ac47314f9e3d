"""CLEAR beside the other things people wire: each case checks the picture and, from the run record, what ran."""

import contextlib
import importlib

import pytest
import torch

OVERRIDE = "optimized_attention_override"


def node_of(module, name):
    """Return a function that runs a stock node of ComfyUI with keyword inputs."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    if hasattr(cls, "PREPARE_CLASS_CLONE"):
        prepared = cls.PREPARE_CLASS_CLONE(None)
        return lambda **inputs: prepared.EXECUTE_NORMALIZED(**inputs).args[0]
    return lambda **inputs: getattr(cls(), cls.FUNCTION)(**inputs)[0]


def test_a_node_that_replaces_our_override_is_named(studio):
    """KJNodes' way: overwrite the slot, chain nothing."""

    def replacement(func, *args, **kwargs):
        return func(*args, **kwargs)

    patched = studio.clear(studio.model, radius=2)
    replaced = patched.clone()
    replaced.model_options["transformer_options"][OVERRIDE] = replacement
    assert torch.equal(studio.sample(replaced), studio.sample(studio.model))
    summary = studio.record(replaced).summary()
    assert (
        summary.startswith("no attention call reached this node: another override (") and "takes every call" in summary
    )


def test_an_override_that_was_there_keeps_what_we_decline(studio):
    """KJNodes' node before ours: it still runs the calls that a mask keeps dense."""
    calls = []

    def sage(func, q, k, v, heads, mask=None, **kwargs):
        calls.append(mask is not None)
        return func(q, k, v, heads, mask=mask, **kwargs)

    model = studio.model.clone()
    model.model_options["transformer_options"][OVERRIDE] = sage
    patched = studio.clear(model, radius=2)
    studio.sample(patched, steps=1)
    assert calls == []
    positive = studio.condition()
    positive[0][1]["attention_mask"] = torch.full((1, 108, 108), -1.0)
    positive[0][1]["attention_mask_img_shape"] = (8, 12)
    with studio.runtime.expect_declines("mask"):
        studio.sample(patched, positive=positive, steps=1)
    assert calls == [True] * 4


def test_a_core_node_that_puts_itself_on_top_each_step(studio):
    """As the sparse attention node of newer cores: installed anew at every step, it takes calls and chains the rest."""
    import comfy.patcher_extension

    taken = []

    def install(patcher, timestep, model_options):
        options = model_options["transformer_options"]
        previous = options.get(OVERRIDE)
        if getattr(previous, "sparse", False):
            return

        def sparse(func, q, k, v, heads, **kwargs):
            if kwargs["transformer_options"]["block_type"] == "single":
                taken.append(True)
                return func(q, k, v, heads, **kwargs)
            return previous(func, q, k, v, heads, **kwargs)

        sparse.sparse = True
        options[OVERRIDE] = sparse

    patched = studio.clear(studio.model, radius=2).clone()
    event = comfy.patcher_extension.CallbacksMP.ON_PREPARE_STATE
    patched.add_callback_with_key(event, "block_sparse_attention", install)
    studio.sample(patched, steps=2)
    assert taken
    assert {r.site for r in studio.record(patched).ran} == {"double.0", "double.1"}
    assert "runs before this node and takes the calls it wants" in studio.record(patched).summary()


def test_single_owner_containers_of_newer_cores(studio, monkeypatch):
    """Newer cores hand q, k, v over in containers that the callee may empty, but unwrap them for a plain override."""

    class Container:
        def __init__(self, tensor):
            self.tensor = tensor

        def take(self):
            tensor, self.tensor = self.tensor, None
            return tensor

    seen = []

    def newer_core(override):
        def call(func, q, k, v, heads, **kwargs):
            owned = [Container(t) for t in (q, k, v)]
            seen.append(hasattr(override, "container_function"))
            if seen[-1]:
                return override.container_function(func, *owned, heads, **kwargs)
            return override(func, *(each.take() for each in owned), heads, **kwargs)

        call.linearize_override = True
        return call

    patched = studio.clear(studio.model, radius=2)
    expected = studio.sample(patched)
    options = patched.model_options["transformer_options"]
    monkeypatch.setitem(options, OVERRIDE, newer_core(options[OVERRIDE]))
    assert torch.equal(studio.sample(patched), expected)
    assert seen and not any(seen)


def test_allocations_during_a_recorded_block_are_paused(studio, everywhere, monkeypatch):
    """A core that records allocations per block and aborts on one that outlives it unless the recording is paused."""
    import comfy.memory_management

    depth, kept = [0], []

    @contextlib.contextmanager
    def pause_malloc_graph():
        depth[0] += 1
        yield
        depth[0] -= 1

    monkeypatch.setattr(comfy.memory_management, "pause_malloc_graph", pause_malloc_graph, raising=False)
    patched = studio.clear(studio.model, radius=2)
    memory = studio.patching.runtime_of(patched).memory
    get = type(memory).get

    def watched(self, key, make, num_bytes):
        return get(self, key, lambda: (kept.append(depth[0]), make())[1], num_bytes)

    monkeypatch.setattr(type(memory), "get", watched)
    studio.sample(patched, steps=1)
    assert studio.ran(patched) == everywhere
    assert kept and all(kept), "something that outlives a call was allocated while the block was recorded"


def test_easy_cache_skips_steps(studio, everywhere):
    cached = node_of("nodes_easycache", "EasyCacheNode")(
        model=studio.clear(studio.model, radius=100),
        reuse_threshold=3.0,
        start_percent=0.0,
        end_percent=1.0,
        verbose=False,
    )
    plain = node_of("nodes_easycache", "EasyCacheNode")(
        model=studio.model, reuse_threshold=3.0, start_percent=0.0, end_percent=1.0, verbose=False
    )
    found, expected = studio.sample(cached, steps=8), studio.sample(plain, steps=8)
    assert (found - expected).abs().max() < 1e-5
    assert studio.ran(cached) == everywhere
    calls = sum(studio.record(cached).ran.values())
    assert 4 <= calls < 8 * 4, "the cache skipped no step, so this test shows nothing"


def test_context_windows(studio, everywhere):
    """Windows over the height of the latent: every call has a grid of its own."""

    def windows(model):
        return node_of("nodes_context_windows", "ContextWindowsManualNode")(
            model=model, context_length=8, context_overlap=2, context_schedule="standard_static", context_stride=1,
            closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False, cond_retain_index_list="",
            split_conds_to_windows=False,
        )  # fmt: skip

    patched = windows(studio.clear(studio.model, radius=100))
    assert (studio.sample(patched) - studio.sample(windows(studio.model))).abs().max() < 1e-5
    assert studio.ran(patched) == everywhere
    grids = {layout.grids[0][1] for layout in studio.record(patched).layouts}
    assert grids and (1, 8, 12) not in grids and {grid[2] for grid in grids} == {12}


def test_area_conditioning(studio, everywhere):
    """Conditionings with areas of their own sizes: the grid follows each call."""
    areas = studio.condition("a") + studio.condition("b", tokens=9)
    areas[0][1]["area"] = (10, 24, 0, 0)
    areas[1][1]["area"] = (10, 14, 6, 4)
    for each in areas:
        each[1].update(strength=1.0, set_area_to_bounds=False)
    patched = studio.clear(studio.model, radius=100)
    dense = studio.sample(studio.model, positive=areas, cfg=2.0)
    assert (studio.sample(patched, positive=areas, cfg=2.0) - dense).abs().max() < 1e-5
    assert studio.ran(patched) == everywhere
    grids = {layout.grids[0][1] for layout in studio.record(patched).layouts}
    assert grids == {(1, 5, 12), (1, 5, 7), (1, 8, 12)}


def test_a_controlnet(studio, everywhere):
    """Residuals from a ControlNet reach the model; windows stay."""
    import comfy.controlnet

    class Residuals(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            tokens = (x_noisy.shape[-2] // 2) * (x_noisy.shape[-1] // 2)
            residual = torch.randn(1, tokens, 256, generator=torch.Generator().manual_seed(7))
            return {"input": [residual, residual], "middle": [], "output": [residual]}

        def copy(self):
            return Residuals()

        def get_models(self):
            return []

        def pre_run(self, model, percent_to_timestep_function):
            pass

        def cleanup(self):
            pass

    positive = studio.condition()
    positive[0][1].update(control=Residuals(), control_apply_to_uncond=True)
    dense, plain = studio.sample(studio.model, positive=positive), studio.sample(studio.model)
    assert (dense - plain).abs().max() > 1e-3, "the residuals did nothing"
    patched = studio.clear(studio.model, radius=100)
    assert (studio.sample(patched, positive=positive) - dense).abs().max() < 1e-5
    assert studio.ran(patched) == everywhere


def test_torch_compile(studio):
    """ComfyUI's compile wrapper around the patched model; eager code generation, so that nothing is built here."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = studio.clear(studio.model, radius=3, end_percent=0.5)
    expected = studio.sample(patched, steps=4)
    compiled = patched.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert (studio.sample(compiled, steps=4) - expected).abs().max() < 1e-5
    assert studio.record(compiled).ran == studio.record(patched).ran, "the noise level of the first call was kept"
    # the same number of tokens on another grid: nothing of the first may be kept
    turned = studio.sample(patched, size=(24, 16), steps=4)
    assert (studio.sample(compiled, size=(24, 16), steps=4) - turned).abs().max() < 1e-5
    assert studio.record(compiled).ran == studio.record(patched).ran
    assert {(r.kind, r.backend) for r in studio.record(compiled).ran} == {("clear", "torch"), ("dense", "host")}
    torch._dynamo.reset()


def test_the_copy_for_another_gpu(studio, everywhere):
    """CFG split works on deep clones: each has a model, a runtime and a record of its own."""
    patched = studio.clear(studio.model, radius=3)
    expected = studio.sample(patched)
    deep = patched.deepclone_multigpu()
    assert deep.model is not patched.model
    assert studio.patching.runtime_of(deep) is not studio.patching.runtime_of(patched)
    assert torch.equal(studio.sample(deep), expected)
    assert studio.ran(deep) == everywhere


@pytest.mark.parametrize("first", ["clear", "lora"])
def test_a_lora_on_either_side(studio, everywhere, first):
    import comfy.sd

    generator = torch.Generator().manual_seed(1)
    name = "diffusion_model.single_blocks.0.linear1"
    lora = {
        f"{name}.lora_up.weight": torch.randn(768 + 1024, 4, generator=generator) * 0.1,
        f"{name}.lora_down.weight": torch.randn(4, 256, generator=generator) * 0.1,
    }

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    model = with_lora(studio.model)
    dense = studio.sample(model)
    assert (dense - studio.sample(studio.model)).abs().max() > 1e-3
    patched = studio.clear(model, radius=100) if first == "lora" else with_lora(studio.clear(studio.model, radius=100))
    assert (studio.sample(patched) - dense).abs().max() < 1e-5
    assert studio.ran(patched) == everywhere
