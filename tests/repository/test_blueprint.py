"""The blueprint by itself: its links, and that it is the newest one that its script makes of the template."""

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "subgraphs" / "Linearize Wan 2.2.json"


@pytest.fixture
def workflow():
    return json.loads(FILE.read_text(encoding="utf-8"))


def test_it_is_what_its_script_writes(workflow, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import author_blueprint

    template = json.loads(author_blueprint.TEMPLATE.read_text(encoding="utf-8"))
    nodes = [node for node in template["nodes"] if node["type"] == "LinearizeCLEAR"]
    assert author_blueprint.blueprint(nodes) == workflow
    sys.modules.pop("author_blueprint")


def test_links_are_known_at_both_ends(workflow):
    (subgraph,) = workflow["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    links = {link["id"]: link for link in subgraph["links"]}
    assert len(links) == len(subgraph["links"]) == subgraph["state"]["lastLinkId"]
    assert max(nodes) == subgraph["state"]["lastNodeId"] and workflow["nodes"][0]["id"] not in nodes
    for number, link in links.items():
        if link["origin_id"] == subgraph["inputNode"]["id"]:
            start = subgraph["inputs"][link["origin_slot"]]
            assert start["linkIds"] == [number]
        else:
            start = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
            assert start["links"] == [number]
        if link["target_id"] == subgraph["outputNode"]["id"]:
            stop = subgraph["outputs"][link["target_slot"]]
            assert stop["linkIds"] == [number]
        else:
            stop = nodes[link["target_id"]]["inputs"][link["target_slot"]]
            assert stop["link"] == number
        assert start["type"] == stop["type"] == link["type"]


def test_the_one_node_takes_and_gives_both_experts(workflow):
    (node,), (subgraph,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"] and node["title"] == subgraph["name"] == FILE.stem
    models = [socket["name"] for socket in node["inputs"] if socket["type"] == "MODEL"]
    assert models == [socket["name"] for socket in node["outputs"]] == ["high_noise", "low_noise"]
    assert [socket["name"] for socket in node["inputs"]] == [each["name"] for each in subgraph["inputs"]]
    shown = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    assert node["properties"]["proxyWidgets"] == [["-1", name] for name in shown]
    assert len(node["widgets_values"]) == len(shown)
    identities = [workflow["id"], subgraph["id"], *(each["id"] for each in subgraph["inputs"] + subgraph["outputs"])]
    assert len(set(identities)) == len(identities)
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", each) for each in identities)
