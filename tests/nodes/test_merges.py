"""ComfyUI's own merges of a student's model: what the weights are then, and that the status says it."""

import pytest
import torch

KEY = "diffusion_model.double_blocks.0.img_attn.qkv"


@pytest.fixture(scope="module")
def other(comfy, studio):
    """Another model of the same shape, as a loader and a LoRA of full strength give it."""
    model = studio.model.clone()
    generator = torch.Generator().manual_seed(7)
    for key in (f"{KEY}.weight", "diffusion_model.single_blocks.1.linear2.weight"):
        shape = model.model_state_dict()[key].shape
        model.add_patches({key: ("diff", (torch.randn(shape, generator=generator) * 0.05,))})
    return model


@pytest.fixture
def student(comfy):
    """A function: a student of hybrid attention everywhere, with a change of the first projection or without."""
    files, plans, specs = (comfy.module(f"attention.{name}") for name in ("student_file", "plans", "specs"))
    students = comfy.module("attention.student")

    def make(with_change=True):
        generator = torch.Generator().manual_seed(3)
        up, down = torch.randn(768, 4, generator=generator) * 0.1, torch.randn(4, 256, generator=generator) * 0.1
        deltas = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down} if with_change else {}
        spec = specs.HybridSpec(2, "hedgehog")
        parameters = {
            f"{site}.{part}.{name}": value.detach()
            for site in ("double.0", "double.1", "single.0", "single.1")
            for part, each in zip(("phi_q", "phi_k"), students.new_maps(spec, 2, 128), strict=True)
            for name, value in each.named_parameters()
        }
        return files.StudentFile("flux", plans.Plan("flux", spec), parameters=parameters, deltas=deltas), up @ down

    return make


def weight(model, key=f"{KEY}.weight"):
    import comfy.model_management

    comfy.model_management.load_models_gpu([model])
    return model.get_model_object(key).detach().clone()


def merge(name, first, second, **inputs):
    from comfy_extras import nodes_model_merging

    with torch.inference_mode():
        return getattr(nodes_model_merging, name)().merge(first, second, **inputs)[0]


CASES = {  # a merge, its inputs, and the shares of the first and of the second model's weights in the first projection
    "ModelMergeSimple": ({"ratio": 0.5}, 0.5, 0.5),
    "ModelMergeBlocks": ({"other": 1.0, "double_blocks.0.": 0.25, "final_layer.": 0.5}, 0.25, 0.75),
    "ModelAdd": ({}, 1.0, 1.0),
    "ModelSubtract": ({"multiplier": 0.3}, 0.3, -0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_merge_leaves_of_a_student_is_said(comfy, studio, student, other, name):
    made, change = student()
    inputs, first, second = CASES[name]
    before, theirs = weight(studio.model), weight(other)
    patched = comfy.node("LinearizeApply")(model=studio.model, attention=made)[0]
    merged = merge(name, patched, other, **inputs)
    assert torch.allclose(weight(merged), first * (before + change) + second * theirs, atol=1e-5)
    assert studio.sample(merged, steps=1).isfinite().all()
    said = studio.record(merged).summary()
    assert set(studio.ran(merged).values()) == {("hybrid", "torch")}, "plan and maps are those of the first model"
    if first == 1.0:
        assert "another node merged weights into this model that were not trained for its attention" in said
    else:
        assert f"its trained changes of weights count {first:.0%}, while its plan and feature maps run whole" in said
    studio.sample(patched, steps=1)
    assert "merged" not in studio.record(patched).summary()


def test_a_merge_that_takes_nothing_is_none(comfy, studio, student, other):
    patched = comfy.node("LinearizeApply")(model=studio.model, attention=student()[0])[0]
    merged = merge("ModelMergeSimple", patched, other, ratio=1.0)
    studio.sample(merged, steps=1)
    assert "merged" not in studio.record(merged).summary()


def test_maps_alone_are_of_other_weights_then(comfy, studio, student, other):
    patched = comfy.node("LinearizeApply")(model=studio.model, attention=student(with_change=False)[0])[0]
    merged = merge("ModelMergeSimple", patched, other, ratio=0.5)
    studio.sample(merged, steps=1)
    assert "that were not trained for its attention" in studio.record(merged).summary()
    untrained = studio.clear(studio.model, radius=3, weights="none")
    merged = merge("ModelMergeSimple", untrained, other, ratio=0.5)
    studio.sample(merged, steps=1)
    assert "merged" not in studio.record(merged).summary(), "nothing was trained, so nothing is lost"


def test_a_student_on_both_models_stays_whole(comfy, studio, student, other):
    """By what the patches hold: two nodes may have read one file."""
    made, change = student()
    one, two = (comfy.node("LinearizeApply")(model=model, attention=student()[0])[0] for model in (studio.model, other))
    merged = merge("ModelMergeSimple", one, two, ratio=0.25)
    expected = 0.25 * weight(studio.model) + 0.75 * weight(other) + change
    assert torch.allclose(weight(merged), expected, atol=1e-5)
    studio.sample(merged, steps=1)
    said = studio.record(merged).summary()
    assert "not trained for its attention" in said and "count" not in said


def test_a_student_behind_a_merge_is_whole(comfy, studio, student, other):
    """It changes what the merge made, under LoRAs from behind the merge, and has nothing to say of it."""
    from comfy.sd import load_lora_for_models

    made, change = student()
    merged = merge("ModelMergeSimple", studio.model, other, ratio=0.5)
    expected = 0.5 * weight(studio.model) + 0.5 * weight(other)
    assert torch.allclose(weight(merged), expected, atol=1e-5)
    up, down = torch.randn(768, 2) * 0.1, torch.randn(2, 256) * 0.1
    lora = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down}
    tuned = load_lora_for_models(merged, None, lora, 0.5, 0)[0]
    patched = comfy.node("LinearizeApply")(model=tuned, attention=made)[0]
    assert torch.allclose(weight(patched), expected + change + 0.5 * up @ down, atol=1e-5)
    studio.sample(patched, steps=1)
    assert "merged" not in studio.record(patched).summary()
    again = merge("ModelMergeSimple", patched, other, ratio=0.5)
    studio.sample(again, steps=1)
    assert "count 50%" in studio.record(again).summary()
