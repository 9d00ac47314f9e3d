"""CLEAR on Stable Diffusion 3.5, whose forward ComfyUI wraps around the outer model only."""

import pytest
import torch

EVERYWHERE = dict.fromkeys(("joint.0", "image.0", "joint.1"), ("clear", "torch"))


@pytest.mark.parametrize("size", [(16, 24), (17, 23)], ids=["even", "odd"])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_radius_over_everything_equals_the_untouched_model(sd3, size, cfg):
    dense = sd3.sample(sd3.model, size=size, cfg=cfg)
    patched = sd3.clear(sd3.model, radius=100)
    clear = sd3.sample(patched, size=size, cfg=cfg)
    assert sd3.ran(patched) == EVERYWHERE
    assert (clear - dense).abs().max() < 1e-4


def test_a_small_radius_equals_the_reference(sd3):
    patched = sd3.clear(sd3.model, radius=2)
    clear = sd3.sample(patched)
    assert sd3.ran(patched) == EVERYWHERE
    assert (clear - sd3.sample(sd3.model)).abs().max() > 1e-2
    checked = sd3.clear(sd3.model, radius=2, backend="reference")
    assert (clear - sd3.sample(checked)).abs().max() < 1e-4


def test_a_second_node_replaces_the_wrapper(sd3):
    once = sd3.clear(sd3.model, radius=2)
    twice = sd3.clear(sd3.clear(sd3.model, radius=9), radius=2)
    assert torch.equal(sd3.sample(twice), sd3.sample(once))
    assert sd3.ran(twice) == EVERYWHERE
    assert sum(sd3.record(twice).ran.values()) == 2 * len(EVERYWHERE)


def test_calls_with_and_without_text_have_layouts_of_their_own(sd3):
    patched = sd3.clear(sd3.model, radius=2, sites="image")
    sd3.sample(patched, steps=1)
    assert sd3.ran(patched) == {"image.0": ("clear", "torch")}
    (layout,) = sd3.record(patched).layouts
    assert [(s.role, s.grid) for s in layout.segments] == [("main", (1, 8, 12))]


def test_torch_compile(sd3):
    """The layout is noted outside of what ComfyUI compiles, and must be each call's own all the same."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    patched = sd3.clear(sd3.model, radius=2, end_percent=0.5)
    compiled = patched.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager")
    for size in ((16, 24), (24, 16)):
        expected = sd3.sample(patched, size=size, steps=4)
        assert (sd3.sample(compiled, size=size, steps=4) - expected).abs().max() < 1e-4
        assert sd3.record(compiled).ran == sd3.record(patched).ran
        assert sd3.record(compiled).layouts == sd3.record(patched).layouts
    assert {(r.kind, r.backend) for r in sd3.record(compiled).ran} == {("clear", "torch"), ("dense", "host")}
    torch._dynamo.reset()
