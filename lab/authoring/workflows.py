"""Write the interface's form of the shipped workflows from their API form, through the real frontend.

`python -m lab.authoring.workflows` after a change in an API file, a note or `layouts.py`; needs Chromium and run.py's
test tools. It rewrites the workflows of `lab/demo`, those in `workflows/` and their thumbnails, or only those
that it is given by name, and a blueprint with the template that it is made of.
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import tomllib
from PIL import Image
from playwright.sync_api import FloatRect, Page, ViewportSize, sync_playwright

from .. import ROOT
from ..comfyui import COMFYUI
from ..server import LiveServer, live_server
from .blueprint import identity, write_blueprints
from .layouts import LAYOUTS, MODELS, SIZES, TITLES, USERS_OWN, WIDTH
from .rooms import draw_as, rooms
from .thumbnails import draw_thumbnail

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
LOADERS = (
    "UNETLoader", "CheckpointLoaderSimple", "CLIPLoader", "DualCLIPLoader", "VAELoader", "LoraLoaderModelOnly",
)  # fmt: skip
PICTURE = "example.png"  # every ComfyUI has it in its input folder, which is not the one of `run.py`'s
GAP, TITLE = 60, 58  # pixels between columns; between nodes of a column, for the title bar and the badge on it
ISSUES = 30  # pixels that Nodes 2.0 adds below a loader whose file is missing
QUALITY = 75  # of thumbnails; the Registry's archive holds all of them and is small
VIEWPORT: ViewportSize = {"width": 5000, "height": 1400}  # far out, the frontend draws boxes without their texts
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def open_frontend(browser: Any, url: str) -> Page:
    """Return a page with ComfyUI's frontend ready."""
    page = browser.new_page()
    page.route("**/api/object_info", pretend_files)
    page.route(f"**/api/view?*{PICTURE}*", lambda route: route.fulfill(path=COMFYUI / "input" / PICTURE))
    page.goto(url)
    page.wait_for_function(READY, timeout=60000)
    draw_as(page, False)
    return page


def pretend_files(route: Any) -> None:
    """Answer the frontend's question for nodes as if the models were there, so that no loader is drawn in red."""
    answer = route.fetch()
    nodes = answer.json()
    for kind in LOADERS:
        for name, (choices, *_) in nodes[kind]["input"]["required"].items():
            if "_name" in name:
                choices += [*MODELS, *USERS_OWN]
    nodes["LoadImage"]["input"]["required"]["image"][0].append(PICTURE)
    route.fulfill(response=answer, json=nodes)


def convert(page: Page, api: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a workflow in the interface's form as the frontend writes it."""
    script = "async ([api, name]) => { await app.loadApiJson(api, name); app.graph.arrange(); }"
    page.evaluate(script, [api, name])
    page.wait_for_function("n => app.graph.nodes.length === n", arg=len(api), timeout=20000)
    return page.evaluate("app.graph.serialize()")


def tidy(workflow: dict[str, Any], columns: tuple[str, ...], note: str, name: str) -> None:
    """Lay the nodes out in titled columns, and set the properties that templates carry."""
    if note:
        note_node(workflow, note)
    for node in workflow["nodes"]:
        set_properties(node)
    drop_nothings(workflow)
    place(workflow, columns, {})
    workflow["id"], workflow["revision"] = identity(f"workflow {name}"), 0
    workflow["extra"] = {}


def place(workflow: dict[str, Any], columns: tuple[str, ...], room: Mapping[int, int]) -> None:
    """Set the places and sizes of nodes, and the frames; `room` is what a node takes after a run, by its id."""
    nodes = {"note" if node["type"] == "MarkdownNote" else str(node["id"]): node for node in workflow["nodes"]}
    x, placed = 0, []
    for column in columns:
        title, _, ids = column.rpartition(":")
        members = [nodes[key] for key in ids.split()]
        x += stack(members, x, room) + GAP
        placed.append((title, members))
    workflow["groups"] = []
    for title, group in groupby(placed, key=lambda each: each[0]):
        if title:
            members = [node for _, column in group for node in column]
            workflow["groups"].append(frame(len(workflow["groups"]) + 1, title, members, room))


def stack(nodes: list[dict[str, Any]], x: int, room: Mapping[int, int]) -> int:
    """Place the nodes of one column below each other, all as wide as the widest, and return that width."""
    width = max(SIZES.get(node["type"], (WIDTH, None))[0] for node in nodes)
    y = 0
    for node in nodes:
        height = SIZES.get(node["type"], (WIDTH, None))[1] or node["size"][1]
        node["pos"], node["size"] = [x, y], [width, height]
        y += max(height, room.get(node["id"], 0)) + TITLE + (ISSUES if node["type"] in LOADERS else 0)
    return width


def frame(number: int, title: str, nodes: list[dict[str, Any]], room: Mapping[int, int]) -> dict[str, Any]:
    """Return a titled group around nodes and what they show after a run."""
    left, top = (min(node["pos"][axis] for node in nodes) for axis in (0, 1))
    right = max(node["pos"][0] + node["size"][0] for node in nodes)
    bottom = max(node["pos"][1] + max(node["size"][1], room.get(node["id"], 0)) for node in nodes)
    bounding = [left - 20, top - 90, right - left + 40, bottom - top + 110]
    return {"id": number, "title": title, "bounding": bounding, "color": "#3f789e", "font_size": 24, "flags": {}}


def note_node(workflow: dict[str, Any], text: str) -> None:
    """Add a note to the workflow."""
    workflow["last_node_id"] += 1
    node = {
        "id": workflow["last_node_id"], "type": "MarkdownNote", "pos": [0, 0], "size": [0, 0], "flags": {},
        "order": 0, "mode": 0, "inputs": [], "outputs": [], "title": "About this workflow", "properties": {},
        "widgets_values": [text], "color": "#222", "bgcolor": "#000",
    }  # fmt: skip
    workflow["nodes"].append(node)


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


def drop_nothings(value: Any) -> None:
    """Leave out what the frontend writes as null, at any depth: newer ones read objects and lists there.

    The null number of a link stays, and says that a socket is empty; no links are an empty list.
    """
    if isinstance(value, dict):
        if value.get("links", ()) is None:
            value["links"] = []
        for name in [name for name, each in value.items() if each is None and name != "link"]:
            del value[name]
    if isinstance(value, (dict, list)):
        for each in value.values() if isinstance(value, dict) else value:
            drop_nothings(each)


def write_workflows(server: LiveServer, browser: Any, names: list[str]) -> None:
    """Write the workflows and a picture of each; `names` chooses some."""
    for path, columns in LAYOUTS.items():
        folder, name = ROOT / Path(path).parent, Path(path).name
        if names and name not in names:
            continue
        page = open_frontend(browser, server.url)
        api = json.loads((folder / "api" / f"{name}.json").read_text(encoding="utf-8"))
        note = folder / "api" / f"{name}.md"
        workflow = convert(page, api, name)
        for node in workflow["nodes"]:
            node["title"] = TITLES.get(path, {}).get(str(node["id"]), node.get("title"))
        tidy(workflow, columns, note.read_text(encoding="utf-8") if note.exists() else "", name)
        place(workflow, columns, rooms(page, workflow, PICTURE))
        (folder / f"{name}.json").write_text(json.dumps(workflow, indent=2) + "\n", encoding="utf-8")
        page.evaluate("async w => { await app.loadGraphData(w); }", workflow)
        picture = screenshot(page)
        picture.save(ROOT / "lab" / "demo" / "output" / f"{name}.png")
        if folder.name == "workflows":
            draw_thumbnail(name, picture).save(folder / f"{name}.jpg", quality=QUALITY, optimize=True)
        page.close()


def screenshot(page: Page) -> Image.Image:
    """Return a picture of the whole graph, without what the interface lays over it."""
    page.add_style_tag(content=f"{', '.join(OVERLAYS)} {{ display: none !important; }}")
    page.wait_for_timeout(1500)
    page.evaluate("app.canvas.canvas.focus()")
    page.keyboard.press(".")
    page.wait_for_timeout(1500)
    left, top, right, bottom = page.evaluate(BOUNDS)
    clip: FloatRect = {"x": left - 40, "y": top - 40, "width": right - left + 80, "height": bottom - top + 80}
    return Image.open(BytesIO(page.screenshot(clip=clip)))


def main() -> int:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        print("No Chromium found; install one and run again.", file=sys.stderr)
        return 1
    (ROOT / "lab" / "demo" / "output").mkdir(exist_ok=True)
    with live_server() as server, sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=executable, headless=True, args=FLAGS, viewport=VIEWPORT
        )
        try:
            write_workflows(server, browser, sys.argv[1:])
        finally:
            browser.close()
    write_blueprints(sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
