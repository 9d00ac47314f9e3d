"""Write the interface's form of the shipped workflows from their API form, through the real frontend.

`.venv/bin/python demo/author_workflows.py` after a change in an API file; needs Chromium and run.py's test tools. It
rewrites `demo/clear_demo.json`, the workflows in `workflows/` and their thumbnails, or only those that it is given by
name.
"""

import json
import shutil
import sys
import tempfile
from io import BytesIO
from typing import Any

from live_server import ROOT, LiveServer, live_server
from PIL import Image
from playwright.sync_api import Page, sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
READY = "window.app?.graph && app.extensionManager?.workflow?.activeWorkflow"
OVERLAYS = (".p-toast", "[data-testid=error-overlay]", ".minimap-main-container")
BOUNDS = """() => {
    const groups = app.graph.groups.map(group => [...group.pos, ...group.size]), ds = app.canvas.ds;
    const boxes = [...app.graph.nodes.map(node => node.getBounding()), ...groups];
    const edge = app.canvas.canvas.getBoundingClientRect();
    const x = value => (value + ds.offset[0]) * ds.scale + edge.left;
    const y = value => (value + ds.offset[1]) * ds.scale + edge.top;
    return [x(Math.min(...boxes.map(b => b[0]))), y(Math.min(...boxes.map(b => b[1]))),
            x(Math.max(...boxes.map(b => b[0] + b[2]))), y(Math.max(...boxes.map(b => b[1] + b[3])))];
}"""
OURS = "Linearize"
VERSION = "0.1.0"
HUGGINGFACE = "https://huggingface.co"
ENCODERS = f"{HUGGINGFACE}/comfyanonymous/flux_text_encoders/resolve/main"
AUTOENCODER = f"{HUGGINGFACE}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae"
MODELS = {  # file: (folder on the Hub, models folder)
    "flux1-dev.safetensors": (f"{HUGGINGFACE}/Comfy-Org/flux1-dev/resolve/main", "diffusion_models"),
    "t5xxl_fp8_e4m3fn.safetensors": (ENCODERS, "text_encoders"),
    "clip_l.safetensors": (ENCODERS, "text_encoders"),
    "ae.safetensors": (AUTOENCODER, "vae"),
}
NOTE = """## FLUX.1 dev with CLEAR windows

Each image token sees only the tokens within **radius** around it, and all of the text.

- **weights: auto** takes the weights that CLEAR's authors distilled for this radius, if they are there; the node says \
whether they were. Untrained windows change the picture, the more the smaller the radius is. Compare with the CLEAR \
node bypassed (Ctrl+B).
- **When it pays**: from 2048 x 2048 on, and more with every doubling. The authors of CLEAR measured radius 16 on an \
H100 at 1.0x dense speed at 1024, 1.2x at 2048, 1.8x at 4096 and 5.1x at 8192 pixels a side.
- The **Attention Report** says what really ran, after the sampling. Give it the size of the latent.
"""

HIGH_RES_NOTE = """## FLUX.1 dev at 2048 x 2048 and more

1. The plain model paints at 1024 x 1024.
2. **Upscale Image** enlarges the picture. Its size is the size of the result; 4096 works too.
3. FLUX repaints it with **CLEAR Attention** and **High-Resolution FLUX**, from partial noise: 14 of 20 steps, with \
guidance 7.5. This is the recipe of CLEAR's authors.

- **strength** (High-Resolution FLUX, advanced): more adds detail and keeps less of the first picture.
- **weights: auto** takes the weights distilled for radius 16 if they are there. The CLEAR node says whether they were.
- Far above 2048, go up by 2 at a time: copy steps 2 and 3.
"""

# columns from left to right: (node id, width, height); None keeps the size that the frontend chose
DEMO = [
    [("1", 300, None), ("2", 300, None), ("3", 300, None)],
    [("4", 400, 380)],
    [("5", 300, 500)],
    [("6", 300, None), ("7", 300, 376)],
    [("8", 500, 620)],
]
FLUX = [
    [("1", 340, None), ("2", 340, None), ("3", 340, None), ("note", 340, 320)],
    [("4", 400, 350), ("5", 400, 200)],
    [("6", 280, None), ("8", 280, None), ("9", 280, None), ("10", 280, None), ("11", 280, None), ("7", 280, None)],
    [("12", 280, None), ("13", 280, None)],
    [("14", 500, 320), ("15", 500, 600)],
]
HIGH_RES = [
    [("1", 340, None), ("2", 340, None), ("3", 340, None), ("note", 340, 400)],
    [("4", 340, 300), ("7", 340, None), ("8", 340, None)],
    [("5", 280, None), ("9", 280, None), ("10", 280, None), ("6", 280, None), ("11", 280, None), ("12", 280, None)],
    [("13", 300, None), ("14", 300, None), ("15", 300, None)],
    [("16", 340, 380), ("17", 340, 420)],
    [("18", 280, None), ("19", 280, None), ("20", 280, None), ("21", 280, None)],
    [("22", 500, 320), ("23", 500, 600)],
]
HIGH_RES_GROUPS = [("Base picture", 2, 2), ("Enlarge", 3, 3), ("High resolution", 4, 5)]  # title, first and last column
JOBS = (  # folder, name, columns, groups, note
    ("demo", "clear_demo", DEMO, [], None),
    ("workflows", "flux_dev_clear", FLUX, [], NOTE),
    ("workflows", "flux_dev_high_res", HIGH_RES, HIGH_RES_GROUPS, HIGH_RES_NOTE),
)
GAP, TITLE = 60, 46  # pixels between columns; between nodes of a column, where the title bar sits


def open_frontend(browser: Any, url: str) -> Page:
    """Return a page with ComfyUI's frontend ready."""
    page = browser.new_page()
    page.route("**/api/object_info", pretend_files)
    page.goto(url)
    page.wait_for_function(READY, timeout=60000)
    return page


def pretend_files(route: Any) -> None:
    """Answer the frontend's question for nodes as if the models were there, so that no loader is drawn in red."""
    answer = route.fetch()
    nodes = answer.json()
    for kind in ("UNETLoader", "DualCLIPLoader", "VAELoader"):
        for name, (choices, *_) in nodes[kind]["input"]["required"].items():
            if "_name" in name:
                choices += MODELS
    route.fulfill(response=answer, json=nodes)


def convert(page: Page, api: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a workflow in the interface's form as the frontend writes it."""
    script = "async ([api, name]) => { await app.loadApiJson(api, name); app.graph.arrange(); }"
    page.evaluate(script, [api, name])
    page.wait_for_function("n => app.graph.nodes.length === n", arg=len(api), timeout=20000)
    return page.evaluate("app.graph.serialize()")


def tidy(
    workflow: dict[str, Any], columns: list[list[tuple]], groups: list[tuple], note: str | None, name: str
) -> None:
    """Lay the nodes out in columns, frame some of them, and set the properties that templates carry."""
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    if note is not None:
        nodes["note"] = note_node(workflow, note)
    x = 0
    for column in columns:
        y = 0
        for key, width, height in column:
            node = nodes[key]
            node["size"] = [width, height or node["size"][1]]
            node["pos"] = [x, y]
            y += node["size"][1] + TITLE
        x += max(width for _, width, _ in column) + GAP
    for node in workflow["nodes"]:
        set_properties(node)
    frames = [
        frame(number, title, [nodes[key] for column in columns[first : last + 1] for key, *_ in column])
        for number, (title, first, last) in enumerate(groups, 1)
    ]
    workflow["groups"] = frames
    workflow["id"], workflow["revision"] = f"linearize-{name}", 0
    workflow["extra"] = {}


def frame(number: int, title: str, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a titled group around nodes."""
    left, top = (min(node["pos"][axis] for node in nodes) for axis in (0, 1))
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in nodes) for axis in (0, 1))
    bounding = [left - 20, top - 90, right - left + 40, bottom - top + 110]
    return {"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}


def note_node(workflow: dict[str, Any], text: str) -> dict[str, Any]:
    """Add a note to the workflow and return it."""
    workflow["last_node_id"] += 1
    node = {
        "id": workflow["last_node_id"], "type": "MarkdownNote", "pos": [0, 0], "size": [0, 0], "flags": {},
        "order": 0, "mode": 0, "inputs": [], "outputs": [], "title": "About this workflow", "properties": {},
        "widgets_values": [text], "color": "#222", "bgcolor": "#000",
    }  # fmt: skip
    workflow["nodes"].append(node)
    return node


def set_properties(node: dict[str, Any]) -> None:
    """Say which pack a node is from and which files a loader needs; keep seeds as they are saved."""
    kind = node["type"]
    if kind == "MarkdownNote":
        return
    properties = node.setdefault("properties", {})
    properties["Node name for S&R"] = kind
    if not kind.startswith(OURS):
        properties.update(cnr_id="comfy-core", ver="0.30.0")
    elif not kind.startswith(f"{OURS}Demo"):
        properties.update(cnr_id="linearize", ver=VERSION)
    values = node.get("widgets_values", [])
    files = [value for value in values if isinstance(value, str) and value in MODELS]
    if files:
        properties["models"] = [{"name": name, "url": MODELS[name][0], "directory": MODELS[name][1]} for name in files]
    node["widgets_values"] = ["fixed" if value == "randomize" else value for value in values]


def write_workflows(server: LiveServer, browser: Any, names: list[str]) -> None:
    """Write the workflows and a picture of each; `names` chooses some."""
    for folder, name, columns, groups, note in (job for job in JOBS if not names or job[1] in names):
        page = open_frontend(browser, server.url)
        api = json.loads((ROOT / folder / "api" / f"{name}.json").read_text(encoding="utf-8"))
        workflow = convert(page, api, name)
        tidy(workflow, columns, groups, note, name)
        (ROOT / folder / f"{name}.json").write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")
        page.evaluate("async w => { await app.loadGraphData(w); }", workflow)
        picture = screenshot(page)
        picture.save(ROOT / "demo" / "output" / f"{name}.png")
        if folder == "workflows":
            picture.thumbnail((800, 800))
            picture.convert("RGB").save(ROOT / folder / f"{name}.jpg", quality=85, optimize=True)
        page.close()


def screenshot(page: Page) -> Image.Image:
    """Return a picture of the whole graph, without what the interface lays over it."""
    page.add_style_tag(content=f"{', '.join(OVERLAYS)} {{ display: none !important; }}")
    page.wait_for_timeout(1500)
    page.evaluate("app.canvas.canvas.focus()")
    page.keyboard.press(".")
    page.wait_for_timeout(1500)
    left, top, right, bottom = page.evaluate(BOUNDS)
    clip = {"x": left - 30, "y": top - 30, "width": right - left + 60, "height": bottom - top + 60}
    return Image.open(BytesIO(page.screenshot(clip=clip)))


def main() -> int:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        print("No Chromium found; install one and run again.", file=sys.stderr)
        return 1
    (ROOT / "demo" / "output").mkdir(exist_ok=True)
    with live_server() as server, sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=executable, headless=True, args=FLAGS, viewport={"width": 2400, "height": 1300}
        )
        try:
            write_workflows(server, browser, sys.argv[1:])
        finally:
            browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
