"""The shipped graphs in the real frontend: both forms, room after a run, templates, blueprints, the demo of `serve`."""

import json

import pytest
from interface import (
    HAS_OURS,
    LISTEN,
    OUTER,
    PICTURES,
    ROOT,
    SET_WIDGETS,
    api_form,
    beside_the_demos_model,
    in_mode,
    open_workflow,
    prompt_of,
    status_of,
    take_picture,
)

from linearize.lab.comfyui import BASE, COMFYUI
from linearize.lab.server import first_address

TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "workflows").glob("*.json"))
DEMOS = [f"lab/demo/{name}.json" for name in ("foveated_demo", "clear_demo", "distill_demo", "distill_clips")]
SERVED = "lab/demo/nodes/workflows/side_by_side.json"
WORKFLOWS = [SERVED, *DEMOS, *TEMPLATES]
LARGE = [SERVED, DEMOS[2], *(f"workflows/{name}.json" for name in (
    "flux_dev_distill", "flux_dev_high_res_4k", "wan21_t2v_hybrid", "wan22_i2v_foveated"))]  # fmt: skip
PICTURE = "example.png"  # in ComfyUI's own input folder
ELEMENTS = """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
    const { left, top, width, height } = element.getBoundingClientRect(), scale = app.canvas.ds.scale;
    return [element.dataset.nodeId, left / scale, top / scale, width / scale, height / scale];
})"""
NAME = "blueprint_test"
FEW = {  # nodes of the blueprint for any model: settings for a run of seconds
    "5": {"seeds": 1, "steps": 2},
    "9": {"updates": 2, "held_out": 1, "output_draws": 1},
    "13": {"updates": 1, "block_updates": 1, "accumulation": 1, "held_out": 1},
}


def test_the_template_is_listed_with_its_picture(server):
    assert "flux_dev_clear" in server.get("/api/workflow_templates")["linearize"]
    assert server.bytes("/api/workflow_templates/linearize/flux_dev_clear.jpg")[:3] == b"\xff\xd8\xff"


def test_the_template_opens_by_its_address(page, server):
    page.goto(f"{server.url}/?template=flux_dev_clear&source=linearize")
    page.wait_for_function(HAS_OURS)
    assert prompt_of(page) == api_form("workflows/flux_dev_clear.json")


@pytest.mark.parametrize("path", WORKFLOWS)
def test_both_forms_of_a_workflow_say_the_same_and_nodes_do_not_overlap_after_a_run(frontend, path):
    open_workflow(frontend, path)
    assert prompt_of(frontend) == api_form(path)
    after_a_run(frontend)
    boxes = frontend.evaluate("app.graph.nodes.map(node => [node.type, ...node.getBounding()])")
    assert overlapping(boxes) == []


@pytest.mark.parametrize("path", LARGE)
def test_nodes_do_not_overlap_after_a_run_in_nodes_2(frontend, path):
    in_mode(frontend, True)
    try:
        open_workflow(frontend, path)
        after_a_run(frontend)
        boxes = frontend.evaluate(ELEMENTS)
        assert len(boxes) == len(json.loads((ROOT / path).read_text(encoding="utf-8"))["nodes"])
        assert overlapping(boxes) == []
    finally:
        in_mode(frontend, False)


def after_a_run(page) -> None:
    """Let the nodes show what they show after a run, before their boxes are compared."""
    from linearize.lab.authoring.rooms import pretend_a_run  # needs playwright

    page.route(f"**/api/view?*{PICTURE}*", lambda route: route.fulfill(path=COMFYUI / "input" / PICTURE))
    pretend_a_run(page, PICTURE)


def overlapping(boxes: list) -> list[str]:
    """Return which of (name, left, top, width, height) lie on which."""
    return [
        f"{name} lies on {other}"
        for index, (name, left, top, width, height) in enumerate(boxes)
        for other, x, y, w, h in boxes[index + 1 :]
        if min(left + width - x, x + w - left, top + height - y, y + h - top) > 1  # pixels, for rounding
    ]


def with_blueprint(template: dict, blueprint: dict) -> dict:
    """Return the template of Wan 2.2 with the blueprint's node in place of its two foveated nodes."""
    (node,), changed = blueprint["nodes"], {**template, "definitions": blueprint["definitions"]}
    node["id"] = changed["last_node_id"] = template["last_node_id"] + 1
    slots = {socket["name"]: slot for slot, socket in enumerate(node["inputs"])}
    ours = [each["id"] for each in template["nodes"] if each["type"] == "LinearizeFoveated"]
    for output, (old, expert) in enumerate(zip(ours, ("high_noise", "low_noise"), strict=True)):
        node["outputs"][output]["links"] = [link[0] for link in template["links"] if link[1] == old]
        for link in template["links"]:
            if link[1] == old:
                link[1:3] = node["id"], output
            if link[3] == old:
                link[3:5] = node["id"], slots[expert]
                node["inputs"][slots[expert]]["link"] = link[0]
    changed["nodes"] = [each for each in template["nodes"] if each["id"] not in ours] + [node]
    return changed


def test_the_blueprint_of_wan_22_does_what_its_template_does(frontend):
    """Both experts go in and come out patched; ComfyUI writes nodes of a subgraph as outer id, colon, inner id."""
    files = ("workflows/wan22_t2v_foveated.json", "subgraphs/Linearize Wan 2.2.json")
    template, blueprint = (json.loads((ROOT / name).read_text(encoding="utf-8")) for name in files)
    frontend.evaluate("workflow => app.loadGraphData(workflow)", with_blueprint(template, blueprint))
    frontend.wait_for_function("window.app?.graph?.nodes.some(node => node.title === 'Linearize Wan 2.2')")
    outer = blueprint["nodes"][0]["id"]
    expanded = json.loads(json.dumps(prompt_of(frontend)).replace(f'"{outer}:', '"'))
    assert expanded == api_form("workflows/wan22_t2v_foveated.json")


def test_the_blueprint_for_any_model_is_its_template_and_runs(frontend, server, version):
    """What its widgets say arrives inside; on the demo's model, with few updates, a student comes out and is saved."""
    for path in (BASE / "models" / "linearize").glob(f"{NAME}_*.safetensors"):
        path.unlink()
    blueprint = json.loads((ROOT / "subgraphs" / "Linearize my model.json").read_text(encoding="utf-8"))
    frontend.evaluate("workflow => app.loadGraphData(workflow)", beside_the_demos_model(blueprint))
    frontend.wait_for_function(f"window.app?.graph?.getNodeById({OUTER})?.title === 'Linearize my model'")
    take_picture(frontend, PICTURES / f"blueprint-{version}.png")
    shipped = prompt_of(frontend)
    template = api_form("workflows/flux_dev_distill.json")
    outside = {"4": ["3", 0]}  # ids of the template that are other ones here
    for key, node in template.items():
        if f"{OUTER}:{key}" in shipped:
            for name, value in node["inputs"].items():
                if isinstance(value, list):
                    inner = f"{OUTER}:{value[0]}"
                    node["inputs"][name] = [inner, value[1]] if inner in shipped else outside.get(value[0], value)
    template["5"]["inputs"].update(name="my-model", guidance=0.0)
    for plan in ("6", "7", "8"):
        template[plan]["inputs"]["host"] = "auto"
    template["14"]["inputs"].update(name="my-model", base_model="", licence="")
    inside = {key.removeprefix(f"{OUTER}:"): node for key, node in shipped.items() if ":" in key}
    assert inside == {key: template[key] for key in ("5", "6", "7", "8", "9", "12", "13", "14")}

    prompts = "night moon left hills red house left oak right\nday sun right hills blue house right pine left"
    frontend.evaluate(SET_WIDGETS, [OUTER, {"prompts": prompts, "name": NAME, "budget": 0.35}])
    queued = prompt_of(frontend)
    plans = [node["inputs"] for node in queued.values() if node["class_type"] == "LinearizeUniformPlan"]
    assert [plan["host"] for plan in plans] == ["auto"] * 3, "the host is found by itself"
    assert queued[f"{OUTER}:5"]["inputs"]["prompts"] == prompts
    assert {queued[f"{OUTER}:{key}"]["inputs"]["name"] for key in ("5", "14")} == {NAME}
    assert queued[f"{OUTER}:12"]["inputs"]["budget"] == 0.35
    for key, few in FEW.items():
        queued[f"{OUTER}:{key}"]["inputs"].update(few)
    text = server.run(queued)[f"{OUTER}:14"]["text"][0]
    assert f"{NAME}_00001_.safetensors" in text and "FLUX.1" in text, text


def test_the_template_list_shows_ours_and_opens_one(frontend):
    frontend.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    frontend.get_by_text("linearize", exact=True).first.click()
    frontend.get_by_test_id("template-workflow-flux_dev_clear").click()
    frontend.wait_for_function(HAS_OURS)
    assert prompt_of(frontend) == api_form("workflows/flux_dev_clear.json")


SLIDER = "[...document.querySelectorAll('[data-node-id=\"17\"] img')].map(each => new URL(each.src).search)"


def test_serve_opens_a_graph_that_runs_dense_and_cheaper_attention_side_by_side(frontend, server, version, mode):
    """By the address that it names, in a tab that had ComfyUI's own graph; Nodes 2.0 draws the slider."""
    frontend.goto(first_address(server))
    frontend.wait_for_function(HAS_OURS)
    served = api_form(SERVED)
    assert prompt_of(frontend) == served
    assert served["4"]["class_type"] == "LinearizeFoveated" and served["17"]["class_type"] == "ImageCompare"
    frontend.evaluate(LISTEN)
    frontend.evaluate(SET_WIDGETS, [4, {"keep": 0.3 if mode else 0.25}])  # or the server's cache answers
    frontend.get_by_test_id("queue-button").click()
    frontend.wait_for_function("window.ended")
    assert frontend.evaluate("window.ended") == ["execution_success", ""]
    if mode:
        frontend.wait_for_function(f"{SLIDER}.length === 2")
        assert len({*frontend.evaluate(SLIDER)}) == 2
    take_picture(frontend, PICTURES / f"served-{version}-{'new' if mode else 'classic'}.png")
    assert status_of(frontend, "LinearizeFoveated").startswith("UNTRAINED")
    assert "PSNR" in status_of(frontend, "LinearizeCompare")
