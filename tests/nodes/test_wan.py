"""CLEAR on Wan beside the other things people wire: windows in space and time, and the hooks that name its sites."""

import gc
import importlib
import threading
import weakref

import pytest
import torch

OVERRIDE = "optimized_attention_override"
SITES = ("blocks.0", "blocks.1")
VACE_SITES = ("blocks.0", "vace.0", "blocks.1")
EVERYWHERE = dict.fromkeys(SITES, ("clear", "torch"))


def node_of(module, name):
    """Return a function that runs a stock node of ComfyUI with keyword inputs."""
    cls = getattr(importlib.import_module(f"comfy_extras.{module}"), name)
    prepared = cls.PREPARE_CLASS_CLONE(None)
    return lambda **inputs: prepared.EXECUTE_NORMALIZED(**inputs).args[0]


def hooked(model):
    """Return how many modules of a loaded model carry forward hooks."""
    return sum(bool(m._forward_hooks or m._forward_pre_hooks) for m in model.model.diffusion_model.modules())


@pytest.mark.parametrize("size", [(3, 8, 10), (2, 9, 7), (1, 8, 8)], ids=["even", "odd", "one frame"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_radius_over_everything_equals_the_untouched_model(wan, size, cfg):
    dense = wan.sample(wan.model, size=size, cfg=cfg)
    patched = wan.clear(wan.model, radius=100)
    clear = wan.sample(patched, size=size, cfg=cfg)
    assert wan.ran(patched) == EVERYWHERE
    assert (clear - dense).abs().max() < 1e-4


@pytest.mark.parametrize("temporal_radius", [0, 1, 2])
def test_windows_in_space_and_time_equal_the_reference(wan, temporal_radius):
    size, dense = (4, 12, 12), wan.sample(wan.model, size=(4, 12, 12))
    patched = wan.clear(wan.model, radius=2, temporal_radius=temporal_radius)
    clear = wan.sample(patched, size=size)
    assert wan.ran(patched) == EVERYWHERE
    assert (clear - dense).abs().max() > 1e-2
    checked = wan.clear(wan.model, radius=2, temporal_radius=temporal_radius, backend="reference")
    assert (clear - wan.sample(checked, size=size)).abs().max() < 1e-4


def test_text_as_long_as_the_video_is_left_alone(wan):
    """Cross-attention then has as many keys as queries, and runs with the options of a self-attention."""
    positive = wan.condition(tokens=60)
    dense = wan.sample(wan.model, positive=positive)
    patched = wan.clear(wan.model, radius=100)
    assert (wan.sample(patched, positive=positive) - dense).abs().max() < 1e-4
    assert wan.ran(patched) == EVERYWHERE
    assert sum(wan.record(patched).ran.values()) == 2 * len(SITES), "two steps, once each"


def test_vace_blocks_are_sites_of_their_own(vace):
    dense = vace.sample(vace.model)
    patched = vace.clear(vace.model, radius=100)
    assert (vace.sample(patched) - dense).abs().max() < 1e-4
    assert vace.ran(patched) == dict.fromkeys(VACE_SITES, ("clear", "torch"))
    some = vace.clear(vace.model, radius=1, sites="vace")
    assert (vace.sample(some) - dense).abs().max() > 1e-3
    assert vace.ran(some) == {"vace.0": ("clear", "torch")}


def test_subjects_joined_in_time(wan):
    """As Phantom does: frames of reference after the video, seen by all of it."""
    positive = wan.condition()
    positive[0][1]["time_dim_concat"] = torch.randn(1, 16, 2, 8, 10)
    dense = wan.sample(wan.model, positive=positive)
    patched = wan.clear(wan.model, radius=100)
    assert (wan.sample(patched, positive=positive) - dense).abs().max() < 1e-4
    (layout,) = wan.record(patched).layouts
    assert [(s.role, s.length) for s in layout.segments] == [("main", 60), ("reference", 40)]


def test_hooks_come_with_a_run_and_go_with_it(wan):
    """Modules are shared with the untouched model, and a switch between the two must not load it again."""
    seen = []

    def look(executor, *args, **kwargs):
        seen.append(hooked(patched))
        return executor(*args, **kwargs)

    patched = wan.clear(wan.model, radius=2)
    assert patched.injections == wan.model.injections
    expected, dense = wan.sample(patched), wan.sample(wan.model)
    watched = patched.clone()
    watched.add_wrapper_with_key("diffusion_model", "z", look)  # inside ours
    assert torch.equal(wan.sample(watched), expected)
    assert set(seen) == {len(SITES)}, "once each, however many clones there are"
    assert hooked(patched) == 0
    clone = wan.clear(patched.clone(), radius=2)
    assert torch.equal(wan.sample(clone), expected) and wan.ran(clone) == EVERYWHERE
    assert torch.equal(wan.sample(wan.model), dense)


def test_an_interrupt_inside_a_block_leaves_no_site_behind(wan):
    """ComfyUI's interrupt is a BaseException, for which PyTorch runs no hooks."""
    import comfy.model_management as management

    def stop(executor, *args, **kwargs):
        block = executor.class_obj.diffusion_model.blocks[1].self_attn
        handle = block.o.register_forward_pre_hook(lambda *_: interrupt())
        try:
            return executor(*args, **kwargs)
        finally:
            handle.remove()

    def interrupt():
        raise management.InterruptProcessingException

    patched = wan.clear(wan.model, radius=2)
    expected = wan.sample(patched)
    interrupted = patched.clone()
    interrupted.add_wrapper_with_key("apply_model", "test", stop)
    with pytest.raises(management.InterruptProcessingException):
        wan.sample(interrupted)
    positive = wan.condition(tokens=60)
    dense = wan.sample(wan.clear(wan.model, radius=100), positive=positive)
    assert (dense - wan.sample(wan.model, positive=positive)).abs().max() < 1e-4
    assert torch.equal(wan.sample(patched), expected) and wan.ran(patched) == EVERYWHERE


def test_an_error_inside_a_block_that_another_node_catches(wan):
    """A node that retries a block after an error: the site of the failed attempt is not the site of what follows."""

    def retry(args, extra):
        try:
            return extra["original_block"]({**args, "pe": None})
        except AttributeError:
            return extra["original_block"](args)

    patched = wan.clear(wan.model, radius=100)
    patched.set_model_patch_replace(retry, "dit", "double_block", 0)
    positive = wan.condition(tokens=60)
    dense = wan.sample(wan.model, positive=positive)
    assert (wan.sample(patched, positive=positive) - dense).abs().max() < 1e-4
    assert wan.ran(patched) == EVERYWHERE
    assert sum(wan.record(patched).ran.values()) == 2 * len(SITES)


def test_threads_do_not_see_each_others_sites(wan, comfy):
    """CFG split runs model calls in parallel threads; each has its own site."""
    hooks = comfy.module("attention.hosts.site_hooks")
    seen, both = {}, threading.Barrier(2)

    class Slow(torch.nn.Module):
        def forward(self, name):
            both.wait()
            seen[name] = hooks.current_site()
            both.wait()
            return name

    module = torch.nn.ModuleDict({"a": Slow(), "b": Slow()})
    remove = hooks.hook_sites(module, {"site.0": "a", "site.1": "b"})
    threads = [threading.Thread(target=module[name], args=(name,)) for name in "ab"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    remove()
    assert seen == {"a": "site.0", "b": "site.1"} and hooks.current_site() is None


def test_the_copy_for_another_gpu(wan):
    """CFG split works on deep clones: each has a model, hooks, a runtime and a record of its own."""
    patched = wan.clear(wan.model, radius=3)
    expected = wan.sample(patched)
    deep = patched.deepclone_multigpu()
    assert deep.model is not patched.model
    assert wan.patching.runtime_of(deep) is not wan.patching.runtime_of(patched)
    assert torch.equal(wan.sample(deep), expected)
    assert wan.ran(deep) == EVERYWHERE


def test_two_gpus_share_a_sampling(wan, monkeypatch):
    """ComfyUI runs each half of the guidance in a thread, on a model of its own, with the settings of the first."""
    texts = []
    monkeypatch.setattr(wan.node_status, "show_on_node", lambda *_: texts.append)
    patched = wan.clear(wan.model, radius=3)
    expected = wan.sample(patched, cfg=3.0)
    deep = patched.deepclone_multigpu(new_load_device=torch.device("cpu", 0))  # another name of the same device
    deep.is_multigpu_base_clone = True
    both = patched.clone()
    both.set_additional_models("multigpu", [deep])
    assert (wan.sample(both, cfg=3.0, steps=8) - wan.sample(patched, cfg=3.0, steps=8)).abs().max() < 1e-3
    assert (wan.sample(both, cfg=3.0) - expected).abs().max() < 1e-3
    assert wan.ran(both) == EVERYWHERE
    assert sum(wan.record(both).ran.values()) == 2 * 2 * len(SITES), "two steps, two halves"
    assert len(texts) == 4 and all("2 of 2 sites" in text for text in texts), "the idle copy told of its own run"
    (deep,) = both.get_additional_models_with_key("multigpu")
    assert hooked(both) == hooked(deep) == 0


def test_a_model_that_is_gone_takes_its_hooks_along(wan, comfy):
    import comfy.model_management

    with torch.inference_mode():
        (model,) = comfy_load("linearize_tiny_wan.safetensors")
    patched = wan.clear(model, radius=2)
    wan.sample(patched, steps=1)
    gone = weakref.ref(patched.model)
    comfy.model_management.unload_all_models()
    del model, patched
    gc.collect()
    assert gone() is None


def comfy_load(name, dtype="default"):
    import nodes

    return nodes.UNETLoader().load_unet(name, dtype)


@pytest.mark.parametrize("before", [True, False])
def test_another_override(wan, before):
    """Whichever came first, it keeps the calls that stay dense."""
    calls = []

    def other(func, q, k, v, heads, **kwargs):
        calls.append(q.shape[1] == k.shape[1])
        return (previous or func)(*((func,) if previous else ()), q, k, v, heads, **kwargs)

    model = wan.model.clone() if before else wan.clear(wan.model, radius=2)
    options = model.model_options["transformer_options"]
    previous = options.get(OVERRIDE)
    options[OVERRIDE] = other
    patched = wan.clear(model, radius=2) if before else model
    found = wan.sample(patched, steps=1)
    assert torch.equal(found, wan.sample(wan.clear(wan.model, radius=2), steps=1))
    assert wan.ran(patched) == EVERYWHERE
    assert calls == [False, False]


def test_easy_cache_skips_steps(wan):
    settings = {"reuse_threshold": 3.0, "start_percent": 0.0, "end_percent": 1.0, "verbose": False}
    easy = node_of("nodes_easycache", "EasyCacheNode")
    patched = easy(model=wan.clear(wan.model, radius=100), **settings)
    found, expected = wan.sample(patched, steps=8), wan.sample(easy(model=wan.model, **settings), steps=8)
    assert (found - expected).abs().max() < 1e-4
    assert wan.ran(patched) == EVERYWHERE
    assert 2 <= sum(wan.record(patched).ran.values()) < 8 * len(SITES), "the cache skipped no step"


def test_context_windows(wan):
    """Windows over frames, with the frame before each that ComfyUI prepends."""

    def windows(model):
        return node_of("nodes_context_windows", "WanContextWindowsManualNode")(
            model=model, context_length=17, context_overlap=5, context_schedule="standard_static", context_stride=1,
            closed_loop=False, fuse_method="pyramid", freenoise=False,
        )  # fmt: skip

    patched, size = windows(wan.clear(wan.model, radius=100)), (9, 8, 10)
    dense = wan.sample(windows(wan.model), size=size)
    assert (wan.sample(patched, size=size) - dense).abs().max() < 1e-4
    assert wan.ran(patched) == EVERYWHERE
    grids = {layout.grids[0][1] for layout in wan.record(patched).layouts}
    assert grids == {(5, 4, 5), (6, 4, 5)}


@pytest.mark.parametrize("first", ["clear", "lora"])
def test_a_lora_on_either_side(wan, first):
    import comfy.sd

    generator = torch.Generator().manual_seed(1)
    name = "diffusion_model.blocks.0.self_attn.q"
    lora = {
        f"{name}.lora_up.weight": torch.randn(256, 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, 256, generator=generator),
    }

    def with_lora(model):
        return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]

    model = with_lora(wan.model)
    dense = wan.sample(model)
    assert (dense - wan.sample(wan.model)).abs().max() > 1e-3
    patched = wan.clear(model, radius=100) if first == "lora" else with_lora(wan.clear(wan.model, radius=100))
    assert (wan.sample(patched) - dense).abs().max() < 1e-4
    assert wan.ran(patched) == EVERYWHERE


def test_an_fp8_base(wan):
    with torch.inference_mode():
        (model,) = comfy_load("linearize_tiny_wan.safetensors", "fp8_e4m3fn")
    assert "float8" in str(model.get_model_object("diffusion_model").blocks[0].self_attn.q.weight.dtype)
    dense = wan.sample(model)
    patched = wan.clear(model, radius=100)
    assert (wan.sample(patched) - dense).abs().max() < 1e-3
    assert wan.ran(patched) == EVERYWHERE


def test_torch_compile(wan):
    """Hooks under ComfyUI's compile wrapper, with cross-attention as long as the video; nothing is built here."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = wan.clear(wan.model, radius=2)
    positive = wan.condition(tokens=60)
    expected = wan.sample(patched, positive=positive)
    compiled = patched.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    assert (wan.sample(compiled, positive=positive) - expected).abs().max() < 1e-4
    assert wan.ran(compiled) == EVERYWHERE
    assert wan.record(compiled).ran == wan.record(patched).ran
    torch._dynamo.reset()


def test_another_instance_of_the_model(wan):
    """Cond LoRAs and Select Device move the model to another instance: hooks follow the model that runs."""
    patched = wan.clear(wan.model, radius=2)
    expected = wan.sample(patched)
    other = patched.clone(disable_dynamic=True, force_deepcopy=True)
    assert other.model is not patched.model
    assert torch.equal(wan.sample(other), expected) and wan.ran(other) == EVERYWHERE


def test_a_plan_for_some_sites_and_its_report(vace, comfy):
    kind = {"kind": "clear", "radius": 2, "temporal_radius": 1, "down_factor": 1, "proportional": False}
    with torch.inference_mode():
        plan = comfy.node("LinearizeUniformPlan")(kind=kind, sites="vace, blocks.1", host="wan")[0]
        patched = comfy.node("LinearizeApply")(model=vace.model, attention=plan)[0]
    latent = vace.sample(patched)
    assert vace.ran(patched) == dict.fromkeys(("vace.0", "blocks.1"), ("clear", "torch"))
    with torch.inference_mode():
        text = comfy.node("LinearizeReport")(model=patched, width=832, height=480, frames=81, after=latent)[0]
    assert "Wan, 832 x 480 x 81: 32,760 tokens (0 global), 3 sites: blocks.0-1, vace.0" in text
    assert "clear radius 2 temporal_radius 1: 2 sites (vace.0,blocks.1)" in text


def test_the_recipe_for_large_pictures_is_not_for_wan(wan, comfy):
    with pytest.raises(ValueError, match="this recipe is for FLUX.1, the model is Wan"):
        comfy.node("LinearizeHighRes")(model=wan.model, width=2048, height=2048)
