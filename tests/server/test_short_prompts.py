"""Prompts that name what a newcomer sees and nothing else, sent to every node of the pack."""

import pytest

from linearize.attention.plans import Plan
from linearize.attention.specs import ClearSpec
from linearize.attention.students.file import StudentFile, save_student

PLACE = {"sites": "all", "host": "flux"}
SIZE = {"width": 512, "height": 512}
STUDENT = "short_prompt.safetensors"
OPTIONAL = {"LinearizeTeacherSamples": {"positive"}, "LinearizeUniformPlan": {"plan"}}  # something has to come in


@pytest.fixture(scope="module")
def student(live):
    """A student in the server's folder, of windows that learned nothing."""
    path = live.BASE / "models" / "linearize" / STUDENT
    path.parent.mkdir(parents=True, exist_ok=True)
    sites = ("double.0", *(f"single.{number}" for number in range(4)))
    errors = dict.fromkeys(sites, 0.1)
    save_student(path, StudentFile("flux", Plan("flux", ClearSpec(3)), base_model="demo", site_errors=errors))
    yield path
    path.unlink()


def prompt(**steps):
    """Return a prompt of (class, inputs) by id, with the demo's model, a caption and a small latent."""
    steps |= {
        "unet": ("UNETLoader", {"unet_name": "linearize_lake_flux.safetensors", "weight_dtype": "default"}),
        "caption": ("LinearizeDemoCaption", {"caption": "dusk sun left mountains red house right pine left"}),
        "latent": ("EmptySD3LatentImage", {"width": 64, "height": 48, "batch_size": 1}),
    }
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in steps.items()}


MODEL, SAMPLES = ["unet", 0], {
    "samples": ("LinearizeTeacherSamples", {"model": ["unet", 0], "prompts": "", "latent_image": ["latent", 0],
                                            "name": "short", "seeds": 2, "steps": 1, "cfg": 1.0,
                                            "positive": ["caption", 0]}),
}  # fmt: skip
CLEAR = {"clear": ("LinearizeCLEAR", {"model": MODEL, "radius": 4, "weights": "auto"})}
LOAD = {"load": ("LinearizeLoadStudent", {"model": MODEL, "student": STUDENT})}
RUNS = prompt(
    **CLEAR, **SAMPLES, **LOAD,
    measured=("LinearizeCalibrate", {"model": MODEL, "positive": ["caption", 0], "latent_image": ["latent", 0],
                                     "target": "least error", "target.time_share": 0.5}),
    linear=("LinearizeLinear", {"model": MODEL, "feature_map": "relu"}),
    foveated=("LinearizeFoveated", {"model": ["linear", 0], "keep": 0.3}),
    hybrid=("LinearizeHybrid", {"model": ["foveated", 0], "rate": 2, "feature_map": "elu1"}),
    high=("LinearizeHighRes", {"model": ["clear", 0], **SIZE}),
    chunks=("LinearizeUniformPlan", {"kind": "chunked", "kind.chunk_frames": 2, "kind.overlap_frames": 1,
                                     "kind.causal": False, "kind.feature_map": "relu", **PLACE}),
    off=("LinearizeUniformPlan", {"kind": "dense", "plan": ["chunks", 0], **PLACE}),
    rated=("LinearizeUniformPlan", {"kind": "hybrid", "kind.rate": 2, "kind.feature_map": "elu1", "plan": ["off", 0],
                                    **PLACE}),
    mapped=("LinearizeUniformPlan", {"kind": "linear", "kind.feature_map": "elu1", "plan": ["rated", 0], **PLACE}),
    plan=("LinearizeUniformPlan", {"kind": "clear", "kind.radius": 3, "plan": ["mapped", 0], **PLACE}),
    apply=("LinearizeApply", {"model": MODEL, "attention": ["plan", 0]}),
    budget=("LinearizeBudgetPlan", {"model": MODEL, "student": ["load", 1], "budget": 0.9, "frames": 1, **SIZE}),
    errors=("LinearizeSiteErrors", {"student": ["budget", 0]}),
    compare=("LinearizeCompare", {"image": ["errors", 0], "teacher": ["errors", 0]}),
    saved=("LinearizeSaveStudent", {"student": ["load", 1], "name": "short_saved"}),
    publish=("LinearizePublish", {"student": STUDENT, "repo_id": "me/short", "private": True, "dry_run": True}),
    **{f"report {source}": ("LinearizeReport", {"model": [source, 0], **SIZE})
       for source in ("clear", "hybrid", "high", "apply", "load", "measured")},
)  # fmt: skip
# training takes minutes, so these are given a model that they refuse: no input was missing then
REFUSED = (
    prompt(**CLEAR, **SAMPLES, train=("LinearizeTransfer", {
        "model": ["clear", 0], "samples": ["samples", 0], "plans.plan0": ["plan", 0], "updates": 1,
    }), plan=("LinearizeUniformPlan", {"kind": "clear", "kind.radius": 3, **PLACE}),
       show=("LinearizeSiteErrors", {"student": ["train", 0]}), save=("PreviewImage", {"images": ["show", 0]})),
    prompt(**CLEAR, **SAMPLES, **LOAD, train=("LinearizeFinetune", {
        "model": ["clear", 0], "student": ["load", 1], "samples": ["samples", 0], "updates": 1, "preset": "ours",
        "rank": 0,
    }), show=("LinearizeSiteErrors", {"student": ["train", 0]}), save=("PreviewImage", {"images": ["show", 0]})),
)  # fmt: skip


def test_every_node_takes_a_prompt_with_what_a_newcomer_sees(server, live, student):
    outputs = server.run(RUNS)
    for source, kind in (
        ("clear", "clear"),
        ("hybrid", "hybrid"),
        ("high", "clear"),
        ("apply", "clear"),
        ("load", "clear"),
    ):
        assert kind in outputs[f"report {source}"]["text"][0], source
    assert "measured 20" in outputs["report measured"]["text"][0]
    assert "dry run" in outputs["publish"]["text"][0] and outputs["saved"]["text"]
    for refused in REFUSED:
        with pytest.raises(live.ServerProblem, match="this model is linearized already"):
            server.run(refused)


def test_those_prompts_name_required_inputs_only_and_leave_no_node_out(server):
    nodes = server.get("/object_info")
    sent = [node for flow in (RUNS, *REFUSED) for node in flow.values() if node["class_type"].startswith("Linearize")]
    for node in sent:
        named = {name.partition(".")[0] for name in node["inputs"]} - OPTIONAL.get(node["class_type"], set())
        assert named == set(nodes[node["class_type"]]["input"]["required"]), node["class_type"]
    pack = {
        name
        for name in nodes
        if name.startswith("Linearize") and not name.startswith(("LinearizeDemo", "LinearizeTest"))
    }
    assert pack <= {node["class_type"] for node in sent}
