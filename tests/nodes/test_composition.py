"""CLEAR beside the other things people wire: each case checks the picture and, from the run record, what ran."""

import functools
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


def replacing(model, override):
    """Return a clone on which a later node overwrote the slot and chains nothing."""
    replaced = model.clone()
    replaced.model_options["transformer_options"][OVERRIDE] = override
    return replaced


@pytest.mark.parametrize("kind", ["function", "partial", "object", "core"])
def test_a_later_node_that_replaces_our_override_is_put_below_it(studio, everywhere, kind):
    """KJNodes' way, and that of the core's Model Attention Backend: it keeps what stays dense, and is named."""
    calls = []

    def replacement(func, q, *args, **kwargs):
        calls.append(kwargs["transformer_options"]["block_type"])
        return func(q, *args, **kwargs)

    class Replacement:
        def __call__(self, *args, **kwargs):
            return replacement(*args, **kwargs)

    def set_model_optimized_attention():
        return lambda func, *args, **kwargs: replacement(func, *args, **kwargs)

    made = {
        "function": (replacement, "another override (test_a_later_node_that_replaces_our_override_is_put_below_it of "),
        "partial": (functools.partial(replacement), "another override (test_a_later_node"),
        "object": (Replacement(), "another override (test_a_later_node"),
        "core": (set_model_optimized_attention(), "Model Attention Backend"),
    }
    override, name = made[kind]
    if kind == "core":
        override.__qualname__ = "ModelPatcher.set_model_optimized_attention.<locals>.optimized_attention_override"
    patched = studio.clear(studio.model, radius=2)
    replaced = replacing(patched, override)
    assert torch.equal(studio.sample(replaced), studio.sample(patched))
    assert studio.ran(replaced) == everywhere and not calls
    summary = studio.record(replaced).summary()
    assert f"\n{name}" in summary and "comes after this node; it runs the calls that stay dense" in summary
    assert replaced.model_options["transformer_options"][OVERRIDE] is override, "the options that came in were changed"
    part = replacing(studio.clear(studio.model, radius=2, sites="single"), override)
    studio.sample(part)
    assert set(calls) == {"double"}


def test_a_replaced_override_and_a_compiled_model(studio):
    """One override of ours stands over theirs for all forwards: a new one each time would be compiled each time."""

    def replacement(func, *args, **kwargs):
        return func(*args, **kwargs)

    seen = []

    def look(executor, *args, **kwargs):
        options = next(each for each in (*args, *kwargs.values()) if isinstance(each, dict) and OVERRIDE in each)
        seen.append(options[OVERRIDE])
        return executor(*args, **kwargs)

    patched = replacing(studio.clear(studio.model, radius=2), replacement)
    patched.add_wrapper_with_key("diffusion_model", "z", look)  # inside ours
    studio.sample(patched, steps=3)
    assert len(seen) == 3 and len({id(each) for each in seen}) == 1 and seen[0].previous is replacement


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


def test_a_core_node_that_puts_itself_on_top_each_step(studio, everywhere):
    """As the sparse attention node of newer cores, installed anew at every step: the plan's sites stay ours."""
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
    expected = studio.sample(studio.clear(studio.model, radius=2), steps=2)
    assert torch.equal(studio.sample(patched, steps=2), expected) and not taken
    assert studio.ran(patched) == everywhere
    part = studio.clear(studio.model, radius=2, sites="double").clone()
    part.add_callback_with_key(event, "block_sparse_attention", install)
    studio.sample(part, steps=2)
    assert len(taken) == 2 * 2
    assert {r.site for r in studio.record(part).ran} == {"double.0", "double.1"}


class Container:
    """One tensor with a single owner, as newer cores hand q, k and v over."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None, "the container was emptied before"
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


def with_containers(monkeypatch, kept):
    """Have the core's attention behave as ComfyUI 0.32: the model's calls come in containers.

    Args:
        kept: for each call, what stood in its containers when it was over.
    """
    import comfy.ldm.flux.math as flux_math
    import comfy.ldm.modules.attention as core

    plain = flux_math.optimized_attention

    def attention(q, k, v, heads, **kwargs):
        override = (kwargs.get("transformer_options") or {}).get(OVERRIDE)
        if isinstance(q, Container):  # what an override gave on
            return plain(q.take(), k.take(), v.take(), heads, **kwargs)
        if override is None or "_inside_attn_wrapper" in kwargs:
            return plain(q, k, v, heads, **kwargs)
        owned = tuple(Container(tensor) for tensor in (q, k, v))
        if hasattr(override, "container_function"):
            output = override.container_function(*owned, heads, **kwargs, _inside_attn_wrapper=True)
        else:
            inside = {**kwargs, "_inside_attn_wrapper": True}
            output = override(plain, *(each.take() for each in owned), heads, **inside)
        kept.append([each.tensor for each in owned])
        return output

    monkeypatch.setattr(flux_math, "optimized_attention", attention)
    monkeypatch.setattr(core, "optimized_attention", attention)


@pytest.mark.parametrize("sites", ["all", "single"])
def test_single_owner_containers_of_newer_cores(studio, monkeypatch, sites):
    """Containers are empty after the call, whoever ran it, so that the tensors are freed as early as the core does."""
    patched = studio.clear(studio.model, radius=2, sites=sites)
    expected, before, kept = studio.sample(patched), studio.record(patched).ran, []
    with_containers(monkeypatch, kept)
    assert torch.equal(studio.sample(patched), expected) and studio.record(patched).ran == before
    assert len(kept) == 2 * 4 and all(each == [None] * 3 for each in kept)


@pytest.mark.parametrize("takes_containers", [True, False])
def test_an_override_below_ours_gets_containers_where_it_takes_them(studio, monkeypatch, takes_containers):
    import comfy.ldm.modules.attention as core

    got = []

    def other(func, q, k, v, heads, **kwargs):
        got.append(type(q))
        return func(q, k, v, heads, **kwargs)

    def container_function(q, k, v, heads, **kwargs):
        got.append(type(q))
        return core.optimized_attention(q, k, v, heads, **kwargs)

    if takes_containers:
        other.container_function = container_function
    patched = replacing(studio.clear(studio.model, radius=2, sites="double"), other)
    expected, got[:] = studio.sample(patched), []
    with_containers(monkeypatch, [])
    assert torch.equal(studio.sample(patched), expected)
    assert got == [Container if takes_containers else torch.Tensor] * 4


def test_containers_and_a_mask_that_ends_in_dense_attention(studio, monkeypatch):
    kept, positive = [], studio.condition()
    positive[0][1].update(attention_mask=torch.full((1, 108, 108), -1.0), attention_mask_img_shape=(8, 12))
    patched = studio.clear(studio.model, radius=2)
    expected = studio.sample(studio.model, positive=positive)
    with_containers(monkeypatch, kept)
    with studio.runtime.expect_declines("mask"):
        assert torch.equal(studio.sample(patched, positive=positive), expected)
    assert len(kept) == 2 * 4 and all(each == [None] * 3 for each in kept)


@pytest.mark.parametrize("containers", [False, True])
def test_dense_and_declined_calls_keep_the_attention_that_a_checkpoint_names(studio, monkeypatch, containers):
    """Newer cores use a layer's `preferred_attention` only where no override stands; ours has to keep it."""
    import comfy.ldm.flux.math as flux_math

    plain, used = flux_math.optimized_attention, []

    def preferred(q, k, v, heads, **kwargs):
        q, k, v = (each.take() if isinstance(each, Container) else each for each in (q, k, v))
        used.append(kwargs["transformer_options"]["block_type"])
        return plain(q, k, v, heads, **kwargs) * 0.5

    class Named(torch.nn.Module):
        function = staticmethod(preferred)

    model = studio.model.clone(disable_dynamic=True, force_deepcopy=True)
    for block in (*model.model.diffusion_model.double_blocks, model.model.diffusion_model.single_blocks[1]):
        block.comfy_attention = Named()
    patched = studio.clear(model, radius=2, sites="double.0, single.0")
    if containers:
        with_containers(monkeypatch, [])
    studio.sample(patched, steps=3)
    assert used == ["double", "single"] * 3, "double.1 and single.1 have an attention of their own, single.0 has none"
    used.clear()
    earlier = studio.clear(replacing(model, lambda func, *args, **kwargs: func(*args, **kwargs)), sites="double.0")
    studio.sample(earlier, steps=1)
    assert used == [], "the core gives an override precedence over it"


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
