"""Write the blueprints: nodes of a template as one node for the library.

`workflows.py` calls it after writing the templates, whose nodes and values they take.
"""

import copy
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import ROOT

FOLDER = ROOT / "subgraphs"
OUTER, INPUTS, OUTPUTS = 1, -10, -20  # ids: the node itself, and the ends that the frontend draws inside
GAP, TITLE = 120, 60  # pixels between columns; between nodes of a column
SEEDS = ("seed", "noise_seed")  # the frontend keeps a second value behind these


@dataclass(frozen=True)
class Blueprint:
    """Part of a template.

    Args:
        name: of the node and of its file.
        description: a few sentences.
        template: whose nodes it takes.
        columns: ids of these nodes from left to right, each column from top to bottom.
        inputs: what the node shows, `name: id.input`, several where one sets them all.
        outputs: what it gives, `name: id.slot`.
        values: of its nodes that are not the template's, by `id.input`.
        height: of the node in the interface.
    """

    name: str
    description: str
    template: str
    columns: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    height: int = 240


BLUEPRINTS = (
    Blueprint(
        name="Linearize Wan 2.2",
        description="Foveated Attention on both experts of Wan 2.2: each token of the video sees what it asks for "
        "exactly, and the rest as averages. No trained weights. Connect the models that go into the two samplers.",
        template="wan22_t2v_foveated",
        columns=("7 8",),
        inputs=(
            "high_noise: 7.model",
            "high_noise_keep: 7.keep",
            "high_noise_start_percent: 7.start_percent",
            "low_noise: 8.model",
            "low_noise_keep: 8.keep",
            "low_noise_start_percent: 8.start_percent",
        ),
        outputs=("high_noise: 7.0", "low_noise: 8.0"),
    ),
    Blueprint(
        name="Linearize my model",
        description="Distils cheaper attention for your model from your prompts and saves it: samples, three "
        "candidates per site, a choice under a budget, fine-tuning. Steps, cfg and the size "
        "that the budget is counted at are those of FLUX.1 at 1024 x 1024; open the node to change them.",
        template="flux_dev_distill",
        columns=("5", "6 7 8", "9 12", "13 14"),
        inputs=(
            "model: 5.model 9.model 12.model 13.model",
            "clip: 5.clip",
            "latent: 5.latent_image",
            "prompts: 5.prompts",
            "name: 5.name 14.name",
            "budget: 12.budget",
        ),
        outputs=("student: 13.0",),
        values={
            "6.host": "auto", "7.host": "auto", "8.host": "auto", "5.name": "my-model",
            "5.guidance": 0.0, "14.name": "my-model", "14.base_model": "", "14.licence": "",
        },
        height=320,
    ),
)  # fmt: skip


def write_blueprints(templates: list[str]) -> None:
    """Write the files, those of some templates or all."""
    FOLDER.mkdir(exist_ok=True)
    for blueprint in BLUEPRINTS:
        if not templates or blueprint.template in templates:
            text = json.dumps(workflow_of(blueprint), indent=2) + "\n"
            (FOLDER / f"{blueprint.name}.json").write_text(text, encoding="utf-8")


def workflow_of(blueprint: Blueprint) -> dict[str, Any]:
    """Return a workflow of one node, and the subgraph that it stands for."""
    template = json.loads((ROOT / "workflows" / f"{blueprint.template}.json").read_text(encoding="utf-8"))
    nodes = placed_nodes(blueprint, template)
    links: list[dict[str, Any]] = []
    ends = [input_end(blueprint, text, nodes, links) for text in blueprint.inputs]
    for _, origin, slot, target, entry, kind in template["links"]:
        if origin in nodes and target in nodes:
            connect(links, nodes, (origin, slot), (target, entry), kind)
    gives = [output_end(blueprint, index, nodes, links) for index in range(len(blueprint.outputs))]
    right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in nodes.values()) for axis in (0, 1))
    subgraph = {
        "id": identity(blueprint.name), "version": 1, "revision": 0, "config": {}, "name": blueprint.name,
        "description": blueprint.description, "category": "linearize", "widgets": [], "groups": [], "extra": {},
        "state": {"lastGroupId": 0, "lastNodeId": max(nodes), "lastLinkId": len(links), "lastRerouteId": 0},
        "inputNode": {"id": INPUTS, "bounding": [-GAP - 240, 0, 200, 40 + 20 * len(ends)]},
        "outputNode": {"id": OUTPUTS, "bounding": [right + GAP, 0, 140, 40 + 20 * len(gives)]},
        "inputs": ends, "outputs": gives, "nodes": list(nodes.values()), "links": links,
    }  # fmt: skip
    return {
        "id": identity(f"{blueprint.name}, as a workflow"), "revision": 0, "last_node_id": OUTER, "last_link_id": 0,
        "nodes": [outer_node(blueprint, subgraph)], "links": [], "groups": [],
        "definitions": {"subgraphs": [subgraph]}, "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def placed_nodes(blueprint: Blueprint, template: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the blueprint's nodes by id, without links, in columns, with its values."""
    known, nodes, x = {node["id"]: node for node in template["nodes"]}, {}, 0
    for column in blueprint.columns:
        members = [copy.deepcopy(known[int(key)]) for key in column.split()]
        y = 0
        for node in members:
            node.update(pos=[x, y], order=len(nodes))
            y += node["size"][1] + TITLE
            for socket in node["inputs"]:
                socket["link"] = None
            for socket in node["outputs"]:
                socket["links"] = []
            nodes[node["id"]] = node
        x += max(node["size"][0] for node in members) + GAP
    for place, value in blueprint.values.items():
        key, _, name = place.partition(".")
        nodes[int(key)]["widgets_values"][value_slot(nodes[int(key)], name)] = value
    return nodes


def value_slot(node: dict[str, Any], name: str) -> int:
    """Return where a node keeps the value of a widget."""
    names = [socket["widget"]["name"] for socket in node["inputs"] if "widget" in socket]
    before = names[: names.index(name)]
    return len(before) + sum(each in SEEDS for each in before)


def input_end(
    blueprint: Blueprint, text: str, nodes: dict[int, dict[str, Any]], links: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return an input at the edge of the subgraph, connected to what it sets."""
    name, _, places = text.partition(": ")
    numbers, kind = [], ""
    for place in places.split():
        key, _, socket_name = place.partition(".")
        names = [socket["name"] for socket in nodes[int(key)]["inputs"]]
        slot = names.index(socket_name)
        kind = nodes[int(key)]["inputs"][slot]["type"]
        numbers.append(connect(links, nodes, (INPUTS, blueprint.inputs.index(text)), (int(key), slot), kind))
    return end(blueprint, name, "input", kind, numbers)


def output_end(
    blueprint: Blueprint, index: int, nodes: dict[int, dict[str, Any]], links: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return an output at the edge of the subgraph, connected to what gives it."""
    name, _, place = blueprint.outputs[index].partition(": ")
    key, slot = map(int, place.split("."))
    kind = nodes[key]["outputs"][slot]["type"]
    return end(blueprint, name, "output", kind, [connect(links, nodes, (key, slot), (OUTPUTS, index), kind)])


def outer_node(blueprint: Blueprint, subgraph: dict[str, Any]) -> dict[str, Any]:
    """Return the node that people see: the ends of the subgraph as sockets, and the shown widgets with their values."""
    nodes, links = ({each["id"]: each for each in subgraph[kind]} for kind in ("nodes", "links"))
    sockets, shown = [], {}
    for each in subgraph["inputs"]:
        link = links[each["linkIds"][0]]
        node = nodes[link["target_id"]]
        inner, widget = node["inputs"][link["target_slot"]], {}
        if "widget" in inner:
            shown[each["name"]] = node["widgets_values"][value_slot(node, inner["name"])]
            widget = {"widget": {"name": each["name"]}}
        sockets.append({"label": each["label"], "name": each["name"], "type": each["type"], **widget, "link": None})
    return {
        "id": OUTER, "type": subgraph["id"], "pos": [0, 0], "size": [340, blueprint.height], "flags": {}, "order": 0,
        "mode": 0, "title": blueprint.name, "inputs": sockets,
        "outputs": [
            {"label": each["label"], "name": each["name"], "type": each["type"], "links": []}
            for each in subgraph["outputs"]
        ],
        "properties": {"proxyWidgets": [["-1", name] for name in shown], "cnr_id": "linearize"},
        "widgets_values": list(shown.values()),
    }  # fmt: skip


def connect(
    links: list[dict[str, Any]],
    nodes: dict[int, dict[str, Any]],
    origin: tuple[int, int],
    target: tuple[int, int],
    kind: str,
) -> int:
    """Add a link between two (node id, slot), known at both ends, and return its id."""
    number = len(links) + 1
    links.append(
        {"id": number, "origin_id": origin[0], "origin_slot": origin[1], "target_id": target[0],
         "target_slot": target[1], "type": kind}
    )  # fmt: skip
    if origin[0] in nodes:
        nodes[origin[0]]["outputs"][origin[1]]["links"].append(number)
    if target[0] in nodes:
        nodes[target[0]]["inputs"][target[1]]["link"] = number
    return number


def end(blueprint: Blueprint, name: str, side: str, kind: str, links: list[int]) -> dict[str, Any]:
    """Return a socket at the edge of the subgraph."""
    label = name.replace("_", " ")
    key = identity(f"{blueprint.name}, {side} {name}")
    return {"id": key, "name": name, "label": label, "type": kind, "linkIds": links}


def identity(text: str) -> str:
    """Return the same UUID for the same text: the frontend needs UUIDs, and a second run must change nothing."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"linearize: {text}"))
