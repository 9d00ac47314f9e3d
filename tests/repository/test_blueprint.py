"""The blueprints by themselves: their links, and that they are the newest that their script makes of the templates."""

import json
import re
from pathlib import Path

import pytest

from linearize.lab.authoring import blueprint

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "subgraphs").glob("*.json"))
ENDS = {  # file: sockets that take something, widgets, what comes out
    "Linearize Wan 2.2": (
        ["high_noise", "low_noise"],
        [f"{side}_noise_{name}" for side in ("high", "low") for name in ("keep", "start_percent")],
        ["high_noise", "low_noise"],
    ),
    "Linearize my model": (["model", "clip", "latent"], ["prompts", "name", "budget"], ["student"]),
}


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def file(request):
    return request.param


@pytest.fixture
def workflow(file):
    return json.loads(file.read_text(encoding="utf-8"))


def ends_of(socket):
    return socket["links"] if "links" in socket else socket["linkIds"]


def test_they_are_what_their_script_writes():
    made = {each.name: blueprint.workflow_of(each) for each in blueprint.BLUEPRINTS}
    assert made == {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FILES}


def test_links_are_known_at_both_ends(workflow):
    (subgraph,) = workflow["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    assert len(links) == len(subgraph["links"]) == subgraph["state"]["lastLinkId"]
    assert max(nodes) == subgraph["state"]["lastNodeId"] and workflow["nodes"][0]["id"] not in nodes
    stops = []
    for number, link in links.items():
        if link["origin_id"] == subgraph["inputNode"]["id"]:
            start = subgraph["inputs"][link["origin_slot"]]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
        if link["target_id"] == subgraph["outputNode"]["id"]:
            stop = subgraph["outputs"][link["target_slot"]]
            assert stop["linkIds"] == [number]
        else:
            stop = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert stop["link"] == number
        assert start["type"] == stop["type"] == link["type"] and number in ends_of(start)
        stops.append(id(stop))
    assert len(set(stops)) == len(links)
    sockets = [*subgraph["inputs"], *(socket for node in nodes.values() for socket in node["outputs"])]
    assert sorted(number for socket in sockets for number in ends_of(socket)) == sorted(links)


def test_nodes_inside_do_not_overlap_and_lie_between_the_ends(workflow):
    (subgraph,) = workflow["definitions"]["subgraphs"]
    boxes = [(*node["pos"], *node["size"]) for node in subgraph["nodes"]]
    for number, (x, y, width, height) in enumerate(boxes):
        for left, top, w, h in boxes[number + 1 :]:
            assert x + width <= left or left + w <= x or y + height + 30 <= top or top + h + 30 <= y
    left, right = (subgraph[name]["bounding"] for name in ("inputNode", "outputNode"))
    assert left[0] + left[2] < min(x for x, *_ in boxes) and max(x + width for x, _, width, _ in boxes) < right[0]


def test_the_one_node_shows_the_ends(file, workflow):
    (node,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == file.stem
    assert subgraph["description"].endswith(".") and subgraph["category"] == "linearize"
    takes = [socket["name"] for socket in node["inputs"] if "widget" not in socket]
    shown = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    assert (takes, shown, [socket["name"] for socket in node["outputs"]]) == ENDS[file.stem]
    assert [socket["name"] for socket in node["inputs"]] == [each["name"] for each in subgraph["inputs"]]
    assert node["properties"]["proxyWidgets"] == [["-1", name] for name in shown]
    assert len(node["widgets_values"]) == len(shown)
    identities = [workflow["id"], subgraph["id"], *(each["id"] for each in subgraph["inputs"] + subgraph["outputs"])]
    assert len(set(identities)) == len(identities)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in identities)
