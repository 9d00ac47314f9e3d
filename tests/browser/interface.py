"""What the tests of the real frontend share: workflows as it holds them, its two ways to draw nodes, pictures of it."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PICTURES = ROOT / "lab" / "demo" / "output"
READY = "window.app?.graph && app.extensionManager?.workflow?.activeWorkflow"
HAS_OURS = "window.app?.graph?.nodes.some(node => node.type.startsWith('Linearize'))"
STATUS = "linearize_status"  # our widget for a node's status
CODEC = re.compile(r"(format\.)?codec(\..+)?")  # of SaveVideo, inside `format` since ComfyUI 0.34
OUTER = 100  # id of a blueprint's node in a workflow
# not Playwright's own add_style_tag, which fails when the page is refused something else meanwhile
HIDE_OVERLAYS = """() => {
    const style = document.createElement('style');
    style.textContent = '.p-toast, .minimap-main-container { display: none !important; }';
    document.head.append(style);
}"""
SET_WIDGETS = """([id, values]) => {
    for (const widget of app.graph.getNodeById(id).widgets)
        if (widget.name in values) widget.value = values[widget.name];
}"""


def comparable(prompt: dict) -> dict:
    """Return a prompt without titles, and without the one input that cores name differently."""
    compared = {}
    for key, node in prompt.items():
        differs = CODEC if node["class_type"] == "SaveVideo" else re.compile("(?!)")
        inputs = {name: value for name, value in node["inputs"].items() if not differs.fullmatch(name)}
        compared[key] = {"class_type": node["class_type"], "inputs": inputs}
    return compared


def api_form(path: str) -> dict:
    """Return the API form that lies beside a workflow in the interface's form."""
    file = ROOT / path
    return comparable(json.loads((file.parent / "api" / file.name).read_text(encoding="utf-8")))


def prompt_of(page) -> dict:
    """Return what the frontend would queue now."""
    return comparable(page.evaluate("async () => (await app.graphToPrompt()).output"))


def open_workflow(page, path: str) -> None:
    """Open a workflow file as the user's own."""
    page.evaluate("workflow => app.loadGraphData(workflow)", json.loads((ROOT / path).read_text(encoding="utf-8")))
    page.wait_for_function(HAS_OURS)


def beside_the_demos_model(blueprint: dict) -> dict:
    """Return a workflow of the demo's model, text encoder and latent, and the blueprint's node behind them."""
    demo = json.loads((ROOT / "lab" / "demo" / "distill_demo.json").read_text(encoding="utf-8"))
    (node,), links = blueprint["nodes"], []
    node["id"], node["pos"] = OUTER, [500, 0]
    loaders = [each for each in demo["nodes"] if each["id"] in (1, 2, 3)]
    for slot, loader in enumerate(loaders):
        link = [slot + 1, loader["id"], 0, OUTER, slot, loader["outputs"][0]["type"]]
        loader["outputs"][0]["links"] = [link[0]]
        node["inputs"][slot]["link"] = link[0]
        links.append(link)
    return {**blueprint, "nodes": [*loaders, node], "links": links, "last_node_id": OUTER, "last_link_id": 3}


def status_of(page, kind: str) -> str:
    """Return the status that the first node of a type shows."""
    find = "([kind, name]) => app.graph.nodes.find(n => n.type === kind).widgets.find(w => w.name === name)?.value"
    return page.evaluate(find, [kind, STATUS]) or ""


def take_picture(page, path: Path) -> None:
    """Save a picture of the whole graph, without what the interface lays over it."""
    page.evaluate(HIDE_OVERLAYS)
    page.evaluate("app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")
    page.wait_for_timeout(1000)  # pictures arrive
    page.evaluate("app.canvas.canvas.focus()")
    page.keyboard.press(".")  # fit the view
    page.wait_for_timeout(1500)
    path.parent.mkdir(exist_ok=True)
    page.screenshot(path=path)


def in_mode(page, is_vue: bool) -> None:
    """Draw nodes as Nodes 2.0 or on LiteGraph's canvas."""
    page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", is_vue)
    page.wait_for_timeout(1000)


LISTEN = """() => {
    window.executed = [];
    app.api.addEventListener('executing', event => window.executed.push(String(event.detail)));
    for (const name of ['execution_success', 'execution_error', 'execution_interrupted'])
        app.api.addEventListener(name, event => window.ended = [name, event.detail.exception_message ?? '']);
}"""
