"""The pack in a real ComfyUI server on the CPU, driven over HTTP as any client would."""

import io
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def demo(**changes):
    """Return the shipped demo workflow in API form, with inputs of the CLEAR node changed, small and quick."""
    workflow = json.loads((ROOT / "lab" / "demo" / "api" / "clear_demo.json").read_text(encoding="utf-8"))
    for node in workflow.values():
        if node["class_type"] == "LinearizeCLEAR":
            node["inputs"].update(changes)
        if node["class_type"] == "EmptySD3LatentImage":
            node["inputs"].update(width=272, height=208)
        if node["class_type"] == "KSampler":
            node["inputs"].update(steps=2)
    return workflow


def node_id(workflow, class_type):
    return next(name for name, node in workflow.items() if node["class_type"] == class_type)


def without_clear(workflow):
    """Return the workflow with the CLEAR node taken out."""
    clear = node_id(workflow, "LinearizeCLEAR")
    source = workflow[clear]["inputs"]["model"]
    rest = {name: node for name, node in workflow.items() if name != clear}
    for node in rest.values():
        for name, value in node["inputs"].items():
            if value == [clear, 0]:
                node["inputs"][name] = source
    return rest


def picture(server, workflow, outputs):
    saved = outputs[node_id(workflow, "SaveImage")]["images"][0]
    return np.asarray(Image.open(io.BytesIO(server.image(saved))).convert("RGB"), dtype=np.int16)


def report(workflow, outputs):
    return outputs[node_id(workflow, "LinearizeReport")]["text"][0]


def test_the_shipped_workflow_paints_a_picture_on_clear(server):
    workflow = demo(radius=4)
    outputs = server.run(workflow)
    assert picture(server, workflow, outputs).std() > 1
    text = report(workflow, outputs)
    ran = text.partition("\n\nplanned:")[0]
    assert re.match(r"UNTRAINED · \d+ % of attention · 5 of 5 sites · .+ s a step", ran), ran
    assert "\nclear (torch): 5 sites" in ran and "dense (host)" not in ran and "of the calls" not in ran, ran
    assert outputs[node_id(workflow, "LinearizeReport")]["images"], "the report shows its map"


def test_a_radius_over_everything_paints_the_untouched_model(server):
    plain, covered, small = without_clear(demo()), demo(radius=1000), demo(radius=2)
    pictures = {}
    for name, workflow in (("plain", plain), ("covered", covered), ("small", small)):
        outputs = server.run(workflow)
        pictures[name] = picture(server, workflow, outputs)
        expected = "no Linearize node ran" if name == "plain" else "clear (torch): 5 sites"
        assert expected in report(workflow, outputs)
    assert np.abs(pictures["covered"] - pictures["plain"]).max() <= 1
    assert np.abs(pictures["small"] - pictures["plain"]).max() > 10


def test_a_saved_picture_carries_a_receipt_also_when_our_node_was_cached(server):
    for seed in (11, 12):
        workflow = demo(radius=5, sites="single")
        workflow[node_id(workflow, "KSampler")]["inputs"]["seed"] = seed
        saved = server.run(workflow)[node_id(workflow, "SaveImage")]["images"][0]
        (receipt,) = json.loads(Image.open(io.BytesIO(server.image(saved))).info["linearize"])
        assert receipt["plan"]["host"] == "flux"
        assert receipt["plan"]["sites"] == {
            "single.0-3": {
                "kind": "clear", "radius": 5, "temporal_radius": 0, "down_factor": 1, "proportional": False,
            }
        }  # fmt: skip
        assert receipt["weights"] == ["the model's own"]
        assert receipt["backends"] == ["torch"] and receipt["share_linearized"] == 1.0 and receipt["fell_back"] == []
        assert 0 < receipt["share_of_pairs"] < 1
    workflow = without_clear(demo())
    saved = server.run(workflow)[node_id(workflow, "SaveImage")]["images"][0]
    assert "linearize" not in Image.open(io.BytesIO(server.image(saved))).info


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"sites": "middle"}, "'middle' names no site of this model, which has double.0, single.0-3"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent must be below end_percent"),
    ],
)
def test_wrong_input_is_one_sentence_and_the_server_goes_on(server, live, inputs, words):
    with pytest.raises(live.ServerProblem) as problem:
        server.run(demo(**inputs))
    assert words in str(problem.value) and "LinearizeCLEAR" in str(problem.value)
    workflow = demo(radius=3, min_tokens=1)
    assert "clear (torch)" in report(workflow, server.run(workflow))


def high_res_demo():
    """Return the template's chain on the demo's model: paint small, enlarge the latent, repaint, compare both."""
    workflow = demo(radius=4)
    clear, sampler, save = (node_id(workflow, each) for each in ("LinearizeCLEAR", "KSampler", "SaveImage"))
    positive = workflow[sampler]["inputs"]["positive"]
    vae = workflow[node_id(workflow, "VAEDecode")]["inputs"]["vae"]
    add = {
        "up": ("LatentUpscaleBy", {"samples": [sampler, 0], "upscale_method": "bilinear", "scale_by": 2.0}),
        "high": ("LinearizeHighRes", {"model": [clear, 0], "width": 544, "height": 416, "strength": 0.7, "steps": 4,
                                      "shift": 3.0, "ntk_factor": 10.0}),
        "guider": ("BasicGuider", {"model": ["high", 0], "conditioning": positive}),
        "noise": ("RandomNoise", {"noise_seed": 1}),
        "euler": ("KSamplerSelect", {"sampler_name": "euler"}),
        "second": ("SamplerCustomAdvanced", {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["euler", 0],
                                             "sigmas": ["high", 1], "latent_image": ["up", 0]}),
        "picture": ("VAEDecode", {"samples": ["second", 0], "vae": vae}),
        "enlarged": ("VAEDecode", {"samples": ["up", 0], "vae": vae}),
        "compare": ("LinearizeCompare", {"image": ["picture", 0], "teacher": ["enlarged", 0]}),
    }  # fmt: skip
    workflow.update({name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in add.items()})
    workflow[save]["inputs"]["images"] = ["picture", 0]
    workflow[node_id(workflow, "LinearizeReport")]["inputs"].update(model=["high", 0], after=["second", 0])
    return workflow


def test_an_enlarged_picture_is_repainted_on_clear_and_compared(server):
    workflow = high_res_demo()
    outputs = server.run(workflow)
    assert picture(server, workflow, outputs).shape == (416, 544, 3)
    text = report(workflow, outputs)
    assert "clear radius 4 proportional True: 5 sites" in text
    assert "\nclear (torch): 5 sites" in text and "of the calls" not in text, text
    compared = outputs["compare"]
    assert compared["text"][0].startswith("544 x 416, 1 frame\nPSNR ") and len(compared["images"]) == 1


@pytest.mark.parametrize(
    "inputs", [{"radius": 0}, {"weights": "clear_local_8"}, {"backend": "flex"}, {"model": ["2", 7]}]
)
def test_the_schema_refuses_what_no_node_would_take(server, live, inputs):
    with pytest.raises(live.ServerProblem) as problem:
        server.queue(demo(**inputs))
    assert next(iter(inputs)) in str(problem.value)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"sites": "single.x"}, "cannot read 'single.x' in sites 'single.x'"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start_percent must be below end_percent"),
        ({"end_percent": 2.0}, "end_percent is from 0 to 1, got 2.0"),
    ],
)
def test_what_needs_no_model_is_refused_before_it_is_queued(server, live, inputs, words):
    with pytest.raises(live.ServerProblem) as problem:
        server.queue(demo(**inputs))
    assert words in str(problem.value)


def test_every_shipped_workflow_of_the_demo_is_accepted_whole(server):
    """ComfyUI runs what it accepts of a prompt and drops the rest, so its list of refused nodes has to be empty."""
    for path in sorted((ROOT / "lab" / "demo").rglob("api/*.json")):
        body = json.dumps({"prompt": json.loads(path.read_text(encoding="utf-8"))}).encode()
        request = urllib.request.Request(server.url + "/prompt", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            queued = json.load(reply)
        stop = json.dumps({"delete": [queued["prompt_id"]]}).encode()
        for where, what in (("/queue", stop), ("/interrupt", b"{}")):
            post = urllib.request.Request(server.url + where, what, {"Content-Type": "application/json"})
            urllib.request.urlopen(post, timeout=60).close()
        assert queued["node_errors"] == {}, path.name


def test_a_taken_port_is_one_sentence(server, live):
    port = int(server.url.rsplit(":", 1)[1])
    with pytest.raises(live.ServerProblem, match=f"port {port} is in use"), live.live_server(port):
        pass


def test_help_pages_locales_and_templates_are_served(server):
    for name in ("LinearizeCLEAR", "LinearizeReport", "LinearizeCompare", "LinearizeHighRes"):
        for page in (f"{name}.md", f"{name}/zh.md"):
            assert server.bytes(f"/extensions/linearize/docs/{page}").startswith(b"# ")
    texts = server.get("/i18n")
    for language in ("en", "zh"):
        assert "LinearizeCLEAR" in texts[language]["nodeDefs"]
    templates = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
    assert sorted(server.get("/workflow_templates")["linearize"]) == templates
    for name in templates:
        assert server.bytes(f"/api/workflow_templates/linearize/{name}.jpg")[:2] == b"\xff\xd8"
