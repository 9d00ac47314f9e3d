"""Linear, hybrid and chunked attention through the nodes: what ran, what stays the model's own, students and plans."""

import pytest
import torch

SITES = ("double.0", "double.1", "single.0", "single.1")


def run(comfy, node, model, **inputs):
    with torch.inference_mode():
        return comfy.node(node)(model=model, **inputs)


@pytest.mark.parametrize(
    ("node", "inputs", "kind"),
    [
        ("LinearizeLinear", {}, "linear"),
        ("LinearizeLinear", {"feature_map": "polynomial"}, "linear"),
        ("LinearizeHybrid", {"rate": 3}, "hybrid"),
        ("LinearizeHybrid", {"rate": 2, "feature_map": "hedgehog", "stabilizer": "lse"}, "hybrid"),
    ],
)
def test_every_site_runs_the_kind(comfy, studio, node, inputs, kind):
    model, plan = run(comfy, node, studio.model, **inputs)
    plain = studio.sample(studio.model, cfg=2.0)
    latent = studio.sample(model, cfg=2.0)
    assert studio.ran(model) == dict.fromkeys(SITES, (kind, "torch"))
    assert latent.isfinite().all() and (latent - plain).abs().max() > 1e-3
    assert {spec.kind for spec in plan.resolve(SITES).values()} == {kind}


def test_rate_1_paints_the_untouched_model(comfy, studio):
    model, _ = run(comfy, "LinearizeHybrid", studio.model, rate=1, feature_map="elu1")
    assert (studio.sample(model) - studio.sample(studio.model)).abs().max() < 1e-3
    assert studio.ran(model) == dict.fromkeys(SITES, ("hybrid", "torch"))


def test_a_plan_mixes_kinds_per_site(comfy, studio):
    plan = None
    for kind, sites in (
        ({"kind": "hybrid", "rate": 2, "feature_map": "favor", "stabilizer": "max", "feature_dim": 0}, "double"),
        ({"kind": "chunked", "chunk_frames": 2, "overlap_frames": 1, "causal": False, "feature_map": "elu1",
          "feature_dim": 0}, "single.0"),
        ({"kind": "dense"}, "double.0"),
    ):  # fmt: skip
        plan = comfy.node("LinearizeUniformPlan")(kind=kind, sites=sites, host="flux", plan=plan)[0]
    with torch.inference_mode():
        (model,) = comfy.node("LinearizeApply")(model=studio.model, attention=plan).args
    studio.sample(model)
    assert studio.ran(model) == {
        "double.0": ("dense", "host"), "double.1": ("hybrid", "torch"), "single.0": ("chunked", "torch"),
    }  # fmt: skip


@pytest.mark.parametrize("inputs", [{"min_tokens": 10**6}, {"start_percent": 0.99}])
def test_parts_of_sampling_and_small_calls_stay_dense(comfy, studio, inputs):
    model, _ = run(comfy, "LinearizeHybrid", studio.model, **inputs)
    assert torch.equal(studio.sample(model), studio.sample(studio.model))
    assert set(studio.ran(model).values()) == {("dense", "host")}


def test_two_nodes_in_a_row_work_as_one(comfy, studio):
    model, _ = run(comfy, "LinearizeHybrid", studio.model, sites="double", feature_map="hedgehog")
    model = studio.clear(model, radius=3, sites="double.1,single.1")
    studio.sample(model)
    assert studio.ran(model) == {
        "double.0": ("hybrid", "torch"), "double.1": ("clear", "torch"), "single.1": ("clear", "torch"),
    }  # fmt: skip
    assert set(studio.patching.runtime_of(model).parameters.by_site()) == {"double.0"}


def test_maps_are_counted_and_survive_a_deep_clone(comfy, studio):
    model, _ = run(comfy, "LinearizeHybrid", studio.model, sites="single", feature_map="polynomial")
    (patcher,) = model.additional_models["linearize"]
    per_map = 2 * (128 * 256 + 256 + 256 * 256 + 256)
    assert sum(parameter.numel() for parameter in patcher.model.parameters()) == 2 * 2 * per_map
    clone = model.clone()
    assert studio.patching.runtime_of(clone) is not studio.patching.runtime_of(model)
    make, arguments = patcher.cached_patcher_init
    deep = make(*arguments)
    for mine, theirs in zip(patcher.model.parameters(), deep.model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine is not theirs


@pytest.mark.parametrize(
    ("node", "inputs", "words"),
    [
        ("LinearizeLinear", {"feature_map": "elu1", "feature_dim": 12}, "feature map elu1 has 128 features here"),
        ("LinearizeHybrid", {"feature_map": "polynomial", "feature_dim": 7}, "even, got 7"),
        ("LinearizeHybrid", {"sites": "triple"}, "'triple' names no site"),
        ("LinearizeLinear", {"start_percent": 0.5, "end_percent": 0.2}, "start_percent must be below end_percent"),
    ],
)
def test_wrong_input_is_one_sentence(comfy, studio, node, inputs, words):
    options = dict(studio.model.model_options["transformer_options"])
    with pytest.raises(ValueError, match=words) as error:
        run(comfy, node, studio.model, **inputs)
    assert "\n" not in str(error.value)
    assert studio.model.model_options["transformer_options"] == options


def test_a_map_that_nobody_trained_is_named(comfy):
    specs, notes = comfy.module("attention.specs"), comfy.module("nodes.kind_inputs").untrained_notes
    assert len(notes([specs.ClearSpec(3), specs.HybridSpec(2, "favor")])) == 0
    assert "polynomial gives noise" in notes([specs.LinearSpec("polynomial")])[0]
