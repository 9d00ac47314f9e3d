"""Foveated Attention through its node: what ran, that keep 1 is dense, references, clips, plans, what is refused."""

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


def run(comfy, model, **inputs):
    with torch.inference_mode():
        return comfy.node("LinearizeFoveated")(model=model, **inputs)


@pytest.mark.parametrize("inputs", [
    {}, {"keep": 0.05}, {"keep": 0.5, "radius": 0}, {"top": 0.0, "radius": 2, "levels": 3, "tile": 4},
    {"tile": 3, "top": 0.2, "sites": "all"},
])  # fmt: skip
def test_every_site_runs_the_kind(comfy, studio, inputs):
    model, plan = run(comfy, studio.model, **{"keep": 0.15, **inputs})
    plain, latent = studio.sample(studio.model, cfg=2.0), studio.sample(model, cfg=2.0)
    assert studio.ran(model) == dict.fromkeys(SITES, ("foveated", "torch"))
    assert latent.isfinite().all() and (latent - plain).abs().max() > 1e-6
    assert {spec.kind for spec in plan.resolve(SITES).values()} == {"foveated"}


def test_keep_1_samples_what_dense_does(comfy, studio):
    model, _ = run(comfy, studio.model, keep=1.0)
    assert (studio.sample(model) - studio.sample(studio.model)).abs().max() < 1e-3
    assert studio.ran(model) == dict.fromkeys(SITES, ("foveated", "torch"))


def test_clips_have_tiles_of_several_frames(comfy, wan):
    _, plan = run(comfy, wan.model, keep=0.3)
    (spec,) = set(plan.resolve(("blocks.0",)).values())
    assert (spec.frames, spec.tile) == (5, 2)


def test_keep_is_about_the_share_that_is_seen(comfy):
    spec_of, cost = comfy.module("attention.planning.keep").spec_of_keep, comfy.module("attention.planning.cost")
    layouts = comfy.module("attention.layout")
    for keep in (0.05, 0.1, 0.15, 0.3, 0.6):
        for is_clip, grid in ((False, (1, 64, 64)), (False, (1, 48, 80)), (True, (10, 24, 32))):
            layout = layouts.TokenLayout.of([layouts.grid_segment("main", *grid)])
            spec = spec_of(keep, is_clip)
            share = cost.attention_cost(spec, layout, 1, 64).pairs / layout.num_tokens**2
            tile = spec.tile**2 * min(spec.frames, grid[0]) / layout.num_tokens
            assert keep - tile <= share <= keep + tile, (keep, grid)  # the tile itself, and a share rounded down


def test_tiles_are_wider_on_a_gpu_and_keep_stays_what_it_says(comfy):
    spec_of, cost = comfy.module("attention.planning.keep").spec_of_keep, comfy.module("attention.planning.cost")
    layouts = comfy.module("attention.layout")
    layout = layouts.TokenLayout.of([layouts.grid_segment("main", 1, 64, 64)])
    assert [spec_of(0.15, is_clip, on_gpu=True).tile for is_clip in (False, True)] == [8, 4]
    assert spec_of(0.15, False, tile=4, on_gpu=True).tile == 4, "a tile that is given stays"
    share = cost.attention_cost(spec_of(0.15, False, on_gpu=True), layout, 1, 64).pairs / layout.num_tokens**2
    assert abs(share - 0.15) <= 64 / 4096


def test_a_reference_as_large_as_the_picture_keeps_a_quarter_of_the_pairs(comfy):
    """Of 64 x 64 tokens, a reference of 64 x 64 and 512 of text; windows keep most, since they see every reference."""
    spec_of, cost = comfy.module("attention.planning.keep").spec_of_keep, comfy.module("attention.planning.cost")
    layouts, specs = comfy.module("attention.layout"), comfy.module("attention.specs")
    layout = layouts.TokenLayout.of((
        layouts.Segment("text", 512), layouts.grid_segment("main", 1, 64, 64), layouts.reference_segment((1, 64, 64)),
    ))  # fmt: skip
    shares = [cost.attention_cost(spec, layout, 1, 64).pairs / layout.num_tokens**2
              for spec in (spec_of(0.15, False), specs.ClearSpec(8))]  # fmt: skip
    assert shares[0] < 0.25 < 0.75 < shares[1]


@pytest.mark.parametrize(("inputs", "words"), [
    ({"top": 0.0, "radius": 0}, "radius or top is above 0"), ({"tile": 3, "levels": 2}, "tile is even"),
])  # fmt: skip
def test_what_cannot_be_is_a_sentence(comfy, studio, inputs, words):
    with pytest.raises(ValueError, match=words):
        run(comfy, studio.model, keep=0.15, **inputs)


def test_a_plan_holds_it(comfy, studio):
    kind = {"kind": "foveated", "top": 0.2, "levels": 2}
    plan = comfy.node("LinearizeUniformPlan")(kind=kind, sites="double", host="flux", plan=None)[0]
    with torch.inference_mode():
        (model,) = comfy.node("LinearizeApply")(model=studio.model, attention=plan).args
    studio.sample(model)
    assert studio.ran(model) == dict.fromkeys(SITES[:2], ("foveated", "torch"))
