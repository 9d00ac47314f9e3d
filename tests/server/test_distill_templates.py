"""The templates that distil, whole and with few updates: FLUX.1's on the demo's model in fp8, Wan's on a tiny one."""

import json
import re
import shutil
from pathlib import Path

import pytest

from linearize.lab.comfyui import BASE

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows" / "api"
DEMO = ROOT / "lab" / "demo" / "api" / "distill_demo.json"
NAME = "template_test"
FEW = {
    "LinearizeTeacherSamples": {"name": NAME, "seeds": 1, "steps": 2},
    "LinearizeTransfer": {"updates": 2, "held_out": 1, "output_draws": 1},
    "LinearizeFinetune": {"updates": 1, "block_updates": 1, "accumulation": 1, "held_out": 1},
    "LinearizeSaveStudent": {"name": NAME},
    "KSampler": {"steps": 2},
}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def clean(output):
    """No samples of the other model, and no student of an earlier run."""
    shutil.rmtree(output / "linearize" / NAME, ignore_errors=True)
    for path in (BASE / "models" / "linearize").glob(f"{NAME}_*.safetensors"):
        path.unlink()


def quick(workflow, prompts, stand_ins, sizes):
    """Return a template with few samples and updates, on other models, small; the budget is that of the real size."""
    changed = {}
    for key, node in workflow.items():
        kind, inputs = node["class_type"], {**node["inputs"], **FEW.get(node["class_type"], {})}
        if kind == "LinearizeTeacherSamples":
            inputs["prompts"] = "\n".join(prompts)
        if kind != "LinearizeBudgetPlan":
            inputs |= {name: value for name, value in sizes.items() if name in inputs}
        other = stand_ins(kind, inputs)
        changed[key] = other if other is not None else {"class_type": kind, "inputs": inputs}
    return changed


def of_type(workflow, kind):
    return [key for key, node in workflow.items() if node["class_type"] == kind]


def saved_text(workflow, outputs):
    """Return what Save Linearized Attention says, after checking that its file is there."""
    (key,) = of_type(workflow, "LinearizeSaveStudent")
    (path,) = (BASE / "models" / "linearize").glob(f"{NAME}_*.safetensors")
    text = outputs[key]["text"][0]
    assert path.name in text
    return text


def on_the_lake(kind, inputs):
    """Return what stands in for a node of FLUX.1's template: the demo's model in fp8, its autoencoder and captions."""
    demo = {node["class_type"]: node for node in load(DEMO).values()}
    if kind == "UNETLoader":
        unet = demo["UNETLoader"]["inputs"]["unet_name"]
        return {"class_type": kind, "inputs": {"unet_name": unet, "weight_dtype": "fp8_e4m3fn"}}
    if kind == "LinearizeUniformPlan" and inputs["kind"] == "clear":
        return {"class_type": kind, "inputs": {**inputs, "kind.radius": 2}}
    others = {"VAELoader": "VAELoader", "DualCLIPLoader": "LinearizeDemoTextEncoder",
              "CLIPTextEncode": "LinearizeDemoCaption"}  # fmt: skip
    return demo.get(others.get(kind, ""))


def test_flux_is_distilled_saved_and_compared(server):
    captions = load(DEMO)["4"]["inputs"]["prompts"].splitlines()[:3]
    sizes = {"width": 128, "height": 128}
    workflow = quick(load(FOLDER / "flux_dev_distill.json"), captions, on_the_lake, sizes)
    (apply,), (sampler, _) = of_type(workflow, "LinearizeApply"), of_type(workflow, "KSampler")
    report = {"model": [apply, 0], **sizes, "frames": 1, "after": [sampler, 0]}
    workflow["report"] = {"class_type": "LinearizeReport", "inputs": report}
    outputs = server.run(workflow)
    text = saved_text(workflow, outputs)
    assert "student of black-forest-labs/FLUX.1-dev (FLUX.1), licence flux-1-dev-non-commercial-license" in text
    ran = outputs["report"]["text"][0].partition("\n\nplanned:")[0]
    assert re.match(r"TRAINED · \d+ % of attention.* · 5 of 5 sites", ran) and "fell back" not in ran, ran
    (compare,), (save,) = of_type(workflow, "LinearizeCompare"), of_type(workflow, "SaveImage")
    assert "PSNR" in outputs[compare]["text"][0] and len(outputs[save]["images"]) == 1


def on_a_tiny_wan(kind, inputs):
    """Return what stands in for a node of Wan's template."""
    if kind == "UNETLoader":
        return {"class_type": kind, "inputs": {**inputs, "unet_name": "linearize_tiny_wan.safetensors"}}
    if kind == "CLIPLoader":
        return {"class_type": "LinearizeTestEncoder", "inputs": {"width": 4096}}
    if kind == "VAEDecode":
        return {"class_type": "LinearizeTestDecode", "inputs": {"samples": inputs["samples"]}}
    return None


def test_wan_is_distilled_saved_and_paints_a_video(comfy, server):
    """With classifier-free guidance, behind a node that shifts the noise levels."""
    sizes = {"width": 160, "height": 96, "length": 9, "frames": 9}
    template = load(FOLDER / "wan21_t2v_distill.json")
    workflow = quick(template, ["a fox", "a train", "a kite"], on_a_tiny_wan, sizes)
    (loader,) = of_type(workflow, "VAELoader")
    del workflow[loader]
    outputs = server.run(workflow)
    assert "student of Wan-AI/Wan2.1-T2V-1.3B (Wan), licence apache-2.0" in saved_text(workflow, outputs)
    (report,), (save,) = of_type(workflow, "LinearizeReport"), of_type(workflow, "SaveVideo")
    ran = outputs[report]["text"][0].partition("\n\nplanned:")[0]
    assert re.search(r"^hybrid \(torch\): [12] sites?$", ran, re.MULTILINE) and "fell back" not in ran, ran
    assert outputs[save]["images"][0]["filename"].endswith(".mp4")
