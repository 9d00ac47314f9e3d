"""The shipped workflows of hosts other than FLUX.1, whole, on tiny checkpoints that ComfyUI's own loader recognises.

Their pictures are coloured noise. FLUX.1's templates are in test_workflows.py, those that distil in
test_distill_templates.py, and models whose width ComfyUI's loader takes for granted in tests/templates.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from listening import events

from linearize.attention.layout import TokenLayout, grid_segment
from linearize.attention.planning.cost import attention_cost
from linearize.attention.specs import DenseSpec, HybridSpec
from linearize.attention.words import percent

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "workflows" / "api"
TOO_WIDE = {"qwen_image_foveated", "z_image_foveated"}  # of any size that ComfyUI's loader recognises


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """What a template runs on here.

    Args:
        models: checkpoints, in the order of the template's loaders.
        sites: number of self-attentions of each.
        size: (width, height, frames) in pixels.
        text_width, pooled_width, mask: what its text encoder would give.
        hybrid: sites that a plan names here instead of those of the whole model.
    """

    models: tuple[str, ...]
    sites: int
    size: tuple[int, int, int]
    text_width: int = 4096
    pooled_width: int = 0
    mask: bool = False
    hybrid: str = ""


TEMPLATES = {
    "flux2_foveated": Tiny(models=("flux2",), sites=3, size=(192, 128, 1), text_width=64),
    "flux_kontext_foveated": Tiny(models=("flux",), sites=4, size=(192, 128, 1), text_width=64, pooled_width=32),
    "wan21_t2v_foveated": Tiny(models=("wan",), sites=2, size=(160, 96, 17)),
    "wan21_t2v_hybrid": Tiny(models=("wan",), sites=2, size=(160, 96, 17), hybrid="blocks.1"),
    "wan22_t2v_foveated": Tiny(models=("wan", "wan_low"), sites=2, size=(160, 96, 17)),
    "wan22_t2v_calibrate": Tiny(models=("wan", "wan_low"), sites=2, size=(160, 96, 17)),
    "wan22_i2v_foveated": Tiny(models=("wan_i2v", "wan_i2v_low"), sites=2, size=(160, 96, 17)),
    "sd35_foveated": Tiny(models=("sd3",), sites=3, size=(192, 128, 1), pooled_width=2048),
    "hunyuan_video_foveated": Tiny(
        models=("hunyuan_video",), sites=2, size=(160, 96, 17), text_width=64, pooled_width=768
    ),
    "ltx_video_foveated": Tiny(models=("ltx",), sites=2, size=(256, 192, 33), mask=True),
}


def on_tiny_models(name, steps=None, **settings):
    """Return a template on tiny models; `settings` go to its first Foveated Attention."""
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    tiny = TEMPLATES[name]
    models, changed = iter(tiny.models), {}
    for key, node in workflow.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        sizes = dict(zip(("width", "height", "length", "frames"), (*tiny.size, tiny.size[2]), strict=True))
        inputs |= {each: value for each, value in sizes.items() if each in inputs}
        if steps and "steps" in inputs:
            inputs |= {
                each: inputs[each] * steps // inputs["steps"]
                for each in ("start_at_step", "end_at_step")
                if each in inputs
            }
            inputs["steps"] = steps
        if kind == "LinearizeFoveated":
            inputs |= {"min_tokens": 0, **settings}  # tiny sizes pay nowhere
            settings = {}
        elif kind == "LinearizeUniformPlan" and inputs["sites"] != "all":
            inputs["sites"] = tiny.hybrid
        elif kind in ("UNETLoader", "CheckpointLoaderSimple"):
            kind, inputs = "UNETLoader", {"unet_name": f"linearize_tiny_{next(models)}.safetensors"}
            inputs["weight_dtype"] = "default"
        elif kind == "CLIPTextEncode":
            kind, text = "LinearizeTestText", inputs["text"]
            inputs = {"text": text, "width": tiny.text_width, "pooled_width": tiny.pooled_width, "mask": tiny.mask}
        elif kind == "VAELoader":
            kind, inputs = "LinearizeTestAutoencoder", {"clips": tiny.size[2] > 1}
        elif kind == "LoadImage":
            kind, inputs = "EmptyImage", {"width": tiny.size[0], "height": tiny.size[1], "batch_size": 1, "color": 128}
        elif kind == "FluxKontextImageScale":
            kind, inputs = "ImageScaleBy", {"image": inputs["image"], "upscale_method": "area", "scale_by": 1.0}
        elif kind.startswith("VAEDecode"):
            kind, inputs = "LinearizeTestDecode", {"samples": inputs["samples"]}
        if kind not in ("CLIPLoader", "DualCLIPLoader"):
            changed[key] = {"class_type": kind, "inputs": inputs}
    return changed


def of_type(workflow, *kinds):
    return [key for key, node in workflow.items() if node["class_type"] in kinds]


def what_ran(workflow, outputs):
    """Return what each report says of the sampling before it."""
    reports = of_type(workflow, "LinearizeReport")
    return [outputs[key]["text"][0].partition("\n\nplanned:")[0] for key in reports]


def test_every_template_is_run_by_these_tests():
    others = {path.stem for path in FOLDER.glob("*.json") if not re.match("flux_(dev|schnell)", path.stem)}
    assert others - {"wan21_t2v_distill"} == set(TEMPLATES) | TOO_WIDE


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.endswith("_foveated")])
def test_a_template_runs_on_tiny_models(comfy, server, name):
    """Every self-attention of every model is foveated, in every step, says the report behind its sampler."""
    tiny, workflow = TEMPLATES[name], on_tiny_models(name, steps=4)
    outputs = server.run(workflow)
    reports = what_ran(workflow, outputs)
    assert len(reports) == len(tiny.models)
    for ran in reports:
        share = re.match(rf"UNTRAINED · (.+) % of attention.* · {tiny.sites} of {tiny.sites} sites · ", ran)
        assert share and 0 < float(share[1]) < 100, ran
        assert f"\nfoveated (torch): {tiny.sites} sites" in ran and "dense (host)" not in ran, ran
    (save,) = of_type(workflow, "SaveImage", "SaveVideo")
    (saved,) = outputs[save]["images"]
    assert saved["filename"].endswith(".png" if tiny.size[2] == 1 else ".mp4")
    assert len(server.image(saved)) > 1000


def test_both_experts_are_calibrated_by_one_node(comfy, server):
    """Tiny calls may be fastest dense; either way each expert has a text and a report of its own."""
    workflow = on_tiny_models("wan22_t2v_calibrate", steps=8)
    (key,) = of_type(workflow, "LinearizeCalibrate")
    workflow[key]["inputs"]["again"] = True
    told = [
        data["text"] for kind, data in events(server, workflow) if kind == "linearize.status" and data["node"] == key
    ]
    (came_out,) = [text for text in told if "\n\n" in text]
    for expert in came_out.split("\n\n"):
        assert expert.startswith(("CALIBRATED · ", "DENSE · no candidate is faster here")), expert
        assert "17 frames" in expert or "5 latent frames" in expert, expert
    assert sum(text.startswith("calibrating: step 4 of 4") for text in told) == 2
    reports = what_ran(workflow, server.run(workflow))
    assert len(reports) == 2 and not any("fell back" in ran for ran in reports), reports


def test_half_of_wan_runs_hybrid_and_the_other_half_dense(comfy, server):
    """The plan names the blocks; the record counts what ran, and its FLOPs are exactly those of one block of each."""
    workflow = on_tiny_models("wan21_t2v_hybrid", steps=4)
    outputs = server.run(workflow)
    (report,) = of_type(workflow, "LinearizeReport")
    planned = outputs[report]["text"][0].partition("\n\nplanned:\n")[2].splitlines()
    assert planned[:3] == [
        "Wan, 160 x 96 x 17: 300 tokens (0 global), 2 sites: blocks.0-1",
        "dense: 1 site (blocks.0)",
        "hybrid rate 2 feature_map favor: 1 site (blocks.1)",
    ]
    layout = TokenLayout.of([grid_segment("main", 5, 6, 10)])
    dense, hybrid = (attention_cost(spec, layout, 2, 128).flops for spec in (DenseSpec(), HybridSpec(2, "favor")))
    (ran,) = what_ran(workflow, outputs)
    share = f"{percent((dense + hybrid) / (2 * dense))} of attention: computes more than dense"
    assert ran.startswith(f"UNTRAINED · {share} · 1 of 1 site · "), ran
    assert ran.endswith("\ndense (host): 1 site\nhybrid (torch): 1 site\n50 % of the calls, the others dense"), ran
    (save,) = of_type(workflow, "SaveVideo")
    (saved,) = outputs[save]["images"]
    assert saved["filename"].endswith(".mp4") and len(server.image(saved)) > 1000


@pytest.mark.parametrize(
    ("name", "shares"),
    {
        "wan22_t2v_foveated": [(50, 60), (100, 100)],  # of 20 steps the expert for high noise has 10
        "sd35_foveated": [(75, 80)],
        "ltx_video_foveated": [(80, 95)],  # the scheduler reads the size: fewer early steps for so few tokens
    }.items(),
)
def test_start_percent_keeps_the_first_steps_dense(comfy, server, name, shares):
    """Of all steps, over both experts; the rest is foveated."""
    workflow = on_tiny_models(name, start_percent=0.2)
    for ran, (least, most) in zip(what_ran(workflow, server.run(workflow)), shares, strict=True):
        share = re.search(r"^(\d+) % of the calls", ran, re.MULTILINE)
        assert least <= (int(share[1]) if share else 100) <= most, ran
        assert ("dense by setting" in ran) == (most < 100) and "fell back" not in ran


@pytest.mark.parametrize("name", ["wan22_t2v_foveated", "wan22_i2v_foveated"])
def test_both_experts_of_wan_22_take_part(name):
    """The template gives each its own loader, attention and part of the steps."""
    workflow = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    loaders = of_type(workflow, "UNETLoader")
    assert ["high_noise" in workflow[key]["inputs"]["unet_name"] for key in loaders] == [True, False]
    reached = set()
    for sampler in of_type(workflow, "KSamplerAdvanced"):
        key, kinds = workflow[sampler]["inputs"]["model"][0], []
        while "model" in workflow[key]["inputs"]:
            kinds.append(workflow[key]["class_type"])
            key = workflow[key]["inputs"]["model"][0]
        assert kinds == ["LinearizeFoveated", "ModelSamplingSD3"]
        reached.add(key)
    assert reached == set(loaders)


def test_comfyui_offers_the_blueprints(server):
    """The node library asks for the list, then for what a person takes from it."""
    files = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "subgraphs").glob("*.json")}
    listed = server.get("/global_subgraphs")
    ours = [key for key, entry in listed.items() if entry["info"]["node_pack"] == "custom_nodes.linearize"]
    assert {listed[key]["name"]: server.get(f"/global_subgraphs/{key}")["data"] for key in ours} == files
    assert set(files) == {"Linearize Wan 2.2", "Linearize my model"}
