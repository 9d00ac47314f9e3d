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


SITES = ("double.0", "double.1", "single.0", "single.1")


@pytest.fixture
def student(comfy):
    """A function: a student of hybrid attention everywhere, with a change of the first projection or without."""
    files, plans, specs = (comfy.module(f"attention.{name}") for name in ("students.file", "plans", "specs"))
    students, candidates = (comfy.module(f"attention.students.{name}") for name in ("learned", "candidates"))

    def make(with_change=True):
        generator = torch.Generator().manual_seed(3)
        up, down = torch.randn(768, 4, generator=generator) * 0.1, torch.randn(4, 256, generator=generator) * 0.1
        deltas = {f"{KEY}.lora_up.weight": up, f"{KEY}.lora_down.weight": down} if with_change else {}
        spec = specs.HybridSpec(2, "hedgehog")
        parameters = {
            f"{site}.{part}.{name}": value.detach()
            for site in SITES
            for part, each in zip(("phi_q", "phi_k"), students.new_maps(spec, 2, 128), strict=True)
            for name, value in each.named_parameters()
        }
        file = files.StudentFile("flux", plans.Plan("flux", spec), parameters=parameters, deltas=deltas)
        return candidates.Candidates.of_student(file, dict.fromkeys(SITES, spec)), up @ down

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


@pytest.fixture
def in_graph(comfy):
    """A function: run something as node "2" of a prompt, whose other nodes are given as (class, inputs) by id."""
    from comfy_execution.graph import DynamicPrompt
    from comfy_execution.progress import reset_progress_state
    from comfy_execution.utils import CurrentNodeContext

    def run(work, **others):
        graph = {"1": ("UNETLoader", {}), "2": ("LinearizeApply", {"model": ["1", 0]}), **others}
        nodes = {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in graph.items()}
        reset_progress_state("here", DynamicPrompt(nodes))
        with CurrentNodeContext("here", "2"):
            return work()

    yield run
    reset_progress_state("", DynamicPrompt({}))


LORA = ("LoraLoaderModelOnly", {"model": ["2", 0], "lora_name": "a", "strength_model": 1.0})
SAMPLER = ("KSampler", {"model": ["2", 0], "seed": 1})
WEIGHTS_ONLY = {
    "sampled": ({"3": SAMPLER}, ()),
    "first of a merge": ({"3": ("ModelMergeSimple", {"model1": ["2", 0], "model2": ["1", 0]})}, ()),
    "second of a merge": ({"3": ("ModelMergeSimple", {"model1": ["1", 0], "model2": ["2", 0]})}, ("as model2",)),
    "second of another, behind a LoRA": (
        {"3": LORA, "4": ("ModelMergeFlux1", {"model1": ["1", 0], "model2": ["3", 0]}), "5": SAMPLER},
        ("ModelMergeFlux1",),
    ),
    "saved": ({"3": ("ModelSave", {"model": ["2", 0]})}, ("ModelSave writes weights only",)),
    "merged and saved": (
        {"3": ("ModelMergeAdd", {"model1": ["2", 0], "model2": ["1", 0]}), "4": ("CheckpointSave", {"model": ["3", 0]})
        },
        ("CheckpointSave writes weights only",),
    ),
    "distilled, and another model saved": (
        {
            "3": ("LinearizeTeacherSamples", {"model": ["2", 0]}),
            "4": ("LinearizeTransfer", {"samples": ["3", 0], "model": ["1", 0]}),
            "5": ("LinearizeApply", {"attention": ["4", 0], "model": ["1", 0]}),
            "6": ("ModelSave", {"model": ["5", 0]}),
        },
        (),
    ),
    "saved without it": ({"3": ("ModelSave", {"model": ["1", 0]}), "4": SAMPLER}, ()),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS_ONLY)
def test_who_takes_weights_without_the_attention_is_named(comfy, studio, student, in_graph, monkeypatch, case):
    """At once, because the model that they take may never be sampled."""
    from types import SimpleNamespace

    others, words = WEIGHTS_ONLY[case]
    shown = []
    server = SimpleNamespace(send_sync=lambda _, status, __: shown.append(status["text"]))
    import server as server_module

    monkeypatch.setattr(server_module.PromptServer, "instance", server, raising=False)
    apply, untrained = comfy.module("nodes.apply"), comfy.module("attention.plans").Plan("flux")
    made = student()[0]
    in_graph(lambda: apply.apply_student(studio.model, made, "2"), **others)
    assert len(shown) == len(words) and all(word in shown[0] for word in words)
    shown.clear()
    in_graph(lambda: apply.apply_plan(studio.model, untrained, "2"), **others)
    assert not shown, "nothing was trained"


def test_what_a_saved_model_holds(comfy, studio, student, tmp_path):
    """As the sentence says: the changes of weights, and dense attention when it is loaded."""
    import comfy.sd as comfy_sd

    made, change = student()
    patched = comfy.node("LinearizeApply")(model=studio.model, attention=made)[0]
    with torch.inference_mode():
        comfy_sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patched)
        loaded = comfy_sd.load_diffusion_model(str(tmp_path / "saved.safetensors"))
    assert torch.allclose(weight(loaded), weight(studio.model) + change, atol=1e-6)
    assert studio.patching.runtime_of(loaded) is None
