"""Schemas are for ever; wrong input is one clear sentence before sampling starts."""

import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# id, display name, category, inputs in order, outputs: changing any of these breaks workflows that people keep
SCHEMAS = {
    "LinearizeCalibrate": (
        "Calibrate Attention", "linearize",
        ["model", "positive", "latent_image", "target", "negative", "low_noise_model", "cfg", "steps", "candidates",
         "checks", "again"],
        ["MODEL", "ATTENTION_PLAN", "STRING", "IMAGE", "MODEL"],
    ),
    "LinearizeCLEAR": (
        "CLEAR Attention", "linearize",
        ["model", "radius", "weights", "temporal_radius", "down_factor", "proportional", "sites", "start_percent",
         "end_percent", "min_tokens", "backend"],
        ["MODEL", "ATTENTION_PLAN"],
    ),
    "LinearizeFoveated": (
        "Foveated Attention", "linearize",
        ["model", "keep", "radius", "top", "tile", "frames", "levels", "sites", "start_percent", "end_percent",
         "min_tokens", "backend"],
        ["MODEL", "ATTENTION_PLAN"],
    ),
    "LinearizeHybrid": (
        "Hybrid Attention", "linearize",
        ["model", "rate", "feature_map", "stabilizer", "feature_dim", "sites", "start_percent", "end_percent",
         "min_tokens", "backend"],
        ["MODEL", "ATTENTION_PLAN"],
    ),
    "LinearizeLinear": (
        "Linear Attention", "linearize",
        ["model", "feature_map", "feature_dim", "sites", "start_percent", "end_percent", "min_tokens", "backend"],
        ["MODEL", "ATTENTION_PLAN"],
    ),
    "LinearizeReport": (
        "Attention Report", "linearize/inspect", ["model", "width", "height", "frames", "after"], ["STRING", "IMAGE"],
    ),
    "LinearizeLoadStudent": (
        "Load Linearized Attention", "linearize", ["model", "student", "hub_file", "allow_download"],
        ["MODEL", "ATTENTION_STUDENT"],
    ),
    "LinearizeApply": ("Apply Linearized Attention", "linearize", ["model", "attention"], ["MODEL"]),
    "LinearizeUniformPlan": ("Uniform Plan", "linearize/plan", ["kind", "sites", "host", "plan"], ["ATTENTION_PLAN"]),
    "LinearizeTeacherSamples": (
        "Generate Teacher Samples", "linearize/distill",
        ["model", "prompts", "latent_image", "name", "clip", "positive", "negative", "seeds", "steps", "cfg",
         "sampler_name", "scheduler", "guidance", "first_seed", "prompts_file", "vae"],
        ["TEACHER_SAMPLES", "STRING"],
    ),
    "LinearizeTransfer": (
        "Distill Attention", "linearize/distill",
        ["model", "samples", "plans", "updates", "learning_rate", "loss", "queries", "replay", "repeats", "held_out",
         "output_draws", "seed", "gpus", "keep_unfinished"],
        ["ATTENTION_STUDENT", "LOSS_MAP"],
    ),
    "LinearizeFinetune": (
        "Fine-tune Student", "linearize/distill",
        ["model", "student", "samples", "updates", "preset", "rank", "block_updates", "full_rank", "map_rate",
         "delta_rate", "optimizer", "ema", "accumulation", "checkpointing", "warmup", "held_out", "seed",
         "preview_every", "gpus", "keep_unfinished", "vae"],
        ["ATTENTION_STUDENT", "LOSS_MAP"],
    ),
    "LinearizeBudgetPlan": (
        "Budget Plan", "linearize/plan",
        ["model", "student", "budget", "width", "height", "frames", "method", "keep_dense", "max_error", "count"],
        ["ATTENTION_STUDENT", "ATTENTION_PLAN", "STRING"],
    ),
    "LinearizeSaveStudent": (
        "Save Linearized Attention", "linearize/distill",
        ["student", "name", "base_model", "licence", "role", "pair_id"], ["STRING"],
    ),
    "LinearizePublish": (
        "Publish to Hub", "linearize/distill",
        ["student", "repo_id", "private", "dry_run", "replace_card", "picture"], ["STRING"],
    ),
    "LinearizeSiteErrors": ("Plot Site Errors", "linearize/inspect", ["student"], ["IMAGE"]),
    "LinearizeCompare": ("Compare with Teacher", "linearize/inspect", ["image", "teacher"], ["STRING", "IMAGE"]),
    "LinearizeHighRes": (
        "High-Resolution FLUX", "linearize",
        ["model", "width", "height", "strength", "steps", "shift", "ntk_factor"], ["MODEL", "SIGMAS"],
    ),
}  # fmt: skip

# what an API prompt has to name, for ever: one more here, and every stored prompt that lacks it is refused
REQUIRED = {
    "LinearizeCLEAR": {"model", "radius", "weights"},
    "LinearizeFoveated": {"model", "keep"},
    "LinearizeHybrid": {"model", "rate", "feature_map"},
    "LinearizeLinear": {"model", "feature_map"},
    "LinearizeReport": {"model", "width", "height"},
    "LinearizeLoadStudent": {"model", "student"},
    "LinearizeApply": {"model", "attention"},
    "LinearizeUniformPlan": {"kind", "sites", "host"},
    "LinearizeUniformPlan.clear": {"radius"},
    "LinearizeUniformPlan.dense": set(),
    "LinearizeUniformPlan.foveated": {"top"},
    "LinearizeCalibrate": {"model", "positive", "latent_image", "target"},
    "LinearizeCalibrate.least time": {"max_error"},
    "LinearizeCalibrate.least error": {"time_share"},
    "LinearizeUniformPlan.hybrid": {"rate", "feature_map"},
    "LinearizeUniformPlan.linear": {"feature_map"},
    "LinearizeUniformPlan.chunked": {"chunk_frames", "overlap_frames", "causal", "feature_map"},
    "LinearizeTeacherSamples": {"model", "prompts", "latent_image", "name", "seeds", "steps", "cfg"},
    "LinearizeTransfer": {"model", "samples", "plans", "updates"},
    "LinearizeFinetune": {"model", "student", "samples", "updates", "preset", "rank"},
    "LinearizeBudgetPlan": {"model", "student", "budget", "width", "height", "frames"},
    "LinearizeSaveStudent": {"student", "name"},
    "LinearizePublish": {"student", "repo_id", "private", "dry_run"},
    "LinearizeSiteErrors": {"student"},
    "LinearizeCompare": {"image", "teacher"},
    "LinearizeHighRes": {"model", "width", "height"},
}


def all_inputs(comfy):
    """Yield (node, or node and option of its dynamic input; its inputs)."""
    for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("Linearize") and f"custom_nodes.{ROOT.name}" == cls.RELATIVE_PYTHON_MODULE:
            inputs = cls.define_schema().inputs
            yield name, inputs
            for each in inputs:
                for option in getattr(each, "options", None) or ():
                    if hasattr(option, "inputs"):
                        yield f"{name}.{option.key}", option.inputs


def test_no_version_asks_for_an_input_that_an_earlier_one_did_not(comfy):
    found = {name: {each.id for each in inputs if not each.optional} for name, inputs in all_inputs(comfy)}
    assert found == REQUIRED
    for name, inputs in all_inputs(comfy):
        assert all(each.optional for each in inputs if each.advanced), f"{name}: advanced inputs are optional"
        widgets = [each for each in inputs if getattr(each, "default", None) is not None]
        # interfaces put optional widgets last; stored workflows name widgets by their place
        assert [each.id for each in sorted(widgets, key=lambda each: bool(each.optional))] == [
            each.id for each in widgets
        ], f"{name}: a required widget comes behind an optional one"


def test_what_is_left_out_is_what_the_widget_shows(comfy):
    module = comfy.module
    behind = {  # where the defaults of a node's **inputs stand
        "LinearizeFoveated": signature_defaults(module("nodes.kind_inputs").run_kind),
        "LinearizeHybrid": signature_defaults(module("nodes.kind_inputs").run_kind),
        "LinearizeLinear": signature_defaults(module("nodes.kind_inputs").run_kind),
        "LinearizeTransfer": vars_of(module("training.engine.recipe").TransferRecipe()),
        "LinearizeFinetune": vars_of(module("training.engine.recipe").FinetuneRecipe()),
        "LinearizeTeacherSamples": module("nodes.teacher_samples").ADVANCED,
    }
    specs = module("attention.specs")
    for name, inputs in all_inputs(comfy):
        node, _, option = name.partition(".")
        taken = {**behind.get(node, {}), **signature_defaults(comfy.nodes.NODE_CLASS_MAPPINGS[node].execute)}
        if option:
            taken = vars_of(specs.SPECS[option]()) if option in specs.SPECS and option != "dense" else {}
        for each in inputs:
            if each.optional:
                assert taken.get(each.id) == getattr(each, "default", None), f"{name}: {each.id}"


def signature_defaults(function):
    found = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in found if each.default is not each.empty}


def vars_of(data):
    return {each.name: getattr(data, each.name) for each in dataclasses.fields(data)}


def pack_nodes(comfy):
    return {name: cls for name, cls in comfy.nodes.NODE_CLASS_MAPPINGS.items() if name in SCHEMAS}


def test_schemas_are_as_published(comfy):
    found = {
        name: (
            (schema := cls.define_schema()).display_name,
            schema.category,
            [each.id for each in schema.inputs],
            [each.io_type for each in schema.outputs],
        )
        for name, cls in pack_nodes(comfy).items()
    }
    assert found == SCHEMAS


def test_a_newcomer_sees_three_inputs(comfy):
    inputs = comfy.nodes.NODE_CLASS_MAPPINGS["LinearizeCLEAR"].define_schema().inputs
    assert [each.id for each in inputs if not each.advanced] == ["model", "radius", "weights"]


def test_every_input_and_output_explains_itself(comfy):
    for cls in pack_nodes(comfy).values():
        schema = cls.define_schema()
        assert schema.description
        for each in (*schema.inputs, *schema.outputs):
            assert each.tooltip and each.tooltip.endswith("."), each


def test_locales_cover_every_node_and_input(comfy):
    for language in ("en", "zh"):
        texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
        assert set(texts) == set(SCHEMAS)
        for name, cls in pack_nodes(comfy).items():
            schema = cls.define_schema()
            assert set(texts[name]["inputs"]) == {each.id for each in schema.inputs}
            assert set(texts[name]["outputs"]) == {str(i) for i in range(len(schema.outputs))}
            if language == "en":
                assert texts[name]["display_name"] == schema.display_name
                assert texts[name]["description"] == schema.description
                for each in schema.inputs:
                    assert texts[name]["inputs"][each.id]["tooltip"] == each.tooltip


def test_every_node_has_a_help_page():
    for name in SCHEMAS:
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert (ROOT / "web" / "docs" / page).read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"radius": 0}, "radius is a whole number of at least 1"),
        ({"sites": "middle"}, "'middle' names no site of this model, which has double.0-1, single.0-1"),
        ({"sites": ""}, "cannot read ''"),
        ({"start_percent": 0.6, "end_percent": 0.4}, "start_percent must be below end_percent, got 0.6 and 0.4"),
    ],
)
def test_wrong_input(studio, inputs, words):
    with pytest.raises(ValueError) as error:
        studio.clear(studio.model, **inputs)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("node", ["LinearizeCLEAR", "LinearizeReport", "LinearizeHighRes"])
def test_unknown_models_are_refused(comfy, studio, node):
    model = studio.model.clone()
    model.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"does not know this model \(Linear\); it works on: FLUX.1"):
        comfy.node(node)(model=model)


def test_the_plan_that_comes_out(comfy, studio):
    first, plan = comfy.node("LinearizeCLEAR")(model=studio.model, radius=8).args
    _, merged = comfy.node("LinearizeCLEAR")(model=first, radius=4, sites="double.1").args
    assert plan.to_json() == {
        "format": "linearize/plan/1",
        "host": "flux",
        "default": {"kind": "dense"},
        "sites": {"double.0-1,single.0-1": clear_json(8)},
    }
    assert merged.to_json()["sites"] == {"double.0,single.0-1": clear_json(8), "double.1": clear_json(4)}


def clear_json(radius):
    return {"kind": "clear", "radius": radius, "temporal_radius": 0, "down_factor": 1, "proportional": False}


def test_report_before_and_after(comfy, studio):
    plain = comfy.node("LinearizeReport")(model=studio.model, width=1024, height=1024)
    assert "dense: 4 sites (double.0-1,single.0-1)" in plain[0] and "(100.0%)" in plain[0]
    patched = studio.clear(studio.model, radius=8, sites="single")
    before = comfy.node("LinearizeReport")(model=patched, width=1024, height=512)
    assert "2,304 tokens (256 global), 4 sites" in before[0]
    assert "clear radius 8: 2 sites (single.0-1)" in before[0] and "planned:" not in before[0]
    studio.sample(patched)
    after = comfy.node("LinearizeReport")(model=patched, after=object())
    outcome, sampled, *_ = after[0].split("\n")
    assert outcome.startswith("UNTRAINED · ") and "2 of 2 sites" in outcome
    assert sampled == "sampled: 192 x 128 pixels, 12 text tokens"
    picture = after[1]
    assert picture.shape[0] == 1 and picture.shape[3] == 3 and 0 <= float(picture.min()) < float(picture.max()) <= 1


def test_report_costs_are_those_of_the_cost_model(comfy, studio):
    """Dense: 4 sites x 2 heads x 4 D N^2 with N = 4096 + 256."""
    text = comfy.node("LinearizeReport")(model=studio.model)[0]
    assert f"{4 * 2 * 4 * 128 * 4352**2 / 1e9:.1f} GFLOP dense" in text


@pytest.mark.parametrize(("min_tokens", "size", "kept"), [(-1, 512, True), (-1, 1024, False), (0, 512, False)])
def test_report_says_which_kind_stays_dense_at_a_size(comfy, studio, min_tokens, size, kept):
    patched = studio.clear(studio.model, radius=8, min_tokens=min_tokens)
    text = comfy.node("LinearizeReport")(model=patched, width=size, height=size)[0]
    assert ("clear stays dense at this size, by min_tokens" in text) == kept == ("(100.0%)" in text)


def test_report_knows_from_how_many_tokens_a_kind_paid_in_the_last_run(comfy, studio):
    with torch.inference_mode():
        model = comfy.node("LinearizeFoveated")(model=studio.model, min_tokens=-1)[0]
        studio.patching.runtime_of(model).record.break_even = {"foveated": 1000}
        text = comfy.node("LinearizeReport")(model=model, width=512, height=512)[0]
    assert "stays dense" not in text, "512 pixels are 1024 tokens, for which the table says dense"


def test_the_status_is_shown_on_the_node(studio, comfy, monkeypatch):
    import types

    import server

    sent = []
    fake = types.SimpleNamespace(send_sync=lambda _, status, __: sent.append((status["node"], status["text"])))
    monkeypatch.setattr(server.PromptServer, "instance", fake, raising=False)
    settings = studio.runtime.SiteSettings(comfy.module("attention.specs").ClearSpec(2))
    sites = dict.fromkeys(("double.0", "single.1"), settings)
    patched, _ = studio.patching.patch_model(studio.model, sites, studio.node_status.show_on_node("17"))
    studio.sample(patched)
    assert [node for node, _ in sent] == ["17"]
    assert sent[0][1].startswith("UNTRAINED · 27 % of attention · 2 of 2 sites · ")


@pytest.mark.parametrize(
    ("info", "known"),
    [(None, ""), ({}, ""), ({"workflow": None}, ""), ({"workflow": "mine"}, ""), ({"workflow": {"id": "w"}}, "w")],
)
def test_a_status_comes_with_the_id_of_its_workflow_whatever_a_client_sends_as_one(comfy, monkeypatch, info, known):
    """ComfyUI's own nodes write the workflow into pictures as it is."""
    import types

    import server

    status, sent = comfy.module("nodes.node_status"), []
    graph = types.SimpleNamespace(has_node=lambda _: True, get_node=lambda _: {"class_type": "LinearizeCLEAR"})
    monkeypatch.setattr(status, "executing", lambda: types.SimpleNamespace(prompt_id="p", prompt=graph))
    running = [(0, "p", {}, {"extra_pnginfo": info}, [], {})]
    fake = types.SimpleNamespace(
        send_sync=lambda _, told, __: sent.append(told),
        prompt_queue=types.SimpleNamespace(get_current_queue_volatile=lambda: (running, [])),
    )
    monkeypatch.setattr(server.PromptServer, "instance", fake, raising=False)
    status.show_on_node("4")("text")
    assert [(told["type"], told["workflow"]) for told in sent] == [("LinearizeCLEAR", known)]
