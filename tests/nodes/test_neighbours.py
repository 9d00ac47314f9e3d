"""What other packs do to a model while it samples: clones, caches that run blocks inside one, own attention."""

import gc

import pytest
import torch

CACHED = {"flux": ("double_blocks", "single_blocks"), "wan": ("blocks",)}


@pytest.fixture(params=["flux", "wan"])
def family(request, studio, wan):
    """FLUX, whose options name the block, and Wan, which tells its sites by module."""
    return studio if request.param == "flux" else wan


class InOne(torch.nn.Module):
    """All blocks of a list run inside one, as first-block caches do it. FLUX's double blocks are called by name."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, *args, **kwargs):
        for block in self.blocks:
            output = block(*args, **kwargs)
            if isinstance(output, tuple):
                kwargs.update(img=output[0], txt=output[1])
            else:
                args = (output, *args[1:])
        return output


def in_one(model, names):
    """Return a clone of a patched model whose blocks run inside one while it computes."""

    def wrapper(apply_model, given):
        module = cached.model.diffusion_model
        kept = {name: getattr(module, name) for name in names}
        try:
            for name, blocks in kept.items():
                setattr(module, name, torch.nn.ModuleList([InOne(blocks)]))
            return apply_model(given["input"], given["timestep"], **given["c"])
        finally:
            for name, blocks in kept.items():
                setattr(module, name, blocks)

    cached = model.clone()
    cached.set_model_unet_function_wrapper(wrapper)
    return cached


@pytest.fixture
def radii(comfy):
    """A function: a clone whose sites each have a radius of their own, so that a site told wrong changes the result."""

    def patch(family):
        model = family.model
        with torch.inference_mode():
            for index, site in enumerate(site_ids(family)):
                model = family.clear(model, radius=2 + index, weights="none", sites=site)
        return model

    return patch


def site_ids(family):
    host, module = family.patching.host_of(family.model)
    return [site.id for site in host.sites(module)]


def test_blocks_that_run_inside_one_keep_their_sites(family, radii, request):
    name = "wan" if "wan" in request.node.callspec.id else "flux"
    patched = radii(family)
    expected, ran = family.sample(patched), family.record(patched).ran
    cached = in_one(patched, CACHED[name])
    assert torch.equal(family.sample(cached), expected)
    assert family.record(cached).ran == ran and family.record(cached).never_called == ()


def test_planned_sites_that_were_never_called_are_named(family, request):
    """A tuner or adapter that gives a block an attention of its own, or skips it: the share is that of the plan."""
    patched = family.clear(family.model, radius=2)
    module = patched.model.diffusion_model
    block = module.single_blocks[1] if hasattr(module, "single_blocks") else module.blocks[1]
    block.forward = lambda x, *args, **kwargs: x
    try:
        family.sample(patched)
    finally:
        del block.forward
    record = family.record(patched)
    lost, count = site_ids(family)[-1], len(site_ids(family))
    assert record.never_called == (lost,)
    assert record.share_linearized == 1 - 1 / count
    assert f"never called, 1 of {count} sites of the plan: {lost}; another node may run them" in record.summary()
    family.sample(patched)
    assert family.record(patched).never_called == () and family.record(patched).share_linearized == 1.0


def test_a_run_that_is_stopped_in_its_first_forward_misses_nothing(family):
    import comfy.model_management as management

    def stop(*_):
        raise management.InterruptProcessingException

    patched = family.clear(family.model, radius=2)
    module = patched.model.diffusion_model
    handle = (module.single_blocks if hasattr(module, "single_blocks") else module.blocks)[1].register_forward_pre_hook(
        stop
    )
    with pytest.raises(management.InterruptProcessingException):
        family.sample(patched)
    handle.remove()
    assert family.record(patched).ran and family.record(patched).never_called == ()


def test_sites_that_the_plan_leaves_dense_are_not_missed(family):
    first, *_, last = site_ids(family)
    patched = family.clear(family.model, radius=2, sites=first)
    family.sample(patched)
    assert last not in family.record(patched).planned and "never called" not in family.record(patched).summary()


def test_a_clone_that_is_loaded_and_dropped_takes_nothing_from_the_model_that_samples(family):
    """KJNodes' memory node loads a clone for the moment, and the sampling goes on with the model itself."""
    patched = family.clear(family.model, radius=2)
    expected = family.sample(patched)

    def load_a_clone(executor, model, *args, **kwargs):
        result = executor(model.clone(), *args, **kwargs)
        gc.collect()
        return result

    beside = patched.clone()
    beside.add_wrapper_with_key("prepare_sampling", "memory", load_a_clone)
    assert torch.equal(family.sample(beside), expected)
    assert family.record(beside).share_linearized == 1.0


def test_a_clone_that_is_dropped_between_steps(family):
    patched = family.clear(family.model, radius=2)
    expected = family.sample(patched, steps=3)

    def drop_a_clone(executor, *args, **kwargs):
        import comfy.model_management

        clone = patched.clone()
        comfy.model_management.load_models_gpu([clone])
        del clone
        gc.collect()
        return executor(*args, **kwargs)

    beside = patched.clone()
    beside.add_wrapper_with_key("apply_model", "other", drop_a_clone)
    assert torch.equal(family.sample(beside, steps=3), expected)
    assert family.record(beside).share_linearized == 1.0


def test_the_report_tells_what_a_sampler_that_clones_ran(family, comfy):
    """Ultimate SD Upscale and others sample a clone of the model that is connected."""

    def report():
        with torch.inference_mode():
            node = comfy.node("LinearizeReport")
            return node(model=patched, width=192, height=128, frames=1, after=True)[0].partition("\n\nplanned:")[0]

    patched = family.clear(family.model, radius=2)
    assert "this copy of the model was not sampled" in report()
    inside = patched.clone().clone()
    family.sample(inside)
    assert "of attention" in report() and report().endswith("(a copy of this model was sampled)")
    assert family.patching.runtime_of(inside).last_run() == family.record(inside).summary()
    family.sample(patched, steps=1)
    assert "a copy of this model" not in report(), "its own run is the better answer"


@pytest.mark.parametrize("masked", ["positive", "negative"])
def test_a_mask_on_one_half_of_the_guidance_keeps_both_dense(studio, masked):
    mask = {"attention_mask": torch.full((1, 108, 108), -1.0), "attention_mask_img_shape": (8, 12)}
    halves = {"positive": studio.condition("a"), "negative": studio.condition("b")}
    halves[masked][0][1].update(mask)
    patched, steps, sites = studio.clear(studio.model, radius=2), 3, 4
    with studio.runtime.expect_declines("mask"):
        studio.sample(patched, cfg=2.0, steps=steps, positive=halves["positive"], negative=halves["negative"])
    record = studio.record(patched)
    windows = sum(count for ran, count in record.ran.items() if ran.kind == "clear")
    assert sum(record.ran.values()) == 2 * steps * sites
    assert windows <= sites, "only before the mask was seen for the first time"
    assert (
        "an attention mask keeps the other half of the guidance dense, and both have to run alike" in record.summary()
    )


def test_a_mask_on_one_half_is_forgotten_with_the_run(studio):
    patched, positive = studio.clear(studio.model, radius=2), studio.condition("a")
    positive[0][1].update(attention_mask=torch.full((1, 108, 108), -1.0), attention_mask_img_shape=(8, 12))
    with studio.runtime.expect_declines("mask"):
        studio.sample(patched, cfg=2.0, positive=positive)
    studio.sample(patched, cfg=2.0)
    assert studio.record(patched).share_linearized == 1.0


SHIFTS = (1.0, 3.0, 5.0, 8.0)


@pytest.mark.parametrize("order", ["shift behind", "shift before"])
@pytest.mark.parametrize(("part", "steps"), [((0.2, 1.0), 20), ((0.5, 1.0), 8), ((0.0, 0.25), 8), ((0.25, 0.75), 4)])
def test_a_part_of_sampling_is_that_of_the_schedule_that_samples(wan, comfy, order, part, steps):
    """Of the simple schedule each step is an equal share, whatever the shift, and a step on the bound is inside."""
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    start, end = part

    def windows_in(shift):
        def shifted(model):
            return ModelSamplingSD3().patch(model, shift)[0]

        def clear(model):
            return wan.clear(model, radius=2, start_percent=start, end_percent=end)

        model = shifted(clear(wan.model)) if order == "shift behind" else clear(shifted(wan.model))
        wan.sample(model, steps=steps, size=(1, 4, 6))
        ran = wan.record(model).ran
        return sum(count for each, count in ran.items() if each.kind == "clear") // 2

    inside = [step for step in range(steps) if start - 1e-9 <= step / steps <= end + 1e-9]
    assert [windows_in(shift) for shift in SHIFTS] == [len(inside)] * len(SHIFTS)
