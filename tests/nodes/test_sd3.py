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
