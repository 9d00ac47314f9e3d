"""Write the blueprint of Wan 2.2: one node for the library that patches both experts, as the template does.

`author_workflows.py` calls it after writing the template, whose CLEAR nodes and values it takes.
"""

import copy
import json
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "workflows" / "wan22_t2v_clear.json"
BLUEPRINT = ROOT / "subgraphs" / "Linearize Wan 2.2.json"
NAME = BLUEPRINT.stem
DESCRIPTION = (
    "CLEAR Attention on both experts of Wan 2.2: each token of the video sees only the tokens around it. The windows "
    "are untrained and change the video. Connect the models that go into the two samplers."
)
EXPERTS = ("high_noise", "low_noise")  # in the order of the template's CLEAR nodes
SHOWN = ("radius", "temporal_radius", "start_percent")  # widgets of each expert that the one node shows
OUTER, INPUTS, OUTPUTS = 1, -10, -20  # ids: the node itself, and the ends that the frontend draws inside
WIDTH, HEIGHT, GAP = 400, 380, 120


def write_blueprint() -> None:
    """Write the file."""
    template = json.loads(TEMPLATE.read_text(encoding="utf-8"))
    nodes = [copy.deepcopy(node) for node in template["nodes"] if node["type"] == "LinearizeCLEAR"]
    BLUEPRINT.parent.mkdir(exist_ok=True)
    BLUEPRINT.write_text(json.dumps(blueprint(nodes), indent=2) + "\n", encoding="utf-8")


def blueprint(nodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a workflow of one node, and the subgraph that it stands for."""
    inputs, outputs, links, shown = [], [], [], {}
    for index, (expert, node) in enumerate(zip(EXPERTS, nodes, strict=True)):
        node.update(pos=[0, index * (HEIGHT + GAP)], size=[WIDTH, HEIGHT], order=index)
        values = dict(zip((s["name"] for s in node["inputs"] if "widget" in s), node["widgets_values"], strict=True))
        for slot, socket in enumerate(node["inputs"]):
            socket["link"] = None
            name = expert if socket["name"] == "model" else f"{expert}_{socket['name']}"
            if socket["name"] in ("model", *SHOWN):
                socket["link"] = connect(links, (INPUTS, len(inputs)), (node["id"], slot), socket["type"])
                inputs.append(end(name, socket["type"], socket["link"]))
            if socket["name"] in SHOWN:
                shown[name] = values[socket["name"]]
        for socket in node["outputs"]:
            socket["links"] = []
        link = connect(links, (node["id"], 0), (OUTPUTS, index), "MODEL")
        node["outputs"][0]["links"] = [link]
        outputs.append(end(expert, "MODEL", link))
    subgraph = {
        "id": identity(NAME), "version": 1, "revision": 0, "config": {}, "name": NAME, "description": DESCRIPTION,
        "category": "linearize", "widgets": [], "groups": [], "extra": {},
        "state": {"lastGroupId": 0, "lastNodeId": nodes[-1]["id"], "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": INPUTS, "bounding": [-GAP - 240, 0, 200, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTPUTS, "bounding": [WIDTH + GAP, 0, 140, 40 + 20 * len(outputs)]},
        "inputs": inputs, "outputs": outputs, "nodes": nodes, "links": links,
    }  # fmt: skip
    return {
        "id": identity(f"{NAME}, as a workflow"), "revision": 0, "last_node_id": OUTER, "last_link_id": 0,
        "nodes": [outer_node(subgraph, shown)], "links": [], "groups": [],
        "definitions": {"subgraphs": [subgraph]}, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def outer_node(subgraph: dict[str, Any], shown: dict[str, Any]) -> dict[str, Any]:
    """Return the node that people see: the ends of the subgraph as sockets, and the shown widgets with their values."""
    sockets = []
    for each in subgraph["inputs"]:
        widget = {"widget": {"name": each["name"]}} if each["name"] in shown else {}
        sockets.append({"label": each["label"], "name": each["name"], "type": each["type"], **widget, "link": None})
    return {
        "id": OUTER, "type": subgraph["id"], "pos": [0, 0], "size": [340, 240], "flags": {}, "order": 0, "mode": 0,
        "title": NAME, "inputs": sockets,
        "outputs": [
            {"label": each["label"], "name": each["name"], "type": each["type"], "links": None}
            for each in subgraph["outputs"]
        ],
        "properties": {"proxyWidgets": [["-1", name] for name in shown], "cnr_id": "linearize"},
        "widgets_values": list(shown.values()),
    }  # fmt: skip


def connect(links: list[dict[str, Any]], origin: tuple[int, int], target: tuple[int, int], kind: str) -> int:
    """Add a link between two (node id, slot) and return its id."""
    number = len(links) + 1
    links.append(
        {"id": number, "origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0],
         "target_slot": target[1], "type": kind}
    )  # fmt: skip
    return number


def end(name: str, kind: str, link: int) -> dict[str, Any]:
    """Return a socket at the edge of the subgraph."""
    label = name.replace("_", " ")
    return {"id": identity(f"{NAME}, {name}, {link}"), "name": name, "label": label, "type": kind, "linkIds": [link]}


def identity(text: str) -> str:
    """Return the same UUID for the same text: the frontend wants UUIDs, and a second run must change nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"linearize: {text}"))
